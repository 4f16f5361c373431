"""Comparisons: several memories trained and measured alike, from one file. `mnemic compare` runs them.

    title = "..."
    memories = ["none", "rmt", "lm2"]     # entries: names of memories, or of tables below
    seeds = [0, 1]                        # of training: weights and data

    [train]                               # settings of every run, as in `mnemic train`
    parameters = 500000
    [evaluate]                            # settings of every evaluation, as in `mnemic eval`
    samples = 200

    [board.recall.train]                  # a board: what is trained, and
    task = "recall"
    [board.recall.evaluate]               # on what it is measured; both on top of the tables above
    tasks = ["recall"]                    # several measurements of one model: [[board.recall.evaluate]], once for each;
                                          # with memories = ["lm2"] in one, of those entries alone

    [board.later]                         # optional, for any board:
    memories = ["lm2"]                    # its own entries, among those above; None: all
    seeds = [0]                           # its own seeds
    after = "recall"                      # models begin with the weights of the same entry and seed of that board, or
                                          # of its only seed;
    host = "none"                         # entries that it does not train, with the host of this entry's model there
    [board.later.train]
    steps = 100
    [board.later.memory.rmt]              # settings of one entry on this board alone, as in the tables `memory` below
    memory_options = { num_tokens = 8 }

    [costs]                               # what `--costs` measures; see `speeds`
    history = 2048

    [memory.rmt]                          # settings of one entry, on top of all others; `memory` where the name of the
    memory_options = { num_tokens = 4 }   # entry is not that of a memory

    [memory."none + bm25"]                # not trained: the models of another entry, measured otherwise
    trained = "none"
    evaluate = { prompt = "bm25:64" }     # of any entry, on top of what the board says

Every entry of a board sees the same samples in the same order for the same number of steps; `parameters` makes the
models equally large.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, UnknownNameError
from .evaluation import Evaluation
from .experiment import Experiment
from .speeds import Costs

_KEYS = ("title", "scale", "memories", "seeds", "train", "evaluate", "board", "memory", "costs")
_BOARD = ("train", "evaluate", "memory", "memories", "seeds", "after", "host")
_EQUAL = ("task", "tasks", "steps", "batch_size", "gradient_accumulation", "least_segments", "most_segments", "seed")


@dataclass(frozen=True)
class Job:
    """One model of a comparison: how it is trained and measured.

    trained: the entry of the same board whose model is measured; None: it is trained itself.
    after: the board with whose weights the training begins; None: it begins anew.
    begins: the entry of that board whose host is taken, where it is another one.
    after_seed: the seed of the model there.
    """

    board: str
    entry: str
    seed: int
    experiment: Experiment
    evaluations: tuple[Evaluation, ...]
    trained: str | None = None
    after: str | None = None
    begins: str | None = None
    after_seed: int | None = None

    @property
    def folder(self) -> Path:
        """Relative to that of the comparison."""
        return self._folder(self.board, self.entry)

    @property
    def model(self) -> Path:
        """Where the model is: in the folder of the entry that is `trained`, or its own."""
        return self._folder(self.board, self.trained or self.entry)

    @property
    def start(self) -> Path | None:
        """The folder whose weights the training begins with."""
        if self.after is None or self.trained is not None:
            return None
        return self._folder(self.after, self.begins or self.entry, self.after_seed)

    def _folder(self, board: str, entry: str, seed: int | None = None) -> Path:
        return Path("runs") / board / entry / f"seed-{self.seed if seed is None else seed}"


@dataclass(frozen=True)
class Comparison:
    """What a file says.

    Raises:
        ConfigError: entries, boards or settings that cannot be.
    """

    title: str
    scale: str | None
    jobs: tuple[Job, ...]
    settings: Mapping[str, Any]
    costs: Costs

    @classmethod
    def read(cls, path: str | Path) -> "Comparison":
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"Cannot read the comparison {path}: {error.strerror}.") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is no valid TOML: {error}.") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        ConfigError.check_names("setting of a comparison", values, _KEYS)
        memories: Any = values.get("memories")
        boards = _tables(values, "board")
        for table in (values, *boards.values()):
            _check_lists(table)
        if not _listed(memories, str):
            raise ConfigError(f"memories = {memories!r}: expected a list of different names.")
        if not boards:
            raise ConfigError("A comparison needs at least one table [board.NAME.train].")
        ConfigError.check_names("entry of memories", _tables(values, "memory"), memories)
        costs = Costs.from_dict(_table(values, "costs"))
        if costs.board is not None and costs.board not in boards:
            raise UnknownNameError.of("board of costs", costs.board, boards)
        return cls(values.get("title", "Comparison"), values.get("scale"), tuple(_jobs(values)), values, costs)


def _jobs(values: Mapping[str, Any]) -> Iterator[Job]:
    made: set[tuple[str, str, int]] = set()
    for board, parts in _tables(values, "board").items():
        for key in parts:
            if key not in _BOARD:
                raise ConfigError(f"[board.{board}.{key}]: a board has the tables train, evaluate and memory.")
        if "host" in parts and "after" not in parts:
            raise ConfigError(f"[board.{board}]: host = {parts['host']!r} goes with after, the board that trains it.")
        shared, after = _merged(_table(values, "train"), _table(parts, "train")), parts.get("after")
        entries = parts.get("memories", values["memories"])
        ConfigError.check_names(f"entry of board {board}", entries, values["memories"])
        ConfigError.check_names(f"entry of board {board}", _tables(parts, "memory"), entries)
        settings = {e: _merged(*(_tables(t, "memory").get(e, {}) for t in (values, parts))) for e in entries}
        for entry in entries:
            own, trained, measured = _own(settings, entry)
            evaluations = _evaluations(board, entry, entries, values, parts, measured)
            for seed in parts.get("seeds", values.get("seeds", [0])):
                begins, begun = None, _seed_of(made, after, entry, seed)
                if begun is None and "host" in parts:
                    begins = parts["host"]
                    begun = _seed_of(made, after, begins, seed)
                if after is not None and trained is None and begun is None:
                    raise ConfigError(
                        f"[board.{board}]: after = {after!r}, expected a board further up that trains "
                        f"{begins or entry} with seed {seed}, or with one seed."
                    )
                try:
                    experiment = Experiment.from_dict(_merged(shared, own, {"seed": seed}))
                except (ConfigError, UnknownNameError) as error:
                    raise ConfigError(f"{entry} on board {board}: {error}") from error
                if trained is None:
                    made.add((board, entry, seed))
                yield Job(board, entry, seed, experiment, evaluations, trained, after, begins, begun)


def _seed_of(made: set[tuple[str, str, int]], board: str | None, entry: str, seed: int) -> int | None:
    """The seed of the entry's model on that board: the same one, or the only one; None where there is no such model."""
    seeds = [s for b, e, s in made if (b, e) == (board, entry)]
    return seed if seed in seeds else seeds[0] if len(seeds) == 1 else None


