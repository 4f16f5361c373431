"""Budget: where the memory of a training run goes, counted and measured.

Weights, gradients and optimiser states are counted from the parameters and are exact. Saved activations are measured
by running one batch forward: what autograd keeps for the backward pass, whatever savers are on. The allocator's
fragments and short-lived buffers are in neither; on a GPU, `torch.cuda.max_memory_allocated` has them.

Source: survey of memory-efficient training (2025, arXiv 2501.11847).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError

# Bytes that an optimiser keeps for each trained number, per byte of the number or in all.
_STATES: dict[str, Callable[[Tensor], int]] = {
    "adamw": lambda p: 2 * p.nbytes,
    "sgd": lambda p: 0,
    "momentum": lambda p: p.nbytes,
}


@dataclass
class SavedBytes:
    """Bytes that autograd keeps. Tensors that share storage count once; parameters not at all. `kept` holds the
    storages of what was seen, so that none is counted twice."""

    total: int = 0
    kept: dict[int, Any] = field(default_factory=dict)


@contextmanager
def saved_bytes(parameters: tuple[nn.Parameter, ...] = ()) -> Iterator[SavedBytes]:
    """Count what the operations inside keep for their backward pass; `parameters` are not counted.

    Counts whole storages: a view keeps all of the tensor that it is a view of.
    """
    found, own = SavedBytes(), {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if not isinstance(tensor, nn.Parameter) and place and place not in own and place not in found.kept:
            # Held as long as the count goes on: a place in memory must not be given out again.
            found.kept[place] = storage
            found.total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.kept.clear()


@dataclass(frozen=True)
class Budget:
    """Bytes on one process. activations: 0 where none were measured."""

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(
    model: nn.Module,
    optimizer: str = "adamw",
    *,
    processes: int = 1,
    step: Callable[[], Any] | None = None,
) -> Budget:
    """Bytes that training `model` needs.

    Args:
        optimizer: "adamw" (two moments in the dtype of the weights), "momentum" or "sgd". 8-bit optimisers keep about a
            quarter of "adamw" in float32.
        processes: over which weights, gradients and states are sharded (FSDP2); 1 for one process, and for DDP.
        step: makes one forward pass of a usual batch, with gradients; what it keeps is the activations. None to leave
            them out.

    Raises:
        ConfigError: an optimiser or a number of processes that is not known.
    """
    if optimizer not in _STATES or processes < 1:
        raise ConfigError(
            f"optimizer = {optimizer!r}, processes = {processes}; expected one of {', '.join(_STATES)} and at least 1."
        )
    # Tied weights are one parameter; what is frozen has neither gradient nor state.
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    kept = 0
    if step is not None:
        with saved_bytes(tuple(parameters)) as found, torch.enable_grad():
            # The graph must live until the count is read.
            output = step()
            kept = found.total
            del output
    return Budget(
        weights=_share(parameters, lambda p: p.nbytes, processes),
        gradients=_share(trained, lambda p: p.nbytes, processes),
        optimizer=_share(trained, _STATES[optimizer], processes),
        activations=kept,
    )


def _share(parameters: list[nn.Parameter], size: Callable[[Tensor], int], processes: int) -> int:
    """The largest share: FSDP2 cuts every parameter along its first dimension, rounding up."""
    total = 0
    for parameter in parameters:
        length = parameter.shape[0] if parameter.dim() else 1
        total += size(parameter) * -(-length // processes) // max(length, 1)
    return total
