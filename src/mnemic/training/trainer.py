"""Trainer: the transformers Trainer, told what a memory needs.

One sample is one document: its segments are read one after another, and gradients reach back through the state as
far as `truncation` says. Everything else (loop, schedules, logging, checkpoints, distribution) is transformers'.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback

from ..core.errors import ConfigError, HostError
from ..core.truncation import Truncation
from ..hosts import base_model, is_attached
from .chunked_loss import ChunkedLoss
from .distribution import Kept, check_sharding
from .guards import Guarded
from .optimizer import regroup
from .stateful import stream_of, streams_of


class LossProgress(ProgressCallback):
    """The Trainer's progress bar with the loss beside it, instead of a line for every entry of the log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


class MemoryTrainer(Guarded):
    """`transformers.Trainer` for a model with memory.

    Args:
        truncation: where gradients through the state stop; None for nowhere within a sample.
        replay: keep the activations of one segment only and run segments again in the backward pass; the gradients are
            the same, the forward pass runs twice.
        memory_learning_rate: learning rate of the memory's parameters; None for the same as the host's. Parts that
            need another one have it (`Memory.optimizer_groups`), unless an optimiser is given.
        memory_weight_decay: weight decay of the memory's matrices; None for the host's. Norms and biases have none.
        chunked_loss: take the loss over so many tokens at a time, so that the logits of a sample never exist together;
            None for all at once. The numbers are the same.
        log_memory: log the memory's diagnostics (gates, slot entropy, ...) with the loss.
        stateful: batches go on where the last one stopped, as their "reset" (B,) says; see `StatefulRows`.
        max_grad_value: clip every entry of the gradients to this size, after `max_grad_norm` of the arguments has
            clipped their norm; float("inf") there for this alone.

    Raises:
        HostError: the model has no memory. ConfigError: nothing of the memory or host would be trained.
    """

    def __init__(
        self,
        model: Any,
        *args: Any,
        truncation: Truncation | None = None,
        replay: bool = False,
        memory_learning_rate: float | None = None,
        memory_weight_decay: float | None = None,
        chunked_loss: int | None = None,
        log_memory: bool = False,
        stateful: bool = False,
        max_grad_value: float | None = None,
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
        self.replay, self.stateful, self.memory_weight_decay = replay, stateful, memory_weight_decay
        self.max_grad_value = max_grad_value
        if max_grad_value is not None and not (max_grad_value > 0 and self.args.max_grad_norm > 0):
            raise ConfigError(
                f"max_grad_value = {max_grad_value}, max_grad_norm = {self.args.max_grad_norm}: expected both above 0; "
                "max_grad_norm=float('inf') leaves norms as they are."
            )
        self.chunked_loss = None if chunked_loss is None else ChunkedLoss(model, chunked_loss)
        self._streams = streams_of(self, model) if stateful else None
        self._diagnostics: dict[str, Tensor] = {}
        self._grouped = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        due = self.log_memory and model.training and self.state.global_step % self.args.logging_steps == 0
        inputs = {**inputs, "truncation": self.truncation, "use_cache": False, "memory_diagnostics": due}
        if self.replay and model.training:
            inputs["replay"] = True
        stream = stream_of(self._streams, model.training, inputs)
        if stream is not None:
            inputs = stream.enter(inputs)
        return_outputs = kwargs.pop("return_outputs", args[0] if args else False)
        made = Kept()
        inputs["memory_sink"] = made.take
        loss, outputs = super().compute_loss(model, inputs, True, *args[1:], **kwargs)
        made.put_back(outputs)
        if stream is not None:
            stream.leave(outputs)
        if due:
            self._diagnostics = getattr(outputs, "memory_diagnostics", None) or {}
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # The backward pass as well: layers may run again in it.
        with nullcontext() if self.chunked_loss is None else self.chunked_loss.on():
            return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if self.max_grad_value is not None:
            torch.nn.utils.clip_grad_value_(model.parameters(), self.max_grad_value)
        return norm

    def create_accelerator_and_postprocess(self) -> None:
        given: Any = self.args.accelerator_config
        if given.dispatch_batches is None:
            # Every process reads its own share: batches of one length are not joined on the first and cut again.
            given.dispatch_batches = False
        if self.args.ddp_find_unused_parameters is None:
            # A sample of one segment writes nothing that is read: then what writes has no gradient.
            self.args.ddp_find_unused_parameters = True
        super().create_accelerator_and_postprocess()
        check_sharding(self)

    def log_state(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._diagnostics.items()}

    def load_log_state(self, waiting: dict[str, float]) -> None:
        self._diagnostics = {name: torch.tensor(value) for name, value in waiting.items()}

    def stream_state(self) -> dict[str, Tensor]:
        """With stateful batches: the state of this process's rows after the last step, (B, ...) each."""
        return {} if self._streams is None else self._streams[True].state_dict()

    def load_stream_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a `stream_state`; without stateful batches there is nothing to go on from."""
        if self._streams is not None:
            self._streams[True].load_state_dict(tensors, self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._diagnostics:
            logs = {**logs, **{f"memory/{name}": round(float(v), 4) for name, v in self._diagnostics.items()}}
            self._diagnostics = {}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        told = self.memory_learning_rate is not None or self.memory_weight_decay is not None
        if new or (told and not self._grouped):
            model: Any = self.model
            named, names = dict(model.named_parameters()), self.get_decay_parameter_names(model)
            decayed = {id(named[name]) for name in names if name in named}
            memory = base_model(self.model).memory
            regroup(optimizer, memory, self.memory_learning_rate, self.memory_weight_decay, decayed)
            self._grouped = True
        return optimizer
