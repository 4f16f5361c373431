"""Chunked cross-attention: every token attends to the neighbours of one earlier chunk (RETRO, arXiv 2112.04426).

Shapes: B batch, T tokens, m chunk length, U neighbour sets, k neighbours, r tokens of each, S = k r keys of a set,
H heads, e width of a head. Chunks, positions and places are counted from 0.
The token at position i reads set u = (i + 1) // m - 1, so the last token of chunk u is the first that reads it, at
place 0 of its window, and the last but one of chunk u + 1 the last, at place m - 1. There is one softmax over all S
keys. The first m - 1 positions read nothing and get zero; so does a token whose set has no unmasked key.

`attend_sequence` serves whole sequences from position 0, `attend` any piece of any rows; `naive` is the reference.
A relative position is a rotation of queries and keys (`rotary`, `rotate`); the equations of the paper rotate nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Null(NamedTuple):
    """A learned key and value, (H, e) each, that every set holds besides its own: attention to nothing."""

    key: Tensor
    value: Tensor


def chunk_read(positions: Tensor, chunk_length: int) -> tuple[Tensor, Tensor]:
    """Set that each position reads, -1 for none, and its place in that set's window; int64 like `positions`."""
    window = torch.div(positions + 1, chunk_length, rounding_mode="floor")
    return window - 1, positions + 1 - window * chunk_length


def rotary(
    chunk_length: int, length: int, num_neighbours: int, width: int, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Angles of query places, (m, width / 2), and of keys, (k r, width / 2), float32.

    Place i rotates by m - 1 + i and token i' of every neighbour by i', so scores see d = i - i' + m - 1 (the paper's
    relative position). `width` is even and at most e: the part of each head that is rotated.
    """
    if width % 2 or width <= 0:
        raise ValueError(f"The rotated width must be even and positive, not {width}.")
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    places = torch.arange(chunk_length - 1, 2 * chunk_length - 1, dtype=torch.float64)
    tokens = torch.arange(length, dtype=torch.float64).repeat(num_neighbours)
    return torch.outer(places, frequency).float(), torch.outer(tokens, frequency).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn coordinates (j, j + w) of each vector by angle j; x (..., e), angles (..., w) that broadcast, 2 w <= e.

    The coordinates from 2 w on stay as they are.
    """
    half = angles.shape[-1]
    if 2 * half > x.shape[-1]:
        raise ValueError(f"{half} angles rotate {2 * half} coordinates; the vectors have {x.shape[-1]}.")
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def add_null(keys: Tensor, values: Tensor, mask: Tensor | None, null: Null) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values (B, U, H, S + 1, e) and mask (B, U, S + 1) with the null entry first.

    It copies keys and values, so callers that keep sets add it once, before keeping them.
    """
    shape = (*keys.shape[:3], 1, keys.shape[-1])
    keys = torch.cat([null.key[:, None].to(keys.dtype).expand(shape), keys], dim=-2)
    values = torch.cat([null.value[:, None].to(values.dtype).expand(shape), values], dim=-2)
    return keys, values, None if mask is None else F.pad(mask, (1, 0), value=True)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a piece go: one row of a grid for each (row, set) pair that some token reads.

    The grid has C rows of M places; M is the largest number of tokens of the piece that read one set, at most m.
    A layout serves every layer that reads the same piece.
    """

    shape: tuple[int, int, int]
    """B, T, U."""
    cells: Tensor | None
    """(C,) int64, flat (row, set) pairs; None where they are all B U of them, in order."""
    source: Tensor
    """(C, M) int64, flat (row, token) of each place; places left over repeat the first token of their row."""
    target: Tensor
    """(B T,) int64, flat place of each token; 0 for those that read nothing."""
    silent: Tensor | None
    """(B, T) bool, True for tokens that read nothing; None where every token reads."""


