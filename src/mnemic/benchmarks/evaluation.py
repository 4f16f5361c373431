"""Evaluations: tasks x lengths x seeds, answered by a trained model batch by batch into a log.

The log is what every report is made from, and a batch is the unit of resuming: batches are always cut at the same
samples, so a run that was killed any number of times answers the same batches, and its scores equal those of a run that
never was, byte for byte. Seconds and peak memory are in the log too; they are of the process that measured them.
"""

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any, get_type_hints

import torch
import transformers
from rich.progress import Progress

from .. import __version__
from ..core.errors import ConfigError, InputError
from ..core.memory import check_option, option
from ..hosts import base_model
from .babilong import data_folder
from .catalog import entry, open_cell
from .cell import Cell
from .log import Log
from .usage import peak_memory, reset_peak_memory


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured.

    Raises:
        ConfigError: settings that cannot be; names are checked when the cells are opened.
    """

    tasks: tuple[str, ...] = option(("qa1",), "tasks of the catalog")
    lengths: tuple[str, ...] | None = option(None, "lengths of every task; None for those of the catalog")
    seeds: tuple[int, ...] = option((1,), "seeds of the samples")
    samples: int = option(100, "samples of each task, length and seed", minimum=1)
    batch_size: int = option(16, "samples read side by side", minimum=1)
    data: str | None = option(None, "folder with data; None for $MNEMIC_DATA")
    split: str = option("test", "which stories and background: test, validation or train")
    prompt: str = option("whole", "what the model reads of a context: whole, or a baseline such as truncated:512")
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "sizes of the tasks other than those trained on; a list: each of these in turn"},
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            check_option("evaluation", f, hints[f.name], getattr(self, f.name))
        if not self.tasks or not self.seeds or self.lengths == ():
            raise ConfigError("An evaluation needs at least one task, one length and one seed.")
        if [] in self.options.values():
            raise ConfigError(f"options = {self.options}: an empty list of sizes measures nothing.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        known = {f.name for f in dataclasses.fields(cls)}
        ConfigError.check_names("setting of an evaluation", values, known)
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)

    def cells(self, tokenizer: Any, segment: int, options: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
        """Every task at every length with every seed.

        Args:
            segment: tokens in which lengths in segments are counted.
            options: sizes of tasks, by the name of the task: those that the model was trained with.

        Raises:
            UnknownNameError, ConfigError, DataError, InputError: as `open_cell`.
        """
        found: list[Any] = []
        for task, own, length, seed in self._measured():
            cell: Any = open_cell(
                task, length, seed, tokenizer=tokenizer, segment=segment, options={**options.get(task, {}), **own},
                data=self.data, split=self.split, prompt=self.prompt,
            )  # fmt: skip
            found.append(dataclasses.replace(cell, task=_label(task, own)) if own else cell)
        return found

    def names(self) -> list[tuple[str, str, int]]:
        """(task as reports name it, length, seed) of every cell.

        Raises:
            UnknownNameError: no such task. UnsupportedError: one that cannot be scored here.
        """
        return [(_label(task, own), length, seed) for task, own, length, seed in self._measured()]

    def _measured(self) -> Iterator[tuple[str, dict[str, Any], str, int]]:
        lists = [value if isinstance(value, list) else [value] for value in self.options.values()]
        for task in self.tasks:
            for sizes in product(*lists):
                for length in self.lengths or entry(task).lengths:
                    for seed in self.seeds:
                        yield task, dict(zip(self.options, sizes, strict=True)), length, seed

    def identity(self, model: Any) -> dict[str, Any]:
        """Everything that the records depend on, for a log; no path is in it."""
        base = base_model(model)
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "data"}
        if not self.options:
            del settings["options"]
        return {
            **settings,
            "released_data": data_folder(self.data) is not None,
            "model": _digest(base),
            "device": base.device.type,
            "versions": {
                "mnemic": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def _label(task: str, options: Mapping[str, Any]) -> str:
    """How reports name a task with sizes other than those trained on."""
    return " ".join([task, *(f"{name}={value}" for name, value in options.items())])


def _digest(base: Any) -> str:
    """Of the memory's settings and of every weight, adapters too, which `hosts.fingerprint` leaves out."""
    digest = hashlib.sha256(json.dumps([base.memory.config.to_dict(), base.mnemic.layout.segment]).encode())
    for name, weight in sorted(base.state_dict().items()):
        digest.update(f"{name}|{weight.dtype}|{tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def evaluate(
    model: Any, cells: Sequence[Cell], evaluation: Evaluation, path: str | Path, *, progress: bool = False
) -> None:
    """Answer the samples of every cell, those that the log at `path` has excepted.

    Args:
        model: an attached model, on its device. cells: of `evaluation`, for this model.

    Raises:
        InputError: a cell without samples; the log is of something else, or cannot be written.
        FileFormatError: the log is damaged.
    """
    base = base_model(model)
    base.eval()
    count, size = evaluation.samples, evaluation.batch_size
    with Log(path, evaluation.identity(model)) as log, Progress(transient=True, disable=not progress) as bar:
        answered = {(line["task"], line["length"], line["seed"], line["batch"]) for line in log.lines}
        task = bar.add_task("", total=len(cells) * count)
        for number, cell in enumerate(cells):
            bar.update(task, description=f"{cell.task} {cell.length}")
            for batch, samples in _batches(cell, count, size):
                name = {"task": cell.task, "length": cell.length, "seed": cell.seed, "batch": batch}
                if tuple(name.values()) not in answered:
                    log.append({**name, "chance": cell.chance, **_answer(base, cell, samples)})
                bar.update(task, completed=number * count + batch * size + len(samples))


def _batches(cell: Cell, count: int, size: int) -> Iterator[tuple[int, list[Any]]]:
    samples, batch = islice(cell.samples(), count), 0
    while group := list(islice(samples, size)):
        yield batch, group
        batch += 1
    if not batch:
        raise InputError(f"{cell.task} at length {cell.length} has no samples.")


def _answer(model: Any, cell: Cell, samples: list[Any]) -> dict[str, Any]:
    reset_peak_memory(model.device)
    started = time.perf_counter()
    with torch.no_grad():
        records = cell.answer(model, samples)
    return {
        "records": records,
        "seconds": round(time.perf_counter() - started, 4),
        "peak_bytes": peak_memory(model.device),
    }
