"""Short convolution: against a loop over tokens, values and gradients, in float64; streaming and padding."""

import pytest
import torch
from torch import Tensor

from mnemic.ops.short_convolution import SHORT, naive_short_convolution, short_convolution

LONG = SHORT + 7


def make(
    batch: int, tokens: int, channels: int = 3, kernel: int = 4, dtype=torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, tail, all leaves."""
    torch.manual_seed(0)
    sizes = [(batch, tokens, channels), (channels, kernel), (batch, kernel - 1, channels)]
    x, weight, tail = (torch.randn(s, dtype=dtype, requires_grad=True) for s in sizes)
    return x, weight, tail


def pads(how: str | None, batch: int, tokens: int) -> Tensor | None:
    """Row b has about tokens * (b + 1) / batch real tokens; the first row of an "empty" mask has none."""
    if how is None:
        return None
    place = torch.arange(tokens).expand(batch, tokens)
    count = (torch.arange(1, batch + 1) * tokens // batch)[:, None]
    if how == "right":
        return place < count
    if how == "left":
        return place >= tokens - count
    real = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(3)) < 0.6
    if how == "empty":
        real = real & (torch.arange(batch) > 0)[:, None]
    return real


def assert_same(fast: tuple[Tensor, Tensor], slow: tuple[Tensor, Tensor], leaves, real: Tensor | None) -> None:
    counts = torch.ones_like(fast[0]) if real is None else real[..., None].expand_as(fast[0]).to(fast[0].dtype)
    torch.manual_seed(1)
    weights = torch.randn(fast[0].shape, dtype=counts.dtype) * counts, torch.randn(fast[1].shape, dtype=counts.dtype)
    grads = []
    for y, tail in (fast, slow):
        grads.append(torch.autograd.grad((y * weights[0]).sum() + (tail * weights[1]).sum(), leaves))
    torch.testing.assert_close(fast[0] * counts, slow[0] * counts, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast[1], slow[1], rtol=0, atol=0)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("how", [None, "right", "left", "holes", "empty"])
@pytest.mark.parametrize("tokens", [1, 2, 5, LONG])
def test_equals_a_loop_over_tokens(tokens, how, activation):
    leaves = make(3, tokens)
    real = pads(how, 3, tokens)
    fast = short_convolution(*leaves, real, activation)
    assert_same(fast, naive_short_convolution(*leaves, real, activation), leaves, real)
    assert bool(fast[0].isfinite().all())


@pytest.mark.parametrize("kernel", [1, 2, 7])
@pytest.mark.parametrize("tokens", [1, 3, LONG])
def test_any_kernel(kernel, tokens):
    x, weight, tail = make(2, tokens, kernel=kernel)
    real = pads("holes", 2, tokens)
    leaves = (x, weight, tail) if kernel > 1 else (x, weight)
    fast = short_convolution(x, weight, tail, real)
    assert fast[1].shape == (2, kernel - 1, 3)
    assert_same(fast, naive_short_convolution(x, weight, tail, real), leaves, real)


def test_first_call_of_one_token_sees_zeros_before_it():
    x, weight, tail = make(1, 1)
    y, tail = short_convolution(x, weight, torch.zeros_like(tail), activation=False)
    torch.testing.assert_close(y[0, 0], weight[:, -1] * x[0, 0])
    assert torch.equal(tail[0], torch.cat((torch.zeros(2, 3, dtype=x.dtype), x[0])))


@pytest.mark.parametrize("seed", range(3))
def test_random_splits_equal_one_call(seed):
    x, weight, tail = make(3, 2 * LONG)
    real = pads("holes", 3, 2 * LONG)
    assert real is not None
    whole, end = short_convolution(x, weight, tail, real)
    cuts = torch.randint(0, 2 * LONG + 1, (6,), generator=torch.Generator().manual_seed(seed)).sort().values.tolist()
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, 2 * LONG], strict=True):
        part, tail = short_convolution(x[:, start:stop], weight, tail, real[:, start:stop])
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=0, atol=1e-12)
    assert torch.equal(tail, end)


@pytest.mark.parametrize("tokens", [1, 8, LONG])
def test_what_pads_hold_reaches_nothing(tokens):
    leaves = make(2, tokens)
    x, weight, tail = leaves
    real = torch.zeros(2, tokens, dtype=torch.bool)
    real[0, tokens // 2 :] = True
    dirty = x.masked_fill(~real[..., None], float("nan"))
    y, new = short_convolution(dirty, weight, tail, real)
    clean, clean_new = short_convolution(x, weight, tail, real)
    assert torch.equal(y[real], clean[real])
    assert torch.equal(new, clean_new)
    assert torch.equal(new[1], tail[1])
    for grad in torch.autograd.grad(y.sum() + new.sum(), leaves):
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("tokens", [4, LONG])
def test_dtypes_hold_under_autocast_and_a_wide_tail_stays_wide(tokens):
    x, weight, tail = make(1, tokens, dtype=torch.float32)
    plain, _ = short_convolution(x, weight, tail)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = short_convolution(x, weight, tail)
    assert torch.equal(plain, cast)
    y, new = short_convolution(x.bfloat16(), weight, tail)
    assert (y.dtype, new.dtype) == (torch.bfloat16, torch.float32)


def test_wrong_shapes_are_refused():
    x, weight, tail = make(2, 5)
    with pytest.raises(ValueError, match="weight must be"):
        short_convolution(x, weight[:2], tail)
    with pytest.raises(ValueError, match="tail must have shape"):
        short_convolution(x, weight, tail[:, 1:])
    with pytest.raises(ValueError, match="real must be bool"):
        short_convolution(x, weight, tail, torch.ones(2, 5))
