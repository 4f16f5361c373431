"""Trainer: the transformers Trainer, told what a memory needs.

One sample is one document: its segments are read one after another, and gradients reach back through the state as
far as `truncation` says. Everything else (loop, schedules, logging, checkpoints, distribution) is transformers'.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, Trainer

from ..core.errors import ConfigError, HostError
from ..core.truncation import Truncation
from ..hosts import base_model, is_attached
from .optimizer import regroup


class LossProgress(ProgressCallback):
    """The Trainer's progress bar with the loss beside it, instead of a line for every entry of the log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


class MemoryTrainer(Trainer):
    """`transformers.Trainer` for a model with memory.

    Args:
        truncation: where gradients through the state stop; None for nowhere within a sample.
        memory_learning_rate: learning rate of the memory's parameters; None for the same as the host's. Parts that
            need another one have it (`Memory.optimizer_groups`), unless an optimiser is given.
        log_memory: log the memory's diagnostics (gates, slot entropy, ...) with the loss.

    Raises:
        HostError: the model has no memory. ConfigError: nothing of the memory or host would be trained.
    """

    def __init__(
        self,
        model: Any,
        *args: Any,
        truncation: Truncation | None = None,
        memory_learning_rate: float | None = None,
        log_memory: bool = False,
        **kwargs: Any,
    ):
        if not is_attached(model):
            raise HostError(f"{type(model).__name__} has no memory; attach one first (the baseline is 'none').")
        parameters = list(base_model(model).memory.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            raise ConfigError(
                "All parameters of the memory are frozen. After peft.get_peft_model use mnemic.add_lora instead, which "
                "keeps the memory trained; or set requires_grad on what you mean to train."
            )
        super().__init__(model, *args, **kwargs)
        self.truncation, self.memory_learning_rate, self.log_memory = truncation, memory_learning_rate, log_memory
        self._diagnostics: dict[str, Tensor] = {}
        self._grouped = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        due = self.log_memory and model.training and self.state.global_step % self.args.logging_steps == 0
        inputs = {**inputs, "truncation": self.truncation, "use_cache": False, "memory_diagnostics": due}
        return_outputs = kwargs.pop("return_outputs", args[0] if args else False)
        loss, outputs = super().compute_loss(model, inputs, True, *args[1:], **kwargs)
        if due:
            self._diagnostics = getattr(outputs, "memory_diagnostics", None) or {}
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._diagnostics:
            logs = {**logs, **{f"memory/{name}": round(float(v), 4) for name, v in self._diagnostics.items()}}
            self._diagnostics = {}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if new or (self.memory_learning_rate is not None and not self._grouped):
            regroup(optimizer, base_model(self.model).memory, self.memory_learning_rate)
            self._grouped = True
        return optimizer
