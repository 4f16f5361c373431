"""Rotary positions: turning queries and keys to a position and back.

cos and sin are (B or 1, N, r) as transformers' rotary modules give them, the halves of the last dimension paired; with
r smaller than the head's width only the first r dimensions turn. Turning is orthogonal up to the common factor that
long-context scalings put into cos and sin, so it can be undone exactly.
"""

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, N, e) turned to the positions of cos and sin."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = turned * cos + _half_turn(turned) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    square = cos * cos + sin * sin
    return rotate(x, cos / square, -sin / square)


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
