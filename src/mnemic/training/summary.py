"""What a run tells: speed, floating-point utilisation, peak memory, curves, and the memory's diagnostics by block.

Operations are counted by torch's FlopCounterMode over one more forward and backward pass when the training is over
(matrix products, convolutions, attention); recomputed activations count twice. Not over a step of the training: under
the counter gradients are rounded otherwise, and a resumed run would differ from an uninterrupted one. Utilisation is
operations a second over the rate of one large matrix product, measured on the same device, with the same number of
threads and in the same precision.
"""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..core.errors import MissingExtraError
from ..core.files import replace_atomically
from .trainer import MemoryTrainer

SUMMARY, CURVES = "summary.json", "curves.png"
_BLOCK = re.compile(r"memory/block(\d+)/(.+)")


class MeasuredTrainer(MemoryTrainer):
    """A `MemoryTrainer` that measures itself; every line of its log has the tokens a second since the line before.

    The first batch is not timed. Tokens are those of this process, without padding.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.tokens = self.first_tokens = self._line_tokens = 0
        self._began = self._line = 0.0
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.seconds = time.perf_counter() - self._began if self._began else 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self.first_tokens:
            self.first_tokens = _tokens(inputs)
            self._began = self._line = time.perf_counter()
        else:
            self.tokens += _tokens(inputs)
        return loss

    def operations_per_token(self) -> float | None:
        """Counted over the last batch; None before there was one. Leaves no gradients."""
        if not self.first_tokens:
            return None
        model: Any = self.model_wrapped
        model.train()
        # Diagnostics are no part of training, and the counter fails on parameters that are read without gradients.
        logged, self.log_memory = self.log_memory, False
        try:
            with self.compute_loss_context_manager(), FlopCounterMode(display=False) as counter:
                loss = self.compute_loss(model, self._prepare_inputs(self._batch))
                self.accelerator.backward(loss)
        finally:
            self.log_memory = logged
        model.zero_grad()
        return counter.get_total_flops() / _tokens(self._batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.tokens > self._line_tokens:
            now = time.perf_counter()
            speed = (self.tokens - self._line_tokens) / max(now - self._line, 1e-9)
            logs = {**logs, "tokens_per_second": round(speed, 1)}
            self._line, self._line_tokens = now, self.tokens
        super().log(logs, *args, **kwargs)


def _tokens(inputs: dict[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else int(mask.sum())


def summarise(trainer: MeasuredTrainer) -> dict[str, Any]:
    """Everything that was measured, as JSON; what was not (a run of one step has no speed) is None."""
    device, history = trainer.args.device, trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    speed = trainer.tokens / trainer.seconds if trainer.tokens else None
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else torch.float32
    # Before operations are counted, which takes more memory.
    memory, each = peak_memory(device), trainer.operations_per_token()
    peak = peak_rate(device, dtype) if speed and each else None
    return {
        "steps": trainer.state.global_step,
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "seconds": round(trainer.seconds, 2),
        "tokens": trainer.tokens + trainer.first_tokens,
        "tokens_per_second": None if speed is None else round(speed, 1),
        "operations_per_token": None if each is None else round(each),
        "utilisation": None if not (peak and speed and each) else round(each * speed / peak, 4),
        "peak": {
            "operations_per_second": peak,
            "of": f"a matrix product in {str(dtype).removeprefix('torch.')}, measured on {device}, "
            f"{torch.get_num_threads()} threads",
        },
        "peak_memory_bytes": memory,
        "memory": block_diagnostics(history),
    }


def peak_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a large square matrix product: the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)
    times = []
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        times.append(time.perf_counter() - started)
    # The first one starts threads and libraries.
    return 2 * size**3 / min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: on CUDA what was allocated at most, elsewhere the process's largest resident size; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def block_diagnostics(history: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The last diagnostics of each block, {"0": {"gate_in": ...}}; those of no block under "all"."""
    found: dict[str, dict[str, float]] = {}
    for entry in history:
        for key, value in entry.items():
            if match := _BLOCK.fullmatch(key):
                found.setdefault(match[1], {})[match[2]] = value
            elif key.startswith("memory/"):
                found.setdefault("all", {})[key.removeprefix("memory/")] = value
    return found


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    text = json.dumps(summary, indent=1)
    replace_atomically(folder / SUMMARY, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def plot_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss, learning rate, tokens a second, and each diagnostic with a line a block.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(f"{path.name} needs matplotlib: pip install 'mnemic[plots]'.") from error
    panels: dict[str, list[tuple[str, str]]] = {
        key: [(key, "")] for key in ("loss", "learning_rate", "tokens_per_second")
    }  # fmt: skip
    for key in dict.fromkeys(key for entry in history for key in entry if key.startswith("memory/")):
        match = _BLOCK.fullmatch(key)
        title = match[2] if match else key.removeprefix("memory/")
        panels.setdefault(title, []).append((key, f"block {match[1]}" if match else ""))
    panels = {title: lines for title, lines in panels.items() if any(lines[0][0] in entry for entry in history)}
    columns = 3 if len(panels) > 3 else max(len(panels), 1)
    rows = max(math.ceil(len(panels) / columns), 1)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for key, label in lines:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker="." if len(points) < 30 else "")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        if lines[0][1]:
            axes.legend(fontsize=7)
    replace_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
