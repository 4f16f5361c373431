"""Stateful batches on the trainer's side: what a row's state is between two steps.

A batch comes with "reset" (B,) bool. Rows that are set begin a document, with a new state; the others go on from the
state that the step before left, detached: values reach across steps, gradients do not.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError, InputError, StateError, UnsupportedError
from ..core.state import State
from ..hosts import base_model


class StreamState:
    """The states of the rows of stateful batches between steps.

    Raises:
        UnsupportedError: a memory whose stream is more than its state.
    """

    def __init__(self, model: Any):
        check_stateful(model)
        self.kept: State | None = None

    def enter(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with what the model needs to go on: `memory_state` and `memory_reset` instead of "reset".

        Raises:
            InputError: a batch without "reset". StateError: rows that go on where no state is, or of another number.
        """
        rest = dict(inputs)
        reset = rest.pop("reset", None)
        if reset is None:
            raise InputError(
                "A stateful batch says which rows begin a document: 'reset', (B,) bool. Give MemoryTrainer a dataset "
                "such as StatefulRows, or leave out stateful=True."
            )
        if self.kept is None and not bool(reset.all()):
            raise StateError(
                "Rows of the batch go on from a state that is not there. Load it with load_stream_state, or start the "
                "data from its beginning."
            )
        if self.kept is not None and self.kept.batch_size not in (None, len(reset)):
            raise StateError(
                f"The batch has {len(reset)} rows, the state kept from the last one {self.kept.batch_size}."
            )
        return {**rest, "memory_state": self.kept, "memory_reset": reset}

    def leave(self, output: Any) -> None:
        """Keep the state that the model's output brings, detached."""
        self.kept = output.memory_state.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the state, (B, ...) each; none before the first step."""
        return {} if self.kept is None else dict(self.kept.clone())

    def load_state_dict(self, tensors: Mapping[str, Tensor], device: Any = None) -> None:
        self.kept = State({name: t.to(device) for name, t in tensors.items()}) if tensors else None


def streams_of(trainer: Any, model: Any) -> dict[bool, StreamState]:
    """The streams of a trainer: one of training (True), one of evaluation.

    Raises:
        UnsupportedError: a memory whose stream is more than its state, or sharded weights.
    """
    if trainer.is_fsdp_enabled:
        raise UnsupportedError(
            "Stateful batches do not go with FSDP: documents end at different segments, so one process would wait for "
            "weights in a segment that another does not read. Use DDP, with stateful batches, or samples of one length."
        )
    return {training: StreamState(model) for training in (True, False)}


def stream_of(streams: Mapping[bool, StreamState] | None, training: bool, inputs: Mapping[str, Any]) -> Any:
    """The stream that a batch belongs to: of training, of evaluation, or None for samples that begin anew.

    Raises:
        ConfigError: a stateful batch for a trainer that does not keep states.
    """
    if streams is None and "reset" in inputs:
        raise ConfigError(
            "The batch says 'reset', so its rows go on from step to step: set MemoryTrainer(stateful=True)."
        )
    return None if streams is None or not (training or "reset" in inputs) else streams[training]


def check_stateful(model: Any) -> None:
    """Raises `UnsupportedError` where a state alone does not say how a stream goes on."""
    base = base_model(model)
    memory, layout = base.memory, base.mnemic.layout
    reason = None
    if layout.continuous:
        reason = "reads without segments: what it remembers is in the cache too, with keys that grow or a window"
    elif layout.window or layout.sinks:
        reason = "keeps keys and values of earlier tokens in the cache, beside its state"
    elif not memory.constant_size:
        reason = "has a state that grows, so rows that begin at different times do not fit together"
    if reason is not None:
        raise UnsupportedError(
            f"Stateful batches: the memory {memory.name!r} {reason}. Train it on samples of several segments instead "
            "(stateful=False; CorpusSamples or TextExamples), where each sample begins anew."
        )
