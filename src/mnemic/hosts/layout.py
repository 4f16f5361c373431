"""Layout: where the tokens of an open segment stand in the KV cache, and who sees whom.

A row's columns are its places in the segment, whatever the calls it arrived in:

    [ sinks | kept window | read tokens | text 0 .. T-1 | write tokens | scratch ]

With inner tokens a group of them stands before text tokens k, 2k, ... of a segment. Every row is at its own column, so
padded batches, beams and rows that commit at different times are the same case. Padding is written to the scratch
column, which no real token sees.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import HostError

SUPPORTED_PATTERNS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Layout:
    """segment: tokens T of a segment; every: tokens between commits; sinks, window, read, write: columns of each kind.

    continuous: no segments; a token sees the last `window` tokens and the first `sinks` of its stream, where the host's
    own layers see as far. offset: host positions left free before each segment. own: the host keeps no keys and values.
    inner: memory tokens of a group before every `inner_every`-th text token but the first. shifting: memory tokens take
    positions as text does; else each has the position of the text token behind it. maskless: the host gets no mask, the
    memory makes those that it needs.
    """

    segment: int
    every: int
    sinks: int = 0
    window: int = 0
    read: int = 0
    write: int = 0
    bidirectional: bool = False
    continuous: bool = False
    offset: int = 0
    own: bool = False
    inner: int = 0
    inner_every: int = 1
    shifting: bool = True
    maskless: bool = False

    @property
    def text(self) -> int:
        """Column of the first text token of a segment."""
        return self.sinks + self.window + self.read

    @property
    def groups(self) -> int:
        """Groups of inner tokens in a segment."""
        return (self.segment - 1) // self.inner_every if self.inner else 0

    @property
    def behind(self) -> int:
        """First column behind the text of a segment."""
        return self.text + self.segment + self.inner * self.groups

    @property
    def scratch(self) -> int:
        return self.behind + self.write

    @property
    def columns(self) -> int:
        return self.scratch + 1

    @property
    def positions(self) -> int:
        """Host positions that one segment takes."""
        memory = self.read + self.inner * self.groups + self.write if self.shifting else 0
        return self.offset + self.segment + memory

    def column(self, index: Any) -> Any:
        """Column of the text token that is number `index` (int or Tensor) of its segment."""
        return self.text + index + (self.inner * (index // self.inner_every) if self.inner else 0)

    def used(self, count: int) -> int:
        """Columns up to the last of `count` text tokens."""
        return self.column(count - 1) + 1 if count else self.text

    def group_columns(self, group: Tensor) -> Tensor:
        """Columns of the groups of inner tokens, numbered from 1; (..., G) -> (..., G * inner)."""
        first = self.column(group * self.inner_every) - self.inner
        return (first[..., None] + torch.arange(self.inner)).flatten(-2)

    def index(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """For text columns the token's number in its segment, for inner ones that of the token behind them; and which
        of them are text."""
        offset = columns - self.text
        text = (offset >= 0) & (columns < self.behind)
        if not self.inner:
            return offset, text
        period = self.inner_every + self.inner
        inside = offset.clamp_min(0) % period
        index = offset // period * self.inner_every + inside.clamp_max(self.inner_every)
        index = torch.where(columns < self.behind, index, offset - self.inner * self.groups)
        return index, text & (inside < self.inner_every)

    def is_inner(self, columns: Tensor) -> Tensor:
        return (columns >= self.text) & (columns < self.behind) & ~self.index(columns)[1]

    def position(self, columns: Tensor) -> Tensor:
        """Position within a segment of the tokens at `columns`, before `offset`."""
        return columns if self.shifting else self.index(columns)[0].clamp_min(0)

    def places(self, columns: Tensor, origin: Tensor) -> Tensor:
        """Number in the stream of the tokens at `columns` (B or 1, n); -1 for memory tokens and unused columns.

        Args:
            origin: tokens read before the open segment, (B,).
        """
        origin = origin[:, None]
        index, text = self.index(columns)
        places = torch.where(text, origin + index, -1)
        if self.window or self.sinks:
            kept = (columns >= self.sinks) & (columns < self.text)
            places = torch.where(kept, (origin + columns - self.text).clamp_min(-1), places)
            places = torch.where((columns < self.sinks) & (columns < origin - self.window), columns, places)
        return places

    def visible(
        self, queries: Tensor, keys: Tensor, origin: Tensor | None, host_span: tuple[str, int] | None
    ) -> Tensor:
        """Who sees whom, (B, Q, K) bool.

        Args:
            queries: columns of the queries, (B or 1, Q). keys: columns of the keys, (B or 1, K).
            origin: tokens read before the open segment, (B,); only for continuous layouts.
            host_span: the host layer's own limit: ("sliding_attention", n) or ("chunked_attention", n).
        """
        q, k = queries[:, :, None], keys[:, None, :]
        seen = k <= q
        if self.window:
            assert origin is not None
            place = self.places(keys, origin)[:, None, :]
            near = (q - k < self.window) & (k >= self.sinks)
            # Padding stands at the scratch column, has no place, and must see itself.
            seen = seen & ((near | (place < self.sinks)) & (place >= 0) | (q == k))
        if host_span is not None:
            kind, size = host_span
            at, of = q, k
            if self.window:
                # A sink stands farther away than its column, and no farther than the host sees.
                assert origin is not None
                at, of = self.places(queries, origin)[:, :, None], self.places(keys, origin)[:, None, :]
            elif not self.shifting:
                at, of = self.position(queries)[:, :, None], self.position(keys)[:, None, :]
            near = at - of < size if kind == "sliding_attention" else at // size == of // size
            # Memory tokens are always in sight, however narrow the host's own layers look.
            memory = (k < self.text) & (k >= self.sinks + self.window)
            seen = seen & (near | memory | self.is_inner(k) if self.inner else near | memory)
        if self.bidirectional:
            last = self.behind
            both_read = (q < self.text) & (k < self.text)
            both_write = (q >= last) & (k >= last) & (k < self.scratch)
            seen = seen | both_read | both_write
            if self.inner:
                same = self.index(q)[0] == self.index(k)[0]
                seen = seen | (same & self.is_inner(q) & self.is_inner(k))
        return seen


def host_spans(config) -> dict[str, tuple[str, int] | None]:
    """The kinds of attention a host's layers declare -> their limit; the single key "" where all are of one kind.

    Follows the convention of transformers' `create_masks_for_generate`: a host with `layer_types` takes a dict of
    masks by type, others one mask.

    Raises:
        HostError: layers that are not attention, or of a kind whose mask is not known here.
    """
    config = config.get_text_config(decoder=True)
    sizes = {
        "full_attention": None,
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    types = getattr(config, "layer_types", None)
    if types:
        unknown = sorted(set(types) - set(SUPPORTED_PATTERNS))
        if unknown:
            raise HostError(
                f"{type(config).__name__} has layers of type {', '.join(unknown)}; segments with their own KV cache "
                f"need layers of the types {', '.join(SUPPORTED_PATTERNS)}."
            )
        return {t: (t, sizes[t]) if sizes[t] else None for t in sorted(set(types))}
    if sizes["sliding_attention"]:
        return {"": ("sliding_attention", sizes["sliding_attention"])}
    if sizes["chunked_attention"]:
        return {"": ("chunked_attention", sizes["chunked_attention"])}
    return {"": None}


def as_attention_mask(seen: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """(B, Q, K) bool -> the 4-D mask that the host's attention takes."""
    seen = seen[:, None]
    if implementation != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