def lay_out(chunk: Tensor, num_sets: int) -> Layout:
    """The layout of a piece. On a GPU it waits for the device; make it once for all layers.

    Args:
        chunk: (B, T) int64, the set that each token reads, -1 for none.
        num_sets: U.

    Raises:
        ValueError: `chunk` is not (B, T) int64 or names a set that does not exist.
    """
    if chunk.ndim != 2 or chunk.dtype != torch.int64:
        raise ValueError(f"chunk must be (B, T) int64, not {tuple(chunk.shape)} {chunk.dtype}.")
    batch, tokens = chunk.shape
    if chunk.numel() and (int(chunk.min()) < -1 or int(chunk.max()) >= num_sets):
        raise ValueError(
            f"chunk names sets {int(chunk.min())} to {int(chunk.max())}; there are {num_sets} (0 to {num_sets - 1}; "
            "-1 for tokens that read none)."
        )
    reads = chunk >= 0
    readers = reads.flatten().nonzero().squeeze(-1)
    pairs = (chunk + num_sets * torch.arange(batch, device=chunk.device)[:, None]).flatten()[readers]
    cells, cell, counts = torch.unique(pairs, return_inverse=True, return_counts=True)
    target = torch.zeros(batch * tokens, dtype=torch.int64, device=chunk.device)
    every = cells.numel() == batch * num_sets
    silent = None if readers.numel() == chunk.numel() else ~reads
    if not readers.numel():
        return Layout((batch, tokens, num_sets), cells, readers.view(0, 0), target, silent)
    by_cell = cell.argsort(stable=True)
    start = counts.cumsum(0) - counts
    rank = torch.empty_like(cell)
    rank[by_cell] = torch.arange(cell.numel(), device=chunk.device) - start[cell[by_cell]]
    length = int(counts.max())
    target[readers] = cell * length + rank
    # A place left over must hold a finite query: softmax of anything else would reach the gradients of the keys.
    source = readers[by_cell[start]][:, None].repeat(1, length)
    source[cell, rank] = readers
    return Layout((batch, tokens, num_sets), None if every else cells, source, target, silent)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chunk: Tensor | Layout,
    mask: Tensor | None = None,
    scale: float | None = None,
    null: Null | None = None,
) -> Tensor:
    """Chunked cross-attention of a piece: rows may be anywhere, tokens that read nothing may stand anywhere.

    Keys and values are gathered for each set that is read, never for each token, and not at all where the tokens read
    every set. Cost 4 C M H S e operations; C M is at most B (T + 2 m) where tokens are in order.

    Args:
        query: (B, T, H, e), rotated already if rotary is used. keys, values: (B, U, H, S, e), likewise.
        chunk: (B, T) int64, the set that each token reads, -1 for none; or its layout.
        mask: (B, U, S) bool, False for keys to leave out. None: all count.
        scale: factor on the scores; None: 1 / sqrt(e).
        null: a further key and value in every set; copied into the keys on each call (see `add_null`).

    Returns: (B, T, H, e). Exactly zero, without gradient, for tokens that read nothing or a set without keys.

    Raises:
        ValueError: shapes that do not fit together, or a chunk that names no set.
    """
    _check(query, keys, values, mask)
    batch, tokens = query.shape[:2]
    layout = chunk if isinstance(chunk, Layout) else lay_out(chunk, keys.shape[1])
    if layout.shape != (batch, tokens, keys.shape[1]):
        raise ValueError(
            f"The layout is of B, T, U = {layout.shape}; queries and keys have {(batch, tokens, keys.shape[1])}."
        )
    if not layout.source.numel():
        return torch.zeros_like(query)
    keys, values = (_cells(x, layout.cells) for x in (keys, values))
    mask = None if mask is None else _cells(mask, layout.cells)
    grid = query.flatten(0, 1)[layout.source].transpose(1, 2)
    out = _attend_cells(grid, keys, values, mask, scale, null).transpose(1, 2).flatten(0, 1)
    out = out[layout.target].view(query.shape)
    return out if layout.silent is None else out.masked_fill(layout.silent[:, :, None, None], 0.0)


