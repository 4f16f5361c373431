"""Rows and pieces: cutting what a call brings into what each row's open segment takes.

All bookkeeping is on the CPU: it steers Python loops, and the numbers are few. Input is left-aligned first (real
tokens of a row next to each other), so either padding side, holes and ended rows are one case; `Aligned` remembers
where everything came from.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.truncation import Truncation
from .cache import MemoryCache
from .layout import Layout


@dataclass(frozen=True)
class Aligned:
    """Left-aligned input of B rows.

    tokens: ids (B, Q) or embeddings (B, Q, d). lengths: (B,) real tokens. before: (B, Q) number of real tokens up to
    and including each original column, or None where every column is real.
    """

    tokens: Tensor
    lengths: Tensor
    before: Tensor | None


def align(tokens: Tensor, attention_mask: Tensor | None, finished: Tensor) -> Aligned:
    """Left-align rows; tokens of finished rows count as padding.

    Raises:
        InputError: a mask that is not (B, n) with n at least the number of columns given, or that leaves no token.
    """
    batch, columns = tokens.shape[:2]
    full = torch.full((batch,), columns, dtype=torch.long)
    if attention_mask is None and not finished.any():
        return Aligned(tokens, full, None)
    if attention_mask is None:
        real = torch.ones(batch, columns, dtype=torch.bool)
    elif attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < columns:
        raise InputError(
            f"attention_mask of shape {tuple(attention_mask.shape)}, expected ({batch}, {columns}) or longer: one "
            "entry a token, 0 for padding."
        )
    else:
        real = attention_mask[:, -columns:].cpu() != 0
    real = real & ~finished[:, None]
    if real.all():
        return Aligned(tokens, full, None)
    if not real.any():
        raise InputError("Every row of this call is padding; give each call at least one real token.")
    order = torch.argsort(~real, dim=1, stable=True).to(tokens.device)
    if tokens.dim() == 3:
        order = order[:, :, None].expand_as(tokens)
    return Aligned(tokens.gather(1, order), real.sum(1), real.cumsum(1))


@dataclass(frozen=True)
class Piece:
    """What one step of the host reads: `take[b]` tokens of row b from `offset[b]` on.

    fresh: no keys and values from before are seen or kept; the rows that take tokens stand in a new segment.
    read, write: memory tokens take part in front and behind; inner: so many groups of inner ones do. width: the largest
    take. done: rows that reach a commit; ended: rows that complete their segment.
    """

    offset: Tensor
    take: Tensor
    width: int
    fresh: bool
    read: bool
    write: bool
    done: Tensor
    ended: Tensor
    in_step: bool
    inner: int = 0


def next_piece(cache: MemoryCache, layout: Layout, offset: Tensor, lengths: Tensor, persistent: bool) -> Piece:
    """The next step: every row reads up to its next commit or the end of its input."""
    left, opened = lengths - offset, cache.open
    take = torch.minimum(left, layout.every - opened % layout.every)
    active, after = take > 0, opened + take
    ended = active & (after == layout.segment)
    carried_on = active & ~ended & (persistent | (take < left))
    fresh = not bool((active & (opened > 0)).any() | carried_on.any()) and not (layout.continuous and persistent)
    return Piece(
        offset=offset,
        take=take,
        width=int(take.max()),
        fresh=fresh,
        read=layout.read > 0 and bool((active & (opened == 0)).any()),
        write=layout.write > 0 and bool(ended.any()),
        done=active & (after % layout.every == 0),
        ended=ended,
        in_step=bool((opened == opened[0]).all() and (take == take[0]).all()),
        inner=int((_groups(layout, after) - _groups(layout, opened)).max()) if layout.inner else 0,
    )


def _groups(layout: Layout, count: Tensor) -> Tensor:
    """Groups of inner tokens that stand before the first `count` text tokens of a segment."""
    return (count - 1).clamp_min(0) // layout.inner_every


def cut(tokens: Tensor, piece: Piece) -> Tensor:
    """The piece's tokens, (B, width) or (B, width, d); beyond a row's take they are padding of any value."""
    if bool((piece.offset == piece.offset[0]).all()):
        start = int(piece.offset[0])
        return tokens[:, start : start + piece.width]
    index = (piece.offset[:, None] + torch.arange(piece.width)).clamp_max(tokens.shape[1] - 1).to(tokens.device)
    if tokens.dim() == 3:
        index = index[:, :, None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, index)


def columns_of(cache: MemoryCache, layout: Layout, piece: Piece, device: torch.device) -> Tensor:
    """Layout columns of the piece's queries, memory tokens included, (B or 1, Q)."""
    text = torch.arange(piece.width)
    if piece.fresh:
        columns = layout.column(text)[None]
    else:
        columns = layout.column(cache.open[:, None] + text)
        columns = columns.masked_fill(text >= piece.take[:, None], layout.scratch)
        columns = columns[:1] if piece.in_step else columns
    rows = columns.shape[0]
    parts = [columns]
    if piece.read:
        parts.insert(0, (layout.text - layout.read + torch.arange(layout.read)).expand(rows, -1))
    if piece.inner:
        groups = 1 + torch.arange(piece.inner).expand(rows, -1)
        if not piece.fresh:
            groups = groups + _groups(layout, cache.open)[:rows, None]
        inner = layout.group_columns(groups)
        if not piece.fresh:
            outside = groups > _groups(layout, cache.open + piece.take)[:rows, None]
            inner = inner.masked_fill(outside.repeat_interleave(layout.inner, dim=1), layout.scratch)
        parts.append(inner)
    if piece.write:
        parts.append((layout.behind + torch.arange(layout.write)).expand(rows, -1))
    return torch.cat(parts, dim=1).to(device)


