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
    tasks = ["recall"]                    # several measurements of one model: [[board.recall.evaluate]], once for each

    [costs]                               # what `--costs` measures; see `speeds`
    history = 2048

    [memory.rmt]                          # settings of one entry, on top of all others; `memory` where the name of the
    memory_options = { num_tokens = 4 }   # entry is not that of a memory

Every entry of a board sees the same samples in the same order for the same number of steps; `parameters` makes the
models equally large.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, UnknownNameError
from .evaluation import Evaluation
from .experiment import Experiment
from .speeds import Costs

_KEYS = ("title", "scale", "memories", "seeds", "train", "evaluate", "board", "memory", "costs")
_EQUAL = ("task", "tasks", "steps", "batch_size", "gradient_accumulation", "least_segments", "most_segments", "seed")


@dataclass(frozen=True)
class Job:
    """One model of a comparison: how it is trained and measured."""

    board: str
    entry: str
    seed: int
    experiment: Experiment
    evaluations: tuple[Evaluation, ...]

    @property
    def folder(self) -> Path:
        """Relative to that of the comparison."""
        return Path("runs") / self.board / self.entry / f"seed-{self.seed}"


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
        seeds, boards = values.get("seeds", [0]), _tables(values, "board")
        if not _listed(memories, str):
            raise ConfigError(f"memories = {memories!r}: expected a list of different names.")
        if not _listed(seeds, int):
            raise ConfigError(f"seeds = {seeds!r}: expected a list of different whole numbers.")
        if not boards:
            raise ConfigError("A comparison needs at least one table [board.NAME.train].")
        ConfigError.check_names("entry of memories", _tables(values, "memory"), memories)
        costs = Costs.from_dict(_table(values, "costs"))
        if costs.board is not None and costs.board not in boards:
            raise UnknownNameError.of("board of costs", costs.board, boards)
        return cls(values.get("title", "Comparison"), values.get("scale"), tuple(_jobs(values)), values, costs)


def _jobs(values: Mapping[str, Any]) -> Iterator[Job]:
    for board, parts in _tables(values, "board").items():
        for key in parts:
            if key not in ("train", "evaluate"):
                raise ConfigError(f"[board.{board}.{key}]: a board has the tables train and evaluate.")
        shared = _merged(_table(values, "train"), _table(parts, "train"))
        evaluations = _evaluations(board, values, parts)
        for entry in values["memories"]:
            own = _tables(values, "memory").get(entry, {})
            unequal = [key for key in own if key in _EQUAL]
            if unequal:
                raise ConfigError(f"[memory.{entry}]: {', '.join(unequal)} must be equal for all; set it for a board.")
            for seed in values.get("seeds", [0]):
                settings = _merged(shared, {"memory": entry}, own, {"seed": seed})
                try:
                    experiment = Experiment.from_dict(settings)
                except (ConfigError, UnknownNameError) as error:
                    raise ConfigError(f"{entry} on board {board}: {error}") from error
                yield Job(board, entry, seed, experiment, evaluations)


def _evaluations(board: str, values: Mapping[str, Any], parts: Mapping[str, Any]) -> tuple[Evaluation, ...]:
    """What each model of a board is measured on: one table, or several in a list, no score twice."""
    given = parts.get("evaluate", {})
    tables = given if isinstance(given, list) and given else [given]
    shared = _table(values, "evaluate")
    found = tuple(Evaluation.from_dict(_merged(shared, _table({"evaluate": t}, "evaluate"))) for t in tables)
    names = [name for evaluation in found for name in evaluation.names()]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise ConfigError(
            f"[[board.{board}.evaluate]] measures {twice[0]} at length {twice[1]} with seed {twice[2]} twice; give "
            "other lengths, seeds or options."
        )
    return found


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


def _listed(value: Any, kind: type) -> bool:
    right = isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
    return right and 0 < len(set(value)) == len(value)
