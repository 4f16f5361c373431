"""Guards: a loss that is no number, memory that runs out, and signals end a run with the last checkpoint intact."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..core.errors import TrainingError
from ..core.files import write_file
from ..hosts import base_model
from ..hosts.anatomy import examine
from .checkpoints import Resumable, checkpoints


class Guarded(Resumable):
    """A Trainer that stops, and says why, where going on would spoil the run.

    Raises:
        TrainingError: from `train`: a loss or gradient that is not finite, or no memory left.
    """

    replay: bool = False
    chunked_loss: Any = None
    _streams: Any = None
    _shape: tuple[int, ...] | None = None
    _batch: dict[str, Any]

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        before = {key: stream.kept for key, stream in (self._streams or {}).items()}
        self._shape, self._batch = tuple(inputs["input_ids"].shape) if "input_ids" in inputs else None, inputs
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not bool(torch.isfinite(loss)):
            for key, kept in before.items():
                self._streams[key].kept = kept
            where = self._first_not_finite(model, inputs)
            self._refuse(f"The loss is {float(loss)}", where)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        # With a scaler, such steps are skipped and the scale is lowered.
        if norm is not None and getattr(self.accelerator, "scaler", None) is None and not bool(torch.isfinite(norm)):
            self._refuse(f"The norm of the gradients is {float(norm)}", "the loss is finite: it arose going backward")
        return norm

    def _refuse(self, what: str, where: str) -> None:
        step, folder = self.state.global_step + 1, Path(str(self.args.output_dir))
        tensors = {name: t for name, t in self._batch.items() if isinstance(t, Tensor)}
        path = folder / f"failed-step-{step}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, "failed step", {"step": step, "what": what, "where": where}, tensors)
        raise TrainingError(
            f"{what} in step {step}; {where}. The weights were not updated; the batch is in {path}. {_last(folder)} "
            "Lower the learning rate, clip gradients (max_grad_norm), or look at the batch."
        )

    def _first_not_finite(self, model: Any, inputs: dict[str, Any]) -> str:
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and not bool((labels[:, 1:] != -100).any()):
            return "no token of the batch carries a loss"
        with watched(base_model(self.model)) as found:
            self.compute_loss(model, self._prepare_inputs(inputs))
        return found.said()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise TrainingError(self._knobs()) from error

    def _knobs(self) -> str:
        args, step = self.args, self.state.global_step + 1
        shape = "" if self._shape is None else f", with a batch of {' x '.join(map(str, self._shape))} tokens"
        knobs = [
            f"a smaller batch with more accumulation (now {args.per_device_train_batch_size} samples x "
            f"{args.gradient_accumulation_steps})",
            "fewer segments a sample",
        ]
        if not self.replay:
            knobs.append("replay=True (activations of one segment only)")
        if self.truncation is None and not self.replay:
            knobs.append("truncation")
        # The name of before 5.23 and the one since.
        if not any(getattr(args, f"{kind}_checkpointing", False) for kind in ("gradient", "activation")):
            knobs.append("activation checkpointing")
        if self.chunked_loss is None:
            knobs.append("chunked_loss")
        return (
            f"Out of memory in step {step}{shape}, on {args.device}. What needs less: {'; '.join(knobs)}. "
            f"{_last(Path(str(args.output_dir)))}"
        )


def out_of_memory(error: BaseException) -> bool:
    """Of the device or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _last(folder: Path) -> str:
    found = checkpoints(folder)
    return f"The last checkpoint is {found[-1]}." if found else "There is no checkpoint yet."


class watched:
    """While it is open: which module of a host first gives an output that is not finite, in which block and segment."""

    def __init__(self, base: Any):
        self.layers = {id(layer): i for i, layer in enumerate(examine(base).layers)}
        self.base, self.module, self.block, self.segment = base, None, None, 0
        self._handles: list[Any] = []

    def __enter__(self) -> "watched":
        for name, module in self.base.named_modules():
            if module is not self.base:
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        calls = 0

        def look(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            if self.block is not None or _finite(output):
                return
            self.module = self.module or name
            if id(module) in self.layers:
                self.block, self.segment = self.layers[id(module)], calls - 1

        return look

    def said(self) -> str:
        if self.module is None:
            return "every module's output is finite in a second forward pass, so it arose in the loss or by dropout"
        if self.block is None:
            return f"the first output that is not finite is that of {self.module}, outside all blocks"
        where = f"{self.block} (in {self.module}), in segment {self.segment}"
        return f"the first block whose output is not finite is {where}"


def _finite(output: Any) -> bool:
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    if isinstance(output, dict):
        return all(_finite(value) for value in output.values())
    return not isinstance(output, tuple | list) or all(_finite(value) for value in output)


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT let the step end, save, and end the training; a second one does what it would without this.

    stopped: the name of the signal that ended the training, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.stopped: str | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = None
        # Python takes signals in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in self.SIGNALS}

    def _take(self, number: int, frame: Any) -> None:
        self.stopped = signal.Signals(number).name
        self.put_back()

    def put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if _anyone(self.stopped is not None, args):
            self.stopped = self.stopped or "a signal"
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.put_back()


def _anyone(stopped: bool, args: Any) -> bool:
    """Whether any process was told to stop: all end after the same step."""
    if args.world_size == 1:
        return stopped
    told = torch.tensor(int(stopped), device=args.device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told)