def attend_sequence(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chunk_length: int,
    mask: Tensor | None = None,
    scale: float | None = None,
    null: Null | None = None,
) -> Tensor:
    """`attend` for whole sequences: token t of every row is at position t. No index is computed and none is gathered.

    Takes any number of tokens T and the sets of its T // m full chunks, U = T // m (further sets are not read).

    Raises:
        ValueError: shapes that do not fit together, or fewer sets than full chunks.
    """
    _check(query, keys, values, mask)
    batch, tokens, heads, width = query.shape
    used = tokens // chunk_length
    if used > keys.shape[1]:
        raise ValueError(
            f"{tokens} tokens in chunks of {chunk_length} read {used} neighbour sets; there are {keys.shape[1]}."
        )
    if not used:
        return torch.zeros_like(query)
    keys, values = keys[:, :used].flatten(0, 1), values[:, :used].flatten(0, 1)
    mask = None if mask is None else mask[:, :used].flatten(0, 1)
    first = chunk_length - 1
    readers = tokens - first
    spare = used * chunk_length - readers
    grid = F.pad(query[:, first:], (0, 0, 0, 0, 0, spare)).reshape(batch * used, chunk_length, heads, width)
    out = _attend_cells(grid.transpose(1, 2), keys, values, mask, scale, null)
    out = out.transpose(1, 2).reshape(batch, used * chunk_length, heads, width)
    return F.pad(out[:, :readers], (0, 0, 0, 0, first, 0))


def _cells(x: Tensor, cells: Tensor | None) -> Tensor:
    flat = x.flatten(0, 1)
    return flat if cells is None else flat[cells]


def _attend_cells(
    grid: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, null: Null | None
) -> Tensor:
    """grid (C, H, M, e), keys and values (C, H, S, e), mask (C, S) -> (C, H, M, e)."""
    if null is not None:
        keys, values, mask = add_null(keys[:, None], values[:, None], None if mask is None else mask[:, None], null)
        keys, values, mask = keys[:, 0], values[:, 0], None if mask is None else mask[:, 0]
    if mask is None:
        return F.scaled_dot_product_attention(grid, keys, values, scale=scale)
    # A softmax over nothing is not a number on some backends, so empty sets attend to everything and are zeroed.
    empty = ~mask.any(-1, keepdim=True)
    allowed = (mask | empty)[:, None, None]
    out = F.scaled_dot_product_attention(grid, keys, values, attn_mask=allowed, scale=scale)
    return out.masked_fill(empty[:, :, None, None], 0.0)


def _check(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    if query.ndim != 4 or keys.ndim != 5 or values.ndim != 5:
        raise ValueError(
            f"Expected query (B, T, H, e), keys and values (B, U, H, S, e); got {tuple(query.shape)}, "
            f"{tuple(keys.shape)} and {tuple(values.shape)}."
        )
    batch, _, heads, width = query.shape
    sets, length = keys.shape[1], keys.shape[3]
    if keys.shape != (batch, sets, heads, length, width) or values.shape != keys.shape:
        raise ValueError(
            f"Keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit queries {tuple(query.shape)}: "
            "B, H and e must agree."
        )
    if mask is not None and (mask.shape != (batch, sets, length) or mask.dtype != torch.bool):
        raise ValueError(
            f"The mask must be bool {(batch, sets, length)} (B, U, S), not {mask.dtype} {tuple(mask.shape)}."
        )


def naive(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chunk: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    null: Null | None = None,
) -> Tensor:
    """Reference of `attend`: a loop over rows, tokens and heads, one softmax over the keys of the token's set."""
    batch, tokens, heads, width = query.shape
    factor = width**-0.5 if scale is None else scale
    rows: list[Tensor] = []
    for b in range(batch):
        for t in range(tokens):
            u = int(chunk[b, t])
            for h in range(heads):
                kept = [] if u < 0 else [s for s in range(keys.shape[3]) if mask is None or mask[b, u, s]]
                pairs = [(keys[b, u, h, s], values[b, u, h, s]) for s in kept]
                if null is not None and u >= 0:
                    pairs.append((null.key[h], null.value[h]))
                if not pairs:
                    rows.append(torch.zeros_like(query[b, t, h]))
                    continue
                weights = torch.stack([(query[b, t, h] * key).sum() * factor for key, _ in pairs]).softmax(0)
                rows.append((weights[:, None] * torch.stack([value for _, value in pairs])).sum(0))
    return torch.stack(rows).view(batch, tokens, heads, width)


def naive_sequence(query: Tensor, keys: Tensor, values: Tensor, chunk_length: int, **options) -> Tensor:
    """Reference of `attend_sequence`: position i reads set floor((i + 1) / m) - 1."""
    sets = [(i + 1) // chunk_length - 1 for i in range(query.shape[1])]
    return naive(query, keys, values, torch.tensor([sets] * query.shape[0]), **options)