@dataclass
class Reading:
    """One call on its way: how it is read, and how far its rows have come.

    persistent: a cache is kept for later calls. carried: (B,) rows whose state comes from an earlier call.
    checkpointing: the host's layers will be replayed. diagnosing: diagnostics are asked for. total: (B,) stretches
    between commits of each row. offset, commits: (B,) tokens read and commits made. found: the diagnostics of each
    commit. commits_due: commits of all rows that the call will make. losses: the memory's own, scalars.
    """

    aligned: Aligned
    layout: Layout
    persistent: bool
    carried: Tensor
    truncation: Truncation | None
    checkpointing: bool
    diagnosing: bool
    total: Tensor
    commits_due: int
    offset: Tensor
    commits: Tensor
    found: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    @property
    def unread(self) -> bool:
        return bool((self.offset < self.aligned.lengths).any())


class LogitsCollector:
    """Logits of the columns that the caller wants, gathered over the pieces; nothing else is computed or kept.

    A padding column carries the logits of the row's last real token before it (zeros where there is none), so that
    the last column is the next-token prediction with either padding side.
    """

    def __init__(self, aligned: Aligned, keep: int):
        columns = aligned.tokens.shape[1]
        self.aligned, self.keep = aligned, min(keep, columns) if keep else columns
        first = columns - self.keep
        if aligned.before is None:
            self.wanted = torch.full_like(aligned.lengths, first)
        else:
            earlier = aligned.before[:, first - 1] if first else torch.zeros_like(aligned.lengths)
            self.wanted = (earlier - 1).clamp_min(0)
        self.parts: list[Tensor] = []
        self.places: list[Tensor] = []

    def first_needed(self, piece: Piece) -> int | None:
        """First text position of the piece whose logits are wanted in any row, or None."""
        needed = (piece.take > 0) & (self.wanted < piece.offset + piece.take)
        if not needed.any():
            return None
        return int((self.wanted - piece.offset).clamp_min(0)[needed].min())

    def add(self, logits: Tensor, piece: Piece, first: int) -> None:
        """logits: (B, width - first, V)."""
        local = torch.arange(first, piece.width)
        place = piece.offset[:, None] + local
        self.parts.append(logits)
        self.places.append(place.masked_fill(local >= piece.take[:, None], -1))

    def result(self) -> tuple[Tensor, Tensor]:
        """Logits of the kept columns, (B, keep, V), and of each row's last token, (B, V)."""
        logits = torch.cat(self.parts, dim=1) if len(self.parts) > 1 else self.parts[0]
        if self.aligned.before is None and logits.shape[1] == self.keep:
            return logits, logits[:, -1]
        place = torch.cat(self.places, dim=1)
        # Inverse of `place`: where in `logits` the row's p-th token is.
        slots = torch.zeros(place.shape[0], self.aligned.tokens.shape[1] + 1, dtype=torch.long)
        index = torch.arange(place.shape[1]).expand_as(place)
        slots.scatter_(1, place + 1, index)
        last = torch.arange(1, self.aligned.tokens.shape[1] + 1).expand(place.shape[0], -1)
        token = (last if self.aligned.before is None else self.aligned.before)[:, -self.keep :]
        picked = slots.gather(1, token).to(logits.device)
        kept = logits.gather(1, picked[:, :, None].expand(-1, -1, logits.shape[2]))
        blank = (token == 0).to(logits.device)
        kept = kept.masked_fill(blank[:, :, None], 0.0)
        return kept, kept[:, -1]
