"""Read maps, tokens x slots, before and after updates of the bank while the model answers.

Source: LM2 (arXiv 2502.06049), the figures of cross-attention before and after test-time updates. The paper leaves open
with which queries its maps are drawn. Here they are those that the prompt's tokens had when they were read, for both
maps: what differs is the bank alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.state import State
from .captures import Stretch, capture, stream_of
from .reports import require


@dataclass(frozen=True)
class ReadMaps:
    """ids: (T,) of the prompt. before, after: by block, (T, N) float32, a token's weights sum to 1. further: what was
    read after the prompt. updates: commits since the state of `before`, the prompt's own among them."""

    ids: Tensor
    before: Mapping[int, Tensor]
    after: Mapping[int, Tensor]
    further: tuple[int, ...]
    updates: int


def read_maps(
    source: Any, prompt: Sequence[int] | Tensor, *, updates: int = 1, further: Sequence[int] | None = None
) -> ReadMaps:
    """How the prompt's tokens read the bank as it was before any of them was written, and as it is after `updates`
    commits behind the prompt.

    Args:
        source: an attached model, for a new stream, or a stream at a commit, which reads on. prompt: ids.
        updates: commits behind the prompt; with LM2's update_every = 1 one for each token, as in the paper.
        further: ids that are read for them; None for those that the model says, greedily.

    Raises:
        UnsupportedError: the memory has no slots that tokens read. InputError: too few further tokens.
    """
    stream = stream_of(source)
    require(stream.base.memory, "read_maps")
    ids = torch.as_tensor(prompt).flatten().cpu()
    if updates < 1:
        raise InputError(f"updates = {updates}; expected at least 1.")
    every, first = stream.cache.layout.every, stream.state
    with capture(stream, keep=True) as captured:
        stream.feed(ids)
    needed = updates * every - int(stream.cache.open) % every
    if further is None:
        said = stream.generate(return_ids=True, max_new_tokens=needed, min_new_tokens=needed, do_sample=False)
    else:
        said = list(further)
        if len(said) < needed:
            raise InputError(f"{updates} updates take {needed} tokens behind this prompt; got {len(said)}.")
        said = said[:needed]
        stream.feed(said)
    stretches = captured.stretches
    return ReadMaps(
        ids, reads_of(stream.base.memory, stretches, first), reads_of(stream.base.memory, stretches, stream.state),
        tuple(said), len(captured.commits) + updates,
    )  # fmt: skip


def reads_of(memory: Any, stretches: Sequence[Stretch], state: State) -> dict[int, Tensor]:
    """By block, the weights (T, N) with which the tokens of captured stretches would read another state."""
    with torch.no_grad():
        uses = [memory.slot_use(state, one.segment) for one in stretches]
    return {i: torch.cat([use[i].read[0].float().cpu() for use in uses]) for i in uses[0]} if uses else {}
