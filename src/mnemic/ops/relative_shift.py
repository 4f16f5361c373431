"""Relative positions of Transformer-XL (Dai et al. 2019, arXiv 1901.02860, appendix B) without a gather.

Queries stand at 0..T-1, keys at -M..T-1, K = M + T. The products of queries and distances K-1..0 form b (T, K), and
query i needs for key j the one of distance i + M - j, which is b[i, j + T - 1 - i]: in the flat b, rows of K numbers
that start K - 1 apart, from T - 1 on. `naive_relative_shift` is the reference of the tests.
"""

import math
from typing import Any

import torch
from torch import Tensor


def relative_shift(b: Tensor) -> Tensor:
    """b (..., T, K), K >= T, by distances K-1..0, to (..., T, K) by keys; forward without a copy if b is contiguous.

    Entry (i, j) is for distance i + M - j. Entries with j > i + M (keys after the query) are unspecified: mask them.
    The result is a view whose rows overlap by one unspecified entry; do not write to it.
    """
    if b.shape[-1] < b.shape[-2]:
        raise ValueError(f"Each query is a key too: {b.shape[-2]} queries, {b.shape[-1]} distances.")
    return _Shift.apply(b)  # pyright: ignore[reportReturnType]


def distances(
    num_keys: int,
    width: int,
    clamp: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """R (num_keys, width): sines then cosines of the distances num_keys-1..0, those above `clamp` taken as `clamp`."""
    if width % 2:
        raise ValueError(f"Sines and cosines come in pairs: the width must be even, not {width}.")
    # float64, because float32 phases of distances in the ten thousands are off in the third digit.
    steps = torch.arange(num_keys - 1, -1, -1, dtype=torch.float64, device=device)
    if clamp is not None:
        steps = steps.clamp_max(clamp)
    frequencies = torch.exp(torch.arange(0, width, 2, dtype=torch.float64, device=device) * (-math.log(1e4) / width))
    phases = steps[:, None] * frequencies
    return torch.cat([phases.sin(), phases.cos()], dim=-1).to(dtype)


def naive_relative_shift(b: Tensor) -> Tensor:
    """Reference of `relative_shift` by gather; unspecified entries are 0."""
    queries, keys = b.shape[-2:]
    place = torch.arange(keys) + queries - 1 - torch.arange(queries)[:, None]
    known = place < keys
    return b.gather(-1, place.clamp_max(keys - 1).expand(b.shape)).masked_fill(~known, 0.0)


class _Shift(torch.autograd.Function):
    """Overlapping rows are a view forward; autograd's own backward of such views is several times slower."""

    @staticmethod
    def forward(b: Tensor) -> Tensor:
        queries, keys = b.shape[-2:]
        return b if keys == 1 else b.flatten(-2)[..., queries - 1 :].unfold(-1, keys, keys - 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        queries, keys = grad.shape[-2:]
        if keys == 1:
            return grad
        # Row i's last entry is row i + 1's first; only the last row's is specified.
        flat = grad.new_empty(*grad.shape[:-2], queries * keys)
        flat[..., : queries - 1] = 0
        flat[..., queries - 1 : -1].unflatten(-1, (queries, keys - 1)).copy_(grad[..., :-1])
        flat[..., -1] = grad[..., -1, -1]
        return flat.unflatten(-1, (queries, keys))
