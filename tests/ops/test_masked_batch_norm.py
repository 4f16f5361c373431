"""Masked batch normalisation against torch's, and what padding must not change."""

import pytest
import torch
from torch import Tensor, nn

from mnemic.ops.masked_batch_norm import MaskedBatchNorm


def pair(features: int = 6) -> tuple[MaskedBatchNorm, nn.BatchNorm1d]:
    """Ours and torch's with the same random weights, float64."""
    torch.manual_seed(0)
    ours, peer = MaskedBatchNorm(features).double(), nn.BatchNorm1d(features).double()
    nn.init.normal_(peer.weight)
    nn.init.normal_(peer.bias)
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def padded_batch(padding: float, side: str) -> tuple[Tensor, Tensor]:
    """(3, 7, 6) with 7, 4 and 2 real positions, the rest filled with `padding`."""
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    real = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    if side == "left":
        real = real.flip(1)
    compact = x.flatten(0, 1)[:13]
    filled = torch.full_like(x, padding)
    filled[real] = compact
    return filled, real


@pytest.mark.parametrize("masked", [False, True])
def test_equals_batch_norm_where_nothing_is_masked(masked):
    ours, peer = pair()
    for step in range(3):
        x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = ours(a, torch.ones(4, 5, dtype=torch.bool) if masked else None)
        want = peer(b.flatten(0, 1)).view_as(b)
        assert torch.equal(out, want)
        weights = torch.randn_like(x)
        grads = torch.autograd.grad((out * weights).sum(), [a, *ours.parameters()])
        wants = torch.autograd.grad((want * weights).sum(), [b, *peer.parameters()])
        for grad, other in zip(grads, wants, strict=True):
            torch.testing.assert_close(grad, other, rtol=0, atol=1e-12)
    for (name, ours_now), (_, peer_now) in zip(ours.state_dict().items(), peer.state_dict().items(), strict=True):
        assert torch.equal(ours_now, peer_now), name
    ours.eval()
    peer.eval()
    x = torch.randn(1, 1, 6, dtype=torch.float64)
    assert torch.equal(ours(x), peer(x[0])[None])


def test_statistics_are_those_of_the_real_positions():
    ours, _ = pair()
    x, real = padded_batch(5.0, "right")
    out = ours(x, real)
    kept = x[real]
    mean, spread = kept.mean(0), kept.var(0, unbiased=False)
    want = (kept - mean) / (spread + ours.eps).sqrt() * ours.weight + ours.bias
    torch.testing.assert_close(out[real], want, rtol=0, atol=1e-12)
    assert torch.equal(out[~real], torch.zeros_like(out[~real]))
    torch.testing.assert_close(ours.running_mean, 0.1 * mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * kept.var(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding, side", [(0.0, "right"), (1e6, "left"), (float("nan"), "right")])
def test_padding_changes_no_bit(padding, side, training):
    ours, other = pair()
    other = MaskedBatchNorm(6).double()
    other.load_state_dict(ours.state_dict())
    ours.train(training)
    other.train(training)
    x, real = padded_batch(padding, side)
    x.requires_grad_()
    compact = x.detach()[real].requires_grad_()
    out, want = ours(x, real), other(compact)
    assert torch.equal(out[real], want)
    for now, alone in zip(ours.buffers(), other.buffers(), strict=True):
        assert torch.equal(now, alone)
    to_x, to_weight = torch.autograd.grad(out.square().sum(), (x, ours.weight))
    wants = torch.autograd.grad(want.square().sum(), (compact, other.weight))
    assert torch.equal(to_x[real], wants[0])
    assert torch.equal(to_x[~real], torch.zeros_like(to_x[~real]))
    assert torch.equal(to_weight, wants[1])


def test_gradcheck_with_padding():
    ours, _ = pair()
    x, real = padded_batch(2.0, "left")
    assert torch.autograd.gradcheck(lambda v: ours(v, real), x.requires_grad_())


def test_refuses_what_it_cannot_normalise():
    ours, _ = pair()
    x, real = padded_batch(0.0, "right")
    with pytest.raises(ValueError, match="there are 0"):
        ours(x, torch.zeros_like(real))
    with pytest.raises(ValueError, match="there are 1"):
        ours(x[:1, :1])
    with pytest.raises(ValueError, match=r"torch\.int64"):
        ours(x, real.long())
    with pytest.raises(ValueError, match=r"\(3, 7, 1\)"):
        ours(x, real[..., None])
    ours.eval()
    assert torch.equal(ours(x, torch.zeros_like(real)), torch.zeros_like(x))


def test_a_batch_that_is_not_tracked_moves_no_statistics():
    make = torch.Generator().manual_seed(0)
    norm = MaskedBatchNorm(3, dtype=torch.float64)
    x = torch.randn(2, 5, 3, generator=make, dtype=torch.float64)
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    for mask in (None, real):
        expected = norm(x, mask)
        before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        assert torch.equal(norm(x, mask, track=False), expected)
        assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    assert norm.num_batches_tracked == 2
    norm.eval()
    assert torch.equal(norm(x, track=False), norm(x))
