"""Additive coupling: an invertible map of vectors, made of small networks that need not be invertible themselves.

R blocks over vectors of even width d, split in halves u = [u1 ; u2]; F_r and G_r are two-layer networks
d/2 -> b -> d/2 with a GELU between (NICE, arXiv 1410.8516, section 3.2):

    block      v1 = u1 + F_r(u2);   v2 = u2 + G_r(v1)
    inverse    u2 = v2 - G_r(v1);   u1 = v1 - F_r(u2)

Every other block takes the halves in the other order, which is changing their places between blocks and back at the
end. The second layers start at zero: the map starts as the identity, exactly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Coupling(nn.Module):
    """`blocks` coupling blocks for vectors of `width`, with hidden layers of width `bottleneck`.

    It is computed in float32 at least, whatever the parameters are in: rounding is all that an inverse loses, and in
    bfloat16 that would be the third digit.

    Raises:
        ValueError: a width that has no halves.
    """

    def __init__(self, blocks: int, width: int, bottleneck: int, **factory):
        super().__init__()
        if width % 2:
            raise ValueError(f"Coupling splits vectors in halves; got width {width}, expected an even number.")
        half = width // 2
        self.down = nn.Parameter(torch.randn(blocks, 2, half, bottleneck, **factory) * half**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(blocks, 2, bottleneck, **factory))
        self.up = nn.Parameter(torch.zeros(blocks, 2, bottleneck, half, **factory))
        self.up_bias = nn.Parameter(torch.zeros(blocks, 2, half, **factory))

    def forward(self, u: Tensor) -> Tensor:
        """v (..., width) of u (..., width), in float32 or float64."""
        halves = self._halves(u)
        for block in range(len(self.down)):
            for part in (0, 1):
                at = (block + part) % 2
                halves[at] = halves[at] + self._network(halves[1 - at], block, part)
        return torch.cat(halves, dim=-1)

    def inverse(self, v: Tensor) -> Tensor:
        """u (..., width) with `forward(u)` = v, up to rounding."""
        halves = self._halves(v)
        for block in reversed(range(len(self.down))):
            for part in (1, 0):
                at = (block + part) % 2
                halves[at] = halves[at] - self._network(halves[1 - at], block, part)
        return torch.cat(halves, dim=-1)

    def _halves(self, x: Tensor) -> list[Tensor]:
        return list(x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1))

    def _network(self, x: Tensor, block: int, part: int) -> Tensor:
        """F (part 0) or G (part 1) of a block."""
        weights = (self.down, self.down_bias, self.up, self.up_bias)
        down, down_bias, up, up_bias = (w[block, part].to(x.dtype) for w in weights)
        return F.gelu(x @ down + down_bias) @ up + up_bias
