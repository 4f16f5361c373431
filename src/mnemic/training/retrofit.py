"""Retrofit: the stages in which a host learns to compress its cache with DMC (arXiv 2403.09636)."""

from typing import Any

from transformers import TrainerCallback

from ..core.errors import ConfigError
from ..hosts import base_model, is_attached
from ..memories.cache.dmc import DMC

# The deciding dimension is gone after this share of the first stage, and stays so for the rest of it.
_FADED = 0.8


class Retrofit(TrainerCallback):
    """Moves a DMC memory through its stages, by the trainer's steps.

    freeing: steps in which the deciding dimension leaves attention and nothing merges (the paper: 250). ramp: steps
    after them in which the compression asked for rises from 1 to the memory's `compression` (the paper: 6000 for 2 to
    4). Later steps train at full compression.

    Raises:
        ConfigError: at the start of training, a model whose memory is not dmc.
    """

    def __init__(self, ramp: int, freeing: int = 0):
        if ramp < 1 or freeing < 0:
            raise ConfigError(f"Retrofit: ramp = {ramp}, freeing = {freeing}; expected at least 1 and 0 steps.")
        self.ramp, self.freeing = ramp, freeing

    def apply(self, memory: DMC, step: int) -> None:
        """Put `memory` where it stands at step `step`, counted from 0."""
        if step < self.freeing:
            memory.schedule(max(0.0, 1 - step / (_FADED * self.freeing)), False, 0.0)
        else:
            memory.schedule(0.0, True, min(1.0, (step - self.freeing) / self.ramp))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        memory = base_model(model).memory if is_attached(model) else None
        if not isinstance(memory, DMC):
            raise ConfigError("Retrofit goes with the memory 'dmc'; attach it to the host that is trained.")
        self.apply(memory, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.apply(base_model(model).memory, state.global_step)
