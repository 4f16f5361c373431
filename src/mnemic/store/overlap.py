"""Overlap: how much of a text stands in what was retrieved for it (RETRO, arXiv 2112.04426, on leakage)."""

import torch
from torch import Tensor


def overlap(chunk: Tensor, neighbour: Tensor, mask: Tensor | None = None) -> Tensor:
    """Length of the longest run of tokens that both hold, divided by m: the paper's measure of leakage.

    Args:
        chunk: (..., m) int64. neighbour: (..., r) int64, leading dimensions that broadcast.
        mask: (..., r) bool, False for tokens of the neighbour that do not count. None: all count.

    Returns: (...) float32 from 0 (no common token) to 1 (the neighbour holds the chunk).
    """
    same = chunk[..., :, None] == neighbour[..., None, :]
    if mask is not None:
        same = same & mask[..., None, :]
    run = torch.zeros_like(same[..., 0, :], dtype=torch.int64)
    longest = run
    for i in range(chunk.shape[-1]):
        run = (torch.nn.functional.pad(run[..., :-1], (1, 0)) + 1) * same[..., i, :]
        longest = torch.maximum(longest, run)
    return longest.amax(-1) / chunk.shape[-1]
