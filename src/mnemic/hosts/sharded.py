"""Weights sharded over processes (FSDP2), and gradients that reach a layer through the memory.

FSDP2 gathers a layer's weights for its backward pass when the gradient of the layer's output arrives. What a memory
keeps of a segment without loss goes around that output: the gradient would meet weights that are not there. So the
step's output is made one of its sources, with a gradient of zero.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..core.step import Frame


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards parts of `model`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def tie(output: Tensor, frame: Frame) -> None:
    """Make `output`, what the host made last in this step, a source of all that the step left in `frame`."""
    if not (torch.is_grad_enabled() and output.requires_grad):
        return
    places: list[tuple[dict, Any]] = [
        (named, name)
        for named in (*frame.trace.values(), *frame.written_trace.values(), frame.left, frame.losses)
        for name, tensor in named.items()
        if tensor.requires_grad
    ]
    tensors = [named[name] for named, name in places]
    hidden = frame.hidden is not None and frame.hidden.requires_grad
    if hidden:
        assert frame.hidden is not None
        tensors.append(frame.hidden)
    if not tensors:
        return
    tied = list(_Tied.apply(output, *tensors))
    if hidden:
        frame.hidden = tied.pop()
    for (named, name), tensor in zip(places, tied, strict=True):
        named[name] = tensor


class _Tied(torch.autograd.Function):
    """(output, tensors...) -> the tensors; their gradients pass, that of `output` is zero."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(output.new_zeros(()).expand_as(output))
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*ctx.saved_tensors, *gradients)
