"""Trained runs: a folder that was written by a run, or by `mnemic.save`, opened to be measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.errors import DataError
from ..hosts import base_model, load, parameter_report
from ..hosts.saving import ADAPTER, HEADER
from ..training.tokenizer import find_tokenizer
from .experiment import LOG, SETTINGS, Experiment
from .token_tasks import TASKS

CARRIED = 8


@dataclass(frozen=True)
class Trained:
    """A model with its tokenizer, and how it was trained where the folder says it."""

    folder: Path
    model: Any
    tokenizer: Any
    experiment: Experiment | None

    @property
    def unit(self) -> int:
        """Tokens in which lengths in segments are counted."""
        return base_model(self.model).mnemic.layout.segment if self.experiment is None else self.experiment.counted

    @property
    def sizes(self) -> Mapping[str, Mapping[str, Any]]:
        """Sizes of the token-level task that the model was trained on, by the names of the tasks that have them."""
        if self.experiment is None or not self.experiment.task_options:
            return {}
        trained = self.experiment.task
        names = [f"chomsky_{n}" for n in self.experiment.tasks] if trained == "chomsky" else [trained]
        # remember and rewrite are one task with the same sizes.
        names += [n for n, kind in TASKS.items() if trained in TASKS and kind is TASKS[trained] and n != trained]
        return dict.fromkeys(names, self.experiment.task_options)

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model was trained on, as the catalog names it."""
        if self.experiment is None:
            return ()
        trained = self.experiment.task
        if trained == "chomsky":
            return tuple(f"chomsky_{name}" for name in self.experiment.tasks)
        return self.experiment.tasks if self.experiment.on_stories else (trained,)

    def description(self, name: str) -> dict[str, Any]:
        """For reports: memory, parameters, tokens trained on, and the bytes that a row carries after some segments."""
        memory, log = base_model(self.model).memory, self.folder / LOG
        trained = json.loads(log.read_text(encoding="utf-8"))["summary"]["tokens"] if log.is_file() else None
        return {
            "model": name,
            "memory": memory.name if self.experiment is None else self.experiment.memory,
            "parameters": sum(part["total"] for part in parameter_report(self.model).values()),
            "state_bytes": carried_bytes(self.model),
            "tokens_trained": trained,
            "note": None,
        }


@torch.no_grad()
def carried_bytes(model: Any) -> int:
    """Bytes that outlive a call of one row: state, open segment and caches, after `CARRIED` segments."""
    base = base_model(model)
    return stream_bytes(base.stream().feed(torch.zeros(1, CARRIED * base.mnemic.layout.segment, dtype=torch.long)))


def stream_bytes(stream: Any) -> int:
    """Bytes that a stream carries to the next call, without the last logits."""
    logits = stream.cache.last_logits
    return stream.state_bytes - (0 if logits is None else logits.nbytes)


def open_run(folder: str | Path) -> Trained:
    """Load a run onto the GPU if there is one.

    Raises:
        DataError: no folder, or none with a model that mnemic saved. InputError: no tokenizer.
    """
    folder = Path(folder)
    check_folder(folder)
    experiment = Experiment.read(folder / SETTINGS) if (folder / SETTINGS).is_file() else None
    model = load(folder).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    host = getattr(base_model(model).config, "_name_or_path", None)
    return Trained(folder, model, find_tokenizer(folder, host), experiment)


def check_folder(folder: Path) -> None:
    """Raises `DataError` unless `folder` holds a model that mnemic saved."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; expected a folder written by mnemic train or mnemic.save.")
    if not any((folder / name).is_file() for name in (ADAPTER, HEADER)):
        raise DataError(
            f"{folder} holds no model with memory (neither {HEADER} nor {ADAPTER}); expected a folder written by "
            "mnemic train or mnemic.save. A run that was interrupted has none."
        )
