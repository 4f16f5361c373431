"""Slot bank: the fast operations against their loops, values and gradients, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnemic.ops import slot_bank
from mnemic.ops.block_linear import BlockLinear

shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "tokens": st.integers(1, 4),
        "slots": st.integers(1, 4),
        "heads": st.integers(1, 2),
        "width": st.integers(1, 3),
        "seed": st.integers(0, 10_000),
    }
)
top_ks = st.one_of(st.none(), st.integers(1, 5))
few = settings(max_examples=15, deadline=None, derandomize=True)


def tensors(shape: dict, contents: int = 1) -> list[Tensor]:
    """query, keys, then contents (B, T, d), all leaves."""
    make = torch.Generator().manual_seed(shape["seed"])
    b, t, n, h, e = (shape[k] for k in ("batch", "tokens", "slots", "heads", "width"))
    sizes = [(b, t, h * e), (b, h, n, e)] + [(b, t, h * e)] * contents
    return [torch.randn(s, generator=make, dtype=torch.float64, requires_grad=True) for s in sizes]


def assert_same(fast: list[Tensor], slow: list[Tensor], leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    """Values, and gradients of a random projection of them."""
    make = torch.Generator().manual_seed(1)
    weights = [torch.randn(f.shape, generator=make, dtype=f.dtype) for f in fast]
    grads = []
    for outputs in (fast, slow):
        loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    for leaf, a, b in zip(leaves, *grads, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=0, atol=tolerance)


@few
@given(shapes, top_ks)
def test_read_equals_loops(shape, top_k):
    query, keys, _ = tensors(shape)
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    fast = slot_bank.read(query, keys, values, top_k)
    slow = slot_bank.naive_read(query, keys, values, top_k)
    assert_same([fast], [slow], [query, keys, values])


@few
@given(shapes, top_ks, st.sampled_from(["softmax", "competitive"]), st.booleans())
def test_route_equals_loops(shape, top_k, how, padded):
    query, keys, first, second = tensors(shape, contents=2)
    mask = None
    if padded:
        lengths = 1 + torch.arange(shape["batch"]) % shape["tokens"]
        mask = torch.arange(shape["tokens"]) < lengths[:, None]
    (moved, also), mass = slot_bank.route(query, keys, (first, second), how, mask, top_k)
    fast = [moved, also] + ([] if mass is None else [mass])
    slow_first, slow_mass = slot_bank.naive_route(query, keys, first, how, mask, top_k)
    slow_second, _ = slot_bank.naive_route(query, keys, second, how, mask, top_k)
    assert (mass is None) == (slow_mass is None) == (how == "softmax")
    slow = [slow_first, slow_second] + ([] if slow_mass is None else [slow_mass])
    assert_same(fast, slow, [query, keys, first, second])


def test_attention_weights_are_a_distribution_over_the_kept_slots():
    query, keys, _ = tensors({"batch": 2, "tokens": 3, "slots": 5, "heads": 2, "width": 4, "seed": 3})
    weights = slot_bank.attention_weights(slot_bank.split_heads(query, 2), keys, top_k=2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 3, dtype=torch.float64))
    assert torch.equal((weights > 0).sum(-1), torch.full((2, 2, 3), 2))


def test_masked_tokens_reach_no_slot():
    query, keys, content = tensors({"batch": 1, "tokens": 4, "slots": 3, "heads": 1, "width": 4, "seed": 4})
    mask = torch.tensor([[True, True, False, False]])
    for how in ("softmax", "competitive"):
        (moved,), _ = slot_bank.route(query, keys, (content,), how, mask)
        (grad,) = torch.autograd.grad(moved.sum(), content)
        assert torch.equal(grad[:, 2:], torch.zeros_like(grad[:, 2:]))
        assert bool((grad[:, :2] != 0).all())


def test_a_slot_that_receives_nothing_gets_zero_and_finite_gradients():
    # Both tokens choose slot 0 with top-1, so slot 1 is empty.
    query = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    keys = torch.eye(2, dtype=torch.float64)[None, None].clone().requires_grad_()
    content = torch.full((1, 2, 2), 100.0, dtype=torch.float64, requires_grad=True)
    (moved,), mass = slot_bank.route(query, keys, (content,), "competitive", top_k=1)
    assert torch.equal(moved[0, 1], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(mass, torch.tensor([[2.0, 0.0]], dtype=torch.float64))
    for grad in torch.autograd.grad(moved.sum() + mass.sum(), (query, keys, content)):
        assert bool(grad.isfinite().all())


def test_identity_route_hands_tokens_over_and_refuses_other_shapes():
    query, keys, content = tensors({"batch": 2, "tokens": 3, "slots": 3, "heads": 1, "width": 4, "seed": 5})
    (moved,), mass = slot_bank.route(query, keys, (content,), "identity")
    assert moved is content
    assert mass is None
    with pytest.raises(ValueError, match="3 tokens, 2 slots"):
        slot_bank.route(query, keys[:, :, :2], (content,), "identity")
    with pytest.raises(ValueError, match="no padding"):
        slot_bank.route(query, keys, (content,), "identity", torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("rank", [None, 3])
def test_block_linear_is_a_matrix_product_per_block(rank):
    torch.manual_seed(0)
    linear = BlockLinear(2, 6, rank, std=0.5, dtype=torch.float64)
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    for block in range(2):
        slow = torch.stack([torch.stack([row @ linear.full()[block] for row in batch]) for batch in x])
        assert_same([linear(x, block)], [slow], [x, *linear.parameters()])
    assert linear.full().shape == (2, 6, 6)


@pytest.mark.parametrize("rank", [None, 16])
def test_block_linear_starts_with_the_standard_deviation_asked_for(rank):
    torch.manual_seed(0)
    assert float(BlockLinear(4, 64, rank, std=0.02).full().detach().std()) == pytest.approx(0.02, rel=0.1)
