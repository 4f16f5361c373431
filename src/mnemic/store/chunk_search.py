"""Exact search: the keys with the least L2 distance, block by block, and the ranking of candidates.

Shapes: N keys of width w, n queries, k results, c candidates. Products find the candidates, differences rank them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Scores held at once while searching: 64 MiB of float32.
_SCORES = 2**24
# Scores in float32 may swap near ties; the distances of this many candidates more than asked decide the ranks.
SLACK = 8
# The best of a row lie in the groups with the best minima, and minima of groups are cheaper than a selection.
_GROUP = 64


@dataclass(frozen=True, eq=False)
class Keys:
    """keys (N, w) float32; half_squares (N,) float32, half their squared lengths; documents (N,) int64, rising."""

    keys: Tensor
    half_squares: Tensor
    documents: Tensor


def blocks(count: int, rows: int) -> Iterator[slice]:
    """Slices of at most `rows` that cover range(count)."""
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def exact(source: Keys, queries: Tensor, k: int, excluded: Tensor) -> Tensor:
    """Candidates (n, c), at least the k nearest, -1 where there are none; |q - x|^2 / 2 = |x|^2 / 2 - qx + ..."""
    wanted = min(k + SLACK, len(source.keys))
    # The chunks of a document lie together.
    ends = [torch.searchsorted(source.documents, excluded.cpu(), side=side).tolist() for side in ("left", "right")]
    own = list(zip(*ends, strict=True))
    best = queries.new_full((queries.shape[0], wanted), float("inf"))
    found = torch.full(best.shape, -1, dtype=torch.int64, device=queries.device)
    for block in blocks(len(source.keys), max(_GROUP, _SCORES // max(1, queries.shape[0]) // _GROUP * _GROUP)):
        keys, half = source.keys[block].to(queries.device), source.half_squares[block].to(queries.device)
        scores = torch.addmm(half, queries, keys.T, alpha=-1)
        for row, (start, stop) in enumerate(own):
            if max(start, block.start) < min(stop, block.stop):
                scores[row, max(start - block.start, 0) : stop - block.start] = float("inf")
        values, at = _smallest(scores, wanted)
        values, at = torch.cat([best, values], dim=1), torch.cat([found, at + block.start], dim=1)
        best, chosen = values.topk(wanted, largest=False)
        found = at.gather(1, chosen)
    return found.masked_fill(best == float("inf"), -1)


def ranked(source: Keys, queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of the candidates by differences, which do not cancel; ties go to the earlier chunk."""
    candidates = candidates.sort(dim=1).values
    rows = max(1, _SCORES // max(1, candidates.shape[1] * source.keys.shape[1]))
    parts = []
    for q, c in zip(queries.split(rows), candidates.split(rows), strict=True):
        keys = source.keys[c.clamp(min=0).cpu()].to(queries.device)
        parts.append((keys - q[:, None]).double().square().sum(-1).sqrt())
    distances = torch.cat(parts).masked_fill(candidates < 0, float("inf"))
    distances, order = distances.sort(dim=1, stable=True)
    indices = candidates.gather(1, order)
    short = max(0, k - indices.shape[1])
    pad = torch.nn.functional.pad
    return pad(indices, (0, short), value=-1)[:, :k], pad(distances, (0, short), value=float("inf"))[:, :k].float()


def _smallest(scores: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the `wanted` smallest entries of each row (fewer where there are fewer columns)."""
    columns = scores.shape[1]
    groups = columns // _GROUP
    if groups <= 2 * wanted:
        return scores.topk(min(wanted, columns), largest=False)
    # Group g holds the columns g, g + groups, g + 2 groups ..., so that minima are taken along rows of memory.
    minima = scores[:, : groups * _GROUP].unflatten(1, (_GROUP, groups)).amin(1)
    best = minima.topk(wanted, largest=False).indices
    steps = torch.arange(_GROUP, device=scores.device) * groups
    rest = torch.arange(groups * _GROUP, columns, device=scores.device).expand(scores.shape[0], -1)
    at = torch.cat([(best[:, :, None] + steps).flatten(1), rest], dim=1)
    values, chosen = scores.gather(1, at).topk(wanted, largest=False)
    return values, at.gather(1, chosen)