def _own(settings: Mapping[str, Mapping[str, Any]], entry: str) -> tuple[dict[str, Any], str | None, Mapping[str, Any]]:
    """Settings of an entry's experiment, the entry that is trained for it, and settings of its evaluations.

    settings: of all entries of the board.
    """
    own = {"memory": entry, **settings[entry]}
    unequal = [key for key in own if key in _EQUAL]
    if unequal:
        raise ConfigError(f"[memory.{entry}]: {', '.join(unequal)} must be equal for all; set it for a board.")
    trained, measured = own.pop("trained", None), _table(own, "evaluate")
    own.pop("evaluate", None)
    if trained is None:
        return own, None, measured
    other, others, _ = _own(settings, trained) if trained in settings and trained != entry else ({}, "", {})
    if others is not None or not measured or len(own) > 1:
        raise ConfigError(
            f"[memory.{entry}]: trained = {trained!r}, expected another entry of the same boards that is trained "
            "itself, and beside it a table evaluate and nothing else."
        )
    return other, trained, measured


def _evaluations(
    board: str, entry: str, entries: Sequence[str], values: Mapping[str, Any], parts: Mapping[str, Any],
    own: Mapping[str, Any],
) -> tuple[Evaluation, ...]:  # fmt: skip
    """What an entry's models are measured on: one table, or those of a list that are of it, no score twice.

    entries: of the board. own: settings of this entry, on top.
    """
    given = parts.get("evaluate", {})
    found, shared = [], _table(values, "evaluate")
    for one in given if isinstance(given, list) and given else [given]:
        table = dict(_table({"evaluate": one}, "evaluate"))
        of = table.pop("memories", list(entries))
        _check_lists({"memories": of})
        ConfigError.check_names(f"entry of board {board}", of, entries)
        if entry in of:
            found.append(Evaluation.from_dict(_merged(shared, table, own)))
    if not found:
        raise ConfigError(f"[[board.{board}.evaluate]]: no table measures {entry}; name it in one of them.")
    names = [name for evaluation in found for name in evaluation.names()]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise ConfigError(
            f"[[board.{board}.evaluate]] measures {twice[0]} at length {twice[1]} with seed {twice[2]} twice; give "
            "other lengths, seeds or options."
        )
    return tuple(found)


def _merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Later ones on top; tables within are merged key by key."""
    found: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return found


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = values.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{name} = {table!r}: expected a table.")
    return table


def _tables(values: Mapping[str, Any], name: str) -> Mapping[str, Mapping[str, Any]]:
    for key in _table(values, name):
        _table(_table(values, name), key)
    return _table(values, name)


def _check_lists(table: Mapping[str, Any]) -> None:
    for key, kind, what in (("memories", str, "names"), ("seeds", int, "whole numbers")):
        if key in table and not _listed(table[key], kind):
            raise ConfigError(f"{key} = {table[key]!r}: expected a list of different {what}.")


def _listed(value: Any, kind: type) -> bool:
    right = isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
    return right and 0 < len(set(value)) == len(value)
