"""Rows that stand at different places of their chunks, laid out so that every chunk is one slice.

A row that is 5 tokens into a chunk gets its next tokens from column 5 on; columns before and behind stay neutral.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ChunkGrid:
    """Where tokens stand when every row is shifted to its own chunk borders: (B, C * width) columns."""

    source: Tensor | None
    here: Tensor
    columns: Tensor
    shift: int
    count: int
    width: int
    full: bool

    def gather(self, x: Tensor, neutral: float = 0.0) -> Tensor:
        """(B, T, h, ...) to (C, B h, width, ...), `neutral` where a column holds no token."""
        batch, tokens = x.shape[:2]
        total = self.count * self.width
        if self.source is None:
            after = total - self.shift - tokens
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (self.shift, after), value=neutral)
        else:
            x = x.flatten(0, 1).index_select(0, self.source.flatten()).unflatten(0, (batch, total))
            x = x.masked_fill(~self.here.view(batch, total, *[1] * (x.dim() - 2)), neutral)
        x = x.unflatten(1, (self.count, self.width))
        return x.permute(1, 0, 3, 2, *range(4, x.dim())).flatten(1, 2).contiguous()

    def scatter(self, y: Tensor, batch: int, real: Tensor | None) -> Tensor:
        """(C, B h, width, d) back to (B, T, h, d), zero where not real."""
        y = y.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        if self.source is None:
            return y[:, self.shift : self.shift + self.columns.shape[1]]
        rows = torch.arange(batch, device=y.device)[:, None] * y.shape[1]
        out = y.flatten(0, 1).index_select(0, (rows + self.columns).flatten()).unflatten(0, self.columns.shape)
        return out if real is None else out.masked_fill(~real[..., None, None], 0.0)


def chunk_grid(position: Tensor, tokens: int, chunk: int, real: Tensor | None) -> tuple[ChunkGrid, list[int] | Tensor]:
    """The grid of a call, and by row the position after it counted from the start of its open chunk.

    A call inside one chunk gets a grid as narrow as its tokens. A compiled graph cannot ask where the rows stand: it
    gets the grid that fits them wherever they stand.
    """
    batch, device = position.shape[0], position.device
    length = torch.full_like(position, tokens) if real is None else real.sum(1)
    compiling = torch.compiler.is_compiling()
    begins, ends = [[0, 1], [chunk - 1 + tokens]] if compiling else torch.stack([position, position + length]).tolist()
    count = max(1, -(-max(ends) // chunk))
    base = min(begins) if count == 1 else 0
    width = max(1, max(ends) - base) if count == 1 and not compiling else chunk
    where = torch.arange(count * width, device=device) - (position[:, None] - base)
    here = (where >= 0) & (where < length[:, None])
    source = None
    rank = order = torch.arange(tokens, device=device).expand(batch, -1)
    if real is not None:
        rank = (real.cumsum(1) - 1).clamp_min(0)
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    columns = (rank + position[:, None] - base).clamp_max(count * width - 1)
    if real is not None or len(set(begins)) > 1:
        source = order.gather(1, where.clamp(0, tokens - 1)) + torch.arange(batch, device=device)[:, None] * tokens
    if compiling:
        return ChunkGrid(source, here, columns, 0, count, width, False), position + length
    full = sum(ends) - sum(begins) == batch * count * width
    return ChunkGrid(source, here, columns, begins[0] - base, count, width, full), ends
