"""Checkpoints: the transformers Trainer's, made whole or not at all, with the position in the data beside them.

A checkpoint is written to a folder beside the others, flushed to disk, and renamed. What an interrupted save left is
never read and is removed at the next start. To the Trainer's files (model, optimiser, schedule, random numbers, its own
state) come `progress.json` (what a run must be to resume, the samples given out, the sizes of the files), the states
of stateful rows, and under PEFT the memory's weights. Nothing is unpickled: the Trainer's .pt and .pth files are read
with `weights_only`, and its pickled arguments are left out.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..core.errors import ConfigError, FileFormatError, InputError, StateError, TrainingError
from ..core.files import flush_folder, read_file, write_file
from ..hosts import base_model
from ..hosts.saving import ADAPTER, describe
from .resuming import check_identity, identity, samples_of_a_step

PROGRESS, STREAMS = "progress.json", "streams-{}.safetensors"
VERSION = 1
_STAGING, _REMOVED, _NAME = ".saving", ".removed-", re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    found = [(int(m[1]), p) for p in Path(folder).glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def read_progress(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """What `progress.json` says.

    Raises:
        FileFormatError: the folder is no checkpoint of a `MemoryTrainer`, incomplete, or of a newer release.
    """
    checkpoint = Path(checkpoint)
    try:
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        version, files = int(progress["version"]), dict(progress["files"])
    except FileNotFoundError as error:
        raise FileFormatError(f"{checkpoint} has no {PROGRESS}; expected a checkpoint of MemoryTrainer.") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{checkpoint / PROGRESS} is damaged ({error}); resume from another one.") from error
    if version > VERSION:
        raise FileFormatError(f"{checkpoint} has version {version}, newer than {VERSION}; upgrade mnemic to read it.")
    for name, size in files.items():
        found = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        if found != size:
            held = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
            raise FileFormatError(f"{checkpoint / name} {held}; resume from another checkpoint.")
    return progress


def remove_unfinished(folder: Path) -> None:
    """What interrupted saves and removals left."""
    for path in [folder / _STAGING, *folder.glob(f"{_REMOVED}*")]:
        if path.is_dir():
            shutil.rmtree(path)


class Resumable(Trainer):
    """A Trainer whose checkpoints survive `kill -9` and give the same run as without.

    identity: what else must be the same to resume, such as the tokenizer; values as JSON.
    """

    identity: dict[str, Any]
    truncation: Any = None
    memory_learning_rate: float | None = None
    memory_weight_decay: float | None = None
    stateful: bool = False

    def __init__(self, *args: Any, identity: dict[str, Any] | None = None, **kwargs: Any):
        self.identity = dict(identity or {})
        self._staging = False
        self._progress: dict[str, Any] = {}
        self._identity: dict[str, Any] = {}
        self._positioned, self._waiting = False, None
        super().__init__(*args, **kwargs)
        self.add_callback(_Epochs(self))

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _STAGING) if self._staging else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Raises `TrainingError` before anything is written where a weight is not finite."""
        for name, parameter in base_model(self.model).named_parameters():
            mine = parameter.detach()
            mine = mine.to_local() if hasattr(mine, "to_local") else mine
            if not bool(torch.isfinite(mine).all()):
                raise TrainingError(
                    f"{name} is not finite after step {self.state.global_step}, so no checkpoint was written over the "
                    "last good one. Lower the learning rate or clip gradients (max_grad_norm), and resume."
                )
        folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        final = folder / f"checkpoint-{step}"
        losses: Any = self.accelerator.gather(self._tr_loss.detach().reshape(1))
        mean = losses.mean().item()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        staged = folder / _STAGING / final.name
        stream = self.stream_state()
        if stream:
            write_file(staged / STREAMS.format(self.args.process_index), "streams", {}, stream)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and (best == final or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(staged / "trainer_state.json"))
            (staged / "training_args.bin").unlink(missing_ok=True)
            self._write_progress(staged, mean, bool(stream))
            _move(staged, final)
            (folder / _STAGING).rmdir()
            self._keep(folder)
        self.accelerator.wait_for_everyone()

    def _write_progress(self, staged: Path, loss: float, streams: bool) -> None:
        files = {str(p.relative_to(staged)): p.stat().st_size for p in sorted(staged.rglob("*")) if p.is_file()}
        progress = {
            "version": VERSION,
            "identity": self._identity,
            "world_size": self.args.world_size,
            "streams": streams,
            "data": self._position(),
            "whole": not self.args.save_only_model,
            "loss": [loss, self._globalstep_last_logged],
            "log": self.log_state(),
            "files": files,
        }
        (staged / PROGRESS).write_text(json.dumps(progress, indent=1), encoding="utf-8")

    def _position(self) -> dict[str, Any] | None:
        if not _has_position(self.train_dataset):
            return None
        data: Any = self.train_dataset
        return {**data.state_dict(), "samples": self.state.global_step * samples_of_a_step(self)}

    def _keep(self, folder: Path) -> None:
        """The last `save_total_limit` checkpoints, and the best."""
        limit, found = self.args.save_total_limit, checkpoints(folder)
        best = None if self.state.best_model_checkpoint is None else Path(self.state.best_model_checkpoint).name
        for path in found[:-limit] if limit else ():
            if path.name != best:
                # Renamed first: a half-removed checkpoint must not look like one.
                removed = folder / f"{_REMOVED}{path.name}"
                path.rename(removed)
                shutil.rmtree(removed)

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        base = base_model(self.model)
        # PEFT saves what is its own only.
        if self.args.should_save and base is not self.model:
            write_file(
                Path(output_dir or str(self.args.output_dir)) / ADAPTER,
                "adapter",
                describe(base),
                dict(base.memory.state_dict()),
            )

    # Resuming

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; True resumes from the last complete checkpoint.

        Raises:
            InputError: there is no checkpoint. FileFormatError: it is damaged. ConfigError: it is of another run.
            DataError: of other data.
        """
        folder = Path(str(self.args.output_dir))
        if self.args.should_save:
            remove_unfinished(folder)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            found = checkpoints(folder)
            if not found:
                raise InputError(f"{folder} has no complete checkpoint to resume from; start the run without resuming.")
            resume_from_checkpoint = found[-1]
        self._progress, self._positioned, self._waiting = {}, False, None
        # Now, before an engine wraps or casts the parameters.
        self._identity = identity(self)
        if resume_from_checkpoint:
            self._prepare(Path(resume_from_checkpoint))
            resume_from_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare(self, checkpoint: Path) -> None:
        self._progress = progress = read_progress(checkpoint)
        check_identity(checkpoint, progress["identity"], self._identity)
        if not progress["whole"]:
            raise ConfigError(f"{checkpoint} holds the model only (save_only_model): load it, there is no resuming.")
        if progress["streams"] and progress["world_size"] != self.args.world_size:
            raise ConfigError(
                f"{checkpoint} holds the states of stateful rows of {progress['world_size']} processes; this run has "
                f"{self.args.world_size}. Resume with as many processes."
            )
        self._positioned = progress["data"] is not None
        if self._positioned:
            data: Any = self.train_dataset
            data.load_state_dict(progress["data"])

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, steps = super()._init_training_state(*args, **kwargs)
        # The data begin where they have to: there is nothing to skip.
        return (0, 0) if self._positioned else (epochs, steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Killed after its last step: the Trainer would look at the count only after one more.
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._positioned:
            # Opening the data draws a random number: only after the first batch are we where the run was.
            self._waiting = checkpoint
        else:
            self._go_on(checkpoint)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get_batch_samples(*args, **kwargs)
        if self._waiting is not None:
            self._waiting = self._go_on(self._waiting)
        return found

    def _go_on(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self._progress:
            return
        total, logged = self._progress["loss"]
        self._tr_loss = torch.full_like(self._tr_loss, total)
        self._globalstep_last_logged = logged
        self.load_log_state(self._progress["log"])
        if self._progress["streams"]:
            path = Path(checkpoint) / STREAMS.format(self.args.process_index)
            self.load_stream_state(read_file(path, "streams")[1])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        base = base_model(self.model)
        if base is not self.model:
            base.memory.load_state_dict(read_file(Path(resume_from_checkpoint) / ADAPTER, "adapter")[1])

    # What subclasses keep between steps

    def stream_state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_stream_state(self, tensors: dict[str, torch.Tensor]) -> None:
        raise StateError(f"{type(self).__name__} keeps no states of stateful rows; resume with MemoryTrainer.")

    def log_state(self) -> dict[str, float]:
        """What waits to be logged."""
        return {}

    def load_log_state(self, waiting: dict[str, float]) -> None:
        pass


class _Epochs(TrainerCallback):
    """Epochs count from the beginning of the run, also where the data were gone on with."""

    def __init__(self, trainer: Resumable):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._positioned:
            state.epoch = state.global_step / state.max_steps


def _has_position(data: Any) -> bool:
    return isinstance(data, torch.utils.data.IterableDataset) and hasattr(data, "fingerprint")


def _move(staged: Path, final: Path) -> None:
    """Flush everything to disk, then put it in place in one step."""
    for path in [*staged.rglob("*"), staged]:
        if path.is_dir():
            flush_folder(path)
        else:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if final.exists():
        removed = final.parent / f"{_REMOVED}{final.name}"
        final.rename(removed)
        os.rename(staged, final)
        shutil.rmtree(removed)
    else:
        os.rename(staged, final)
    flush_folder(final.parent)
