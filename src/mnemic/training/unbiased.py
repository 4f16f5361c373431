"""Unbiased truncated back-propagation for memories that are written segment by segment, each from its own segment.

The loss of segment t reads the memories m_1 .. m_{t-1} of all earlier segments, so the gradient is the sum over s < t
of dJ_t/dm_s dm_s/dtheta. Keeping every encoding's activations is too much; keeping the last few is biased. Here a
reservoir keeps those of `live` earlier segments, every one of the t - 1 with the same chance min(1, live / (t - 1)),
and what the loss of segment t says of the kept ones counts max(1, (t - 1) / live) times: the expectation is the whole.
Values never depend on what was kept, only gradients do.

An encoding may not read earlier memories: then m_s reaches the losses in ways that this sum does not have.

Source: UIO-LLMs (2024, arXiv 2406.18173).
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.state import State


def incremental_backward(
    segments: Sequence[Any],
    encode: Callable[[Any], State],
    loss: Callable[[Any, Sequence[State]], Tensor],
    *,
    live: int,
    seed: int,
    weighted: bool = True,
) -> Tensor:
    """Add an estimate of the gradient of the sum of all losses to `.grad`; at most `live` + 1 encodings have a graph.

    What the losses reach in other ways than through a memory has its exact gradient. With `live` at least the number
    of segments less one, all of it is exact.

    Args:
        segments: what is read, in order.
        encode: a segment -> its memory. It is called once for each segment but the last, without autograd for those
            that are not kept.
        loss: a segment and the memories of all before it -> a scalar.
        live: encodings S that keep their graph.
        seed: of the reservoir's draws.
        weighted: use the importance weights; without them late losses count too little.

    Returns: the sum of the losses, a detached scalar.

    Raises:
        ConfigError: live below 1. InputError: no segments.

    There is one backward call a segment: under DDP run all but the last within `no_sync`.
    """
    if live < 1:
        raise ConfigError(f"live = {live}, expected at least 1 encoding that keeps its graph.")
    if not segments:
        raise InputError("There are no segments to read; give at least one.")
    draws = random.Random(f"mnemic.unbiased|{seed}")
    memories: list[State] = []
    kept: list[_Kept] = []
    losses: list[Tensor] = []
    for earlier, segment in enumerate(segments):
        value = loss(segment, memories)
        if value.requires_grad:
            value.backward()
        for one in kept:
            one.collect(max(1.0, earlier / live) if weighted else 1.0)
        losses.append(value.detach())
        if earlier == len(segments) - 1:
            break
        # Algorithm R: after n memories each is kept with the chance live / n.
        place = len(kept) if len(kept) < live else draws.randrange(earlier + 1)
        with torch.set_grad_enabled(place < live):
            encoded = encode(segment)
        if place >= live:
            memories.append(encoded.detach())
            continue
        new = _Kept(encoded)
        memories.append(new.leaves)
        if place < len(kept):
            kept[place].flush()
            kept[place] = new
        else:
            kept.append(new)
    for one in kept:
        one.flush()
    return torch.stack(losses).sum()


class _Kept:
    """A memory whose encoding keeps its graph, and the gradients that the losses have left at it."""

    def __init__(self, encoded: State):
        self.encoded = encoded
        self.leaves = encoded.map(lambda t: t.detach().requires_grad_(t.requires_grad))
        self.gradients: dict[str, Tensor] = {}

    def collect(self, weight: float) -> None:
        for name, leaf in self.leaves.items():
            if leaf.grad is not None:
                new = leaf.grad * weight
                self.gradients[name] = self.gradients[name] + new if name in self.gradients else new
                leaf.grad = None

    def flush(self) -> None:
        """Carry what was collected to the parameters; from now on the memory is a value."""
        names = list(self.gradients)
        if names:
            torch.autograd.backward([self.encoded[n] for n in names], [self.gradients[n] for n in names])
        for leaf in self.leaves.values():
            leaf.requires_grad_(False)
