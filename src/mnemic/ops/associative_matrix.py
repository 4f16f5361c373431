"""An associative matrix with a normaliser: tokens read it by content, memory tokens write it with a delta rule.

The memory of ARMT (2024, arXiv 2407.04841). Shapes: d values, D features, T tokens that read, M tokens that write;
A is the matrix (..., d, D), z the normaliser (..., D), phi a feature map:

    read    y = A phi(q) / (z . phi(q) + eps)
    write   vbar_i  = A phi(k_i) / (z . phi(k_i) + eps)             what the matrix now returns for this key
            gamma_i = clip(1 - z . phi(k_i) / (|phi(k_i)|^2 + eps), 0, 1)      a constant for gradients
            A <- A + sum_i beta_i (v_i - vbar_i) phi(k_i)^T,    z <- z + sum_i gamma_i phi(k_i)

All M writes of a call see the matrix as it entered the call. gamma is about 0 for a key that is already known, so a
value is replaced; with gamma = 1 it would be averaged with the old one. beta scales the matrix only, as in the
paper's code. Leading dimensions are free: the rows of all layers can be read or written in one call.

A and z are kept in float32 or float64, since both divisions by z lose too much below; autocast is off inside.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gamma = Literal["delta", "one"]


def dpfp(x: Tensor, nu: int = 3) -> Tensor:
    """Deterministic parameter-free projection: u = [relu(x), relu(-x)], and u * roll(u, r) for r = 1..nu.

    Source: Linear Transformers Are Secretly Fast Weight Programmers (2021, arXiv 2102.11174).

    Args:
        x: (..., d). nu: at least 1 and at most 2 d, where the rolls begin to repeat.

    Returns: (..., 2 * nu * d), none of it negative.

    Raises:
        ValueError: nu out of range.
    """
    width = 2 * x.shape[-1]
    if not 1 <= nu <= width:
        raise ValueError(f"dpfp: nu = {nu} for vectors of width {x.shape[-1]}; expected 1 <= nu <= {width}.")
    if torch.compiler.is_compiling():
        # A compiler fuses the plain form by itself.
        return naive_dpfp(x, nu)
    return _DPFP.apply(x, nu)  # pyright: ignore[reportReturnType]


def naive_dpfp(x: Tensor, nu: int = 3) -> Tensor:
    """Reference of `dpfp`."""
    u = torch.cat([x, -x], dim=-1).relu()
    return torch.cat([u * u.roll(r, -1) for r in range(1, nu + 1)], dim=-1)


class _DPFP(torch.autograd.Function):
    """`dpfp` in few passes over memory: autograd would fill a tensor with zeros for the gradient of every roll."""

    @staticmethod
    def forward(ctx, x: Tensor, nu: int) -> Tensor:
        width = 2 * x.shape[-1]
        u = torch.cat([x, -x], dim=-1).relu_()
        # Every roll is a view of this one wrapped copy.
        wrapped = torch.cat([u[..., width - nu :], u], dim=-1)
        out = x.new_empty(*x.shape[:-1], nu * width)
        for r, part in enumerate(out.split(width, -1), 1):
            torch.mul(u, wrapped[..., nu - r : nu - r + width], out=part)
        ctx.save_for_backward(wrapped)
        ctx.nu = nu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (wrapped,), nu = ctx.saved_tensors, ctx.nu
        u = wrapped[..., nu:]
        width, total = u.shape[-1], torch.zeros_like(u)
        for r, part in enumerate(grad.split(width, -1), 1):
            total.addcmul_(part, wrapped[..., nu - r : nu - r + width])
            total[..., : width - r].addcmul_(part[..., r:], u[..., r:])
            total[..., width - r :].addcmul_(part[..., :r], u[..., :r])
        positive, negative = total.mul_(u > 0).chunk(2, -1)
        return positive - negative, None


def read(features: Tensor, matrix: Tensor, normaliser: Tensor, eps: float = 1e-5) -> Tensor:
    """What the matrix returns for each query; exactly 0 while it is empty.

    Args:
        features: phi(q), (..., T, D), any floating dtype. matrix: (..., d, D). normaliser: (..., D).

    Returns: (..., T, d) in the matrix's dtype.

    Raises:
        TypeError: a matrix or normaliser that is neither float32 nor float64.
    """
    _check(matrix, normaliser)
    with torch.autocast(matrix.device.type, enabled=False):
        features = features.to(matrix.dtype)
        # A product with the reciprocal has a shorter backward pass than a quotient.
        return (features @ matrix.mT) * (features @ normaliser.unsqueeze(-1) + eps).reciprocal()


def write(
    features: Tensor,
    values: Tensor,
    beta: Tensor,
    matrix: Tensor,
    normaliser: Tensor,
    *,
    first: Tensor | None = None,
    gamma: Gamma = "delta",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The matrix and normaliser after M parallel writes.

    Args:
        features: phi(k), (..., M, D). values: (..., M, d). beta: (..., M). Any floating dtype.
        matrix: (..., d, D). normaliser: (..., D). Neither is changed in place.
        first: bool, broadcasts against the leading dimensions. True: this row's first segment, vbar = 0 and
            gamma = 1. An empty matrix with a zero normaliser gives just that without the flag. None: no row is.
        gamma: "delta" as above; "one": gamma_i = 1, which averages values under one key instead of replacing them.

    Returns: the new (matrix, normaliser), in their dtypes.

    Raises:
        TypeError: a matrix or normaliser that is neither float32 nor float64, or a `first` that is not bool.
        ValueError: another gamma.
    """
    _check(matrix, normaliser)
    if gamma not in ("delta", "one"):
        raise ValueError(f"write: gamma = {gamma!r}, expected 'delta' or 'one'.")
    if first is not None and first.dtype != torch.bool:
        raise TypeError(f"write: first has dtype {first.dtype}; expected bool, True where a row writes first.")
    with torch.autocast(matrix.device.type, enabled=False):
        features, values, beta = (x.to(matrix.dtype) for x in (features, values, beta))
        known = features @ normaliser.unsqueeze(-1)
        returned = (features @ matrix.mT) / (known + eps)
        if first is not None:
            returned = returned.masked_fill(first[..., None, None], 0.0)
        change = beta.unsqueeze(-1) * (values - returned)
        # One fused product and sum; the product by itself would be a second temporary of the matrix's size.
        written = torch.baddbmm(*(x.reshape(-1, *x.shape[-2:]) for x in (matrix, change.mT, features)))
        return written.view_as(matrix), normaliser + _increment(features, known, first, gamma, eps)


def _increment(features: Tensor, known: Tensor, first: Tensor | None, gamma: Gamma, eps: float) -> Tensor:
    """sum_i gamma_i phi(k_i), (..., D); known = z . phi(k), (..., M, 1)."""
    if gamma == "one":
        return features.sum(-2)
    with torch.no_grad():
        share = (1 - known / (features.square().sum(-1, keepdim=True) + eps)).clamp(0, 1)
        if first is not None:
            share = share.masked_fill(first[..., None, None], 1.0)
    return (share.mT @ features).squeeze(-2)


def _check(matrix: Tensor, normaliser: Tensor) -> None:
    for name, tensor in (("matrix", matrix), ("normaliser", normaliser)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"The {name} has dtype {tensor.dtype}; keep it in float32 or float64.")
