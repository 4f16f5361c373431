"""One linear map per block, stored as a stack so that all blocks can be applied in one matrix product."""

import torch
from torch import Tensor, nn


class BlockLinear(nn.Module):
    """x W_l for block l, without bias; W has shape (num_blocks, width, width), entries N(0, std).

    With `rank`, W_l is a product of (width, rank) and (rank, width), entries scaled so that the product has the same
    standard deviation.
    """

    def __init__(self, num_blocks: int, width: int, rank: int | None = None, *, std: float, **factory):
        super().__init__()
        self.rank = rank
        if rank is None:
            self.weight = nn.Parameter(torch.randn(num_blocks, width, width, **factory) * std)
        else:
            scale = (std**2 / rank) ** 0.25
            self.down = nn.Parameter(torch.randn(num_blocks, width, rank, **factory) * scale)
            self.up = nn.Parameter(torch.randn(num_blocks, rank, width, **factory) * scale)

    def forward(self, x: Tensor, block: int) -> Tensor:
        """x (..., width) through the map of one block."""
        if self.rank is None:
            return x @ self.weight[block]
        return (x @ self.down[block]) @ self.up[block]

    def full(self) -> Tensor:
        """All maps, (num_blocks, width, width)."""
        return self.weight if self.rank is None else self.down @ self.up
