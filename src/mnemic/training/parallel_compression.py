"""All segments of a text in one pass of the host, for CCM (2023, arXiv 2312.03414).

The recurrence runs the host once a segment. Here the <COMP> tokens of all segments stand behind the whole text, and a
mask says who would have met whom, for segments b and tokens i, j:

    i sees j   if j <= i in one segment: text, then the segment's <COMP> tokens
    concat     or j is <COMP> of one of the `capacity` segments before b(i)
    merge      or j is a column of Mem(b(i)), the average of the keys and values of <COMP> tokens before b(i)

With `recurrent` False only the last segment sees the memory: it is the one to train on.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.step import AttentionCall, Frame, Step
from ..hosts.attach import base_model, is_attached
from ..hosts.host import MemoryOutput
from ..hosts.layout import as_attention_mask
from ..memories.recurrent.ccm import CCM
from ..ops.rotary import rotate


@dataclass(frozen=True)
class Blocks:
    """The columns of one pass: text, then n <COMP> tokens of each segment that another one follows.

    block: (S,) which segment each belongs to. place: (S,) its place there, <COMP> tokens after T. text: number of text
    tokens; segment: T; number: n; count: segments that leave something.
    """

    block: Tensor
    place: Tensor
    text: int
    segment: int
    number: int
    count: int

    @classmethod
    def of(cls, tokens: int, segment: int, number: int, device: torch.device) -> "Blocks":
        count = (tokens - 1) // segment
        text, comp = torch.arange(tokens, device=device), torch.arange(count * number, device=device)
        block = torch.cat([text // segment, comp // number])
        place = torch.cat([text % segment, segment + comp % number])
        return cls(block, place, tokens, segment, number, count)

    def own(self, span: tuple[str, int] | None) -> Tensor:
        """(S, S) bool: what a token sees of its own segment, through a host layer's own limit."""
        later, earlier = self.place[:, None], self.place[None]
        seen = (self.block[:, None] == self.block) & (earlier <= later)
        if span is not None:
            kind, size = span
            near = later - earlier < size if kind == "sliding_attention" else later // size == earlier // size
            seen = seen & near
        return seen

    def memory(self, recurrent: bool, capacity: int | None) -> Tensor:
        """(S, count n) bool: which <COMP> tokens of earlier segments are kept for a token; capacity None: only those
        of the one before it, as a merged memory stands in their place."""
        apart = self.block[:, None] - self.block[None, self.text :]
        seen = (apart >= 1) & (apart <= (1 if capacity is None else capacity))
        return seen if recurrent else seen & (self.block == self.block[self.text - 1])[:, None]


class _InParallel:
    """The memory of one pass: as `memory`, with the averages of "merge" as columns of their own."""

    def __init__(self, memory: CCM, blocks: Blocks):
        self.memory, self.blocks = memory, blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        blocks, config = self.blocks, self.memory.config
        if config.update == "concat" or not blocks.count:
            return call.plain()
        keys, values = (self._merged(t[:, :, blocks.text :]) for t in (call.free_keys(), call.new_values))
        after = 1 + torch.arange(blocks.count, device=keys.device)
        places = after[:, None] * blocks.segment + torch.arange(blocks.number, device=keys.device)
        turned = step.host.rotary(places.flatten()[None], step.layer)
        keys = keys if turned is None else rotate(keys, *turned)
        own = call.bool_mask()
        seen = blocks.memory(config.recurrent, None).expand(*own.shape[:2], -1, -1)
        return call.plain(
            keys=torch.cat([keys, call.keys], dim=2),
            values=torch.cat([values, call.values], dim=2),
            mask=torch.cat([seen, own], dim=3),
        )

    def _merged(self, new: Tensor) -> Tensor:
        """Mem(1), Mem(2), ... (B, Hkv, count n, e) from h(1), h(2), ... of the same shape."""
        segments = new.unflatten(2, (self.blocks.count, self.blocks.number))
        rate, after = self.memory.config.merge_rate, []
        if rate is None:
            number = 1 + torch.arange(self.blocks.count, device=new.device)
            return (segments.cumsum(2) / number.to(new.dtype).view(-1, 1, 1)).flatten(2, 3)
        for one in segments.unbind(2):
            after.append(one if not after else torch.lerp(after[-1], one, rate))
        return torch.stack(after, dim=2).flatten(2, 3)


def parallel_forward(model: Any, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
    """Loss and logits of `model(input_ids, labels=labels)`, for a host with the memory "ccm" alone, in one pass.

    The pass has S = tokens + n * segments columns and a mask of S x S. It starts from an empty memory and leaves none.

    Args:
        input_ids: (B, tokens) int64, without padding. labels: (B, tokens), -100 where no answer is asked for.
        kwargs: for the host's loss.

    Returns: an object with `loss` (None without labels) and `logits` (B, tokens, vocabulary). With `recurrent` False
        only the logits of the last segment are those of the recurrence.

    Raises:
        ConfigError: another memory. InputError: no token, or more than the host has positions for.
    """
    base = base_model(model)
    if not is_attached(base) or not isinstance(base.memory, CCM):
        raise ConfigError("parallel_forward is for a model with the memory 'ccm' alone; call the model itself instead.")
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise InputError(f"input_ids of shape {tuple(input_ids.shape)}, expected (rows, tokens).")
    memory, attached, (rows, tokens) = base.memory, base.mnemic, input_ids.shape
    blocks = Blocks.of(tokens, attached.layout.segment, memory.config.num_tokens, input_ids.device)
    positions = blocks.place
    if not attached.position_table:
        # Places in the stream: what counts is how far apart two tokens stand.
        positions = positions + blocks.block * blocks.segment
    limit = attached.max_positions
    if limit is not None and int(positions.max()) >= limit:
        raise InputError(
            f"A text of {tokens} tokens does not fit the {limit} positions of the host; use shorter texts."
        )
    comp = memory.comp.repeat(blocks.count, 1).expand(rows, -1, -1)
    embeddings = base.get_input_embeddings()(input_ids)
    frame = Frame(
        _InParallel(memory, blocks),
        host=attached.access,
        places=blocks.block[None],
        num_write=blocks.count * blocks.number,
        segment=blocks.segment,
        training=base.training,
    )
    masks = {}
    for kind, span in attached.spans.items():
        seen = blocks.own(span)
        if memory.config.update == "concat":
            kept = blocks.memory(memory.config.recurrent, memory.config.capacity)
            seen = torch.cat([seen[:, :tokens], seen[:, tokens:] | kept], dim=1)
        masks[kind] = as_attention_mask(seen[None], attached.backend, base.dtype).expand(rows, -1, -1, -1)
    logits, _ = base._segment_step(
        torch.cat([embeddings, comp.to(embeddings.dtype)], dim=1),
        frame,
        positions.expand(rows, -1),
        masks.get("", masks),
        None,
        torch.arange(tokens, device=input_ids.device),
    )
    loss = None if labels is None else base._loss(logits, labels, **kwargs)
    return MemoryOutput(loss=loss, logits=logits)
