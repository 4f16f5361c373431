"""Nearest neighbours among the keys of a datastore: exact, block by block, or approximate with faiss."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, MissingExtraError
from ..ops.nearest import FaissIndex, import_faiss

# Queries x keys of one block of distances: 64 MiB in float32.
QUERIES, _KEYS = 2048, 8192
_PROBES = 32

Near = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]]
"""Queries (Q, d), how many, an entry (Q,) that does not count -> squared distances and entries, (Q, c) each."""


def nearest(stored: np.ndarray, queries: Tensor, count: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest keys, exactly up to rounding in float32.

    Args:
        stored: keys (N, d), any float dtype, may be mapped. queries: (Q, d).
        exclude: (Q,) int64, an entry that does not count.

    Returns: squared distances (Q, c) float32, rising, and entries (Q, c) int64; c is count, or all that there are.
    """
    total = len(stored)
    count = min(count, total - (exclude is not None))

    def block(start: int) -> Tensor:
        return torch.from_numpy(np.array(stored[start : start + _KEYS], dtype=np.float32)).to(queries.device)

    # |q|^2 + |k|^2 - 2 qk cancels badly where all keys share a large component; distances do not need it.
    shift = block(0).mean(0)
    queries = queries.float() - shift
    best = torch.empty(len(queries), 0, device=queries.device)
    entries = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, total, _KEYS):
        keys = block(start) - shift
        squares = queries.square().sum(-1, keepdim=True) + keys.square().sum(-1)
        distances = torch.addmm(squares, queries, keys.T, alpha=-2)
        if exclude is not None:
            inside = ((exclude >= start) & (exclude < start + len(keys))).nonzero().squeeze(-1)
            distances[inside, exclude[inside] - start] = float("inf")
        near, at = distances.topk(min(count, len(keys)), largest=False)
        best, entries = torch.cat([best, near], -1), torch.cat([entries, at + start], -1)
        best, kept = best.topk(min(count, best.shape[-1]), largest=False)
        entries = entries.gather(-1, kept)
    return best.clamp_min(0), entries


def check_faiss() -> None:
    """Raises `MissingExtraError` where faiss is not installed."""
    try:
        import_faiss()
    except ImportError:
        raise MissingExtraError("search='faiss' needs faiss: pip install 'mnemic[knn]'.") from None


def approximate(stored: np.ndarray) -> Near:
    """Like `nearest`, in inverted lists of which 32 are probed; distances are exact, neighbours may be missed.

    Lists of whole vectors, where the papers compress them (product quantisation): the index takes as much memory as the
    keys in float32, twice that while it is built.
    """
    index = FaissIndex(stored.shape[1], "l2", "ivf", nprobe=_PROBES)
    index.add(torch.from_numpy(np.array(stored, dtype=np.float32)))
    total = len(stored)

    def search(queries: Tensor, count: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        scores, entries = index.search(queries, min(total, count + (exclude is not None)))
        distances, entries = scores.neg().to(queries.device), entries.to(queries.device)
        if exclude is not None:
            distances = distances.masked_fill(entries == exclude[:, None], float("inf"))
        distances, kept = distances.topk(min(count, total - (exclude is not None)), largest=False)
        if not bool(distances[:, 0].isfinite().all()):
            raise ConfigError("faiss found no neighbour for some position; use search='exact'.")
        return distances, entries.gather(-1, kept).clamp_min(0)

    return search
