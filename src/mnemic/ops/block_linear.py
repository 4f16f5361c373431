"""One linear map per block, all of the same shape, which can also be applied in one matrix product."""

import torch
from torch import Tensor, nn


class BlockLinear(nn.Module):
    """x W_l for block l, without bias; W_l has shape (width, width), entries N(0, std).

    With `rank`, W_l is a product of (width, rank) and (rank, width), entries scaled so that the product has the same
    standard deviation.

    Each block's matrix is a parameter: a slice of one tensor for all blocks would have a gradient as large as the
    whole, filled with zeros, every time it is used.
    """

    def __init__(self, num_blocks: int, width: int, rank: int | None = None, *, std: float, **factory):
        super().__init__()
        self.rank = rank
        if rank is None:
            self.weight = nn.ParameterList((torch.randn(num_blocks, width, width, **factory) * std).unbind())
        else:
            scale = (std**2 / rank) ** 0.25
            self.down = nn.ParameterList((torch.randn(num_blocks, width, rank, **factory) * scale).unbind())
            self.up = nn.ParameterList((torch.randn(num_blocks, rank, width, **factory) * scale).unbind())

    def forward(self, x: Tensor, block: int) -> Tensor:
        """x (..., width) through the map of one block."""
        if self.rank is None:
            return x @ self.weight[block]
        return (x @ self.down[block]) @ self.up[block]

    def full(self) -> Tensor:
        """All maps, (num_blocks, width, width)."""
        if self.rank is None:
            return torch.stack(list(self.weight))
        return torch.stack(list(self.down)) @ torch.stack(list(self.up))
