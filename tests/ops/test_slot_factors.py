"""Factors on the odds of slots, and routing weights, against loops."""

import math

import pytest
import torch

from mnemic.ops import slot_bank


def _case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query, keys, values = draw(2, 5, 8), draw(2, 2, 6, 4), draw(2, 2, 6, 4)
    factors = torch.rand(2, 6, generator=generator, dtype=torch.float64) * 2
    factors[0, 1] = 0
    return query, keys, values, factors


def _loops(query, keys, values, factors, top_k):
    scores, (batch, heads, slots, e) = slot_bank.naive_scores(query, keys), keys.shape
    out = torch.zeros_like(query)
    for b in range(batch):
        for a in range(heads):
            for t in range(query.shape[1]):
                odds = [factors[b, n] * scores[b, a, t, n].exp() for n in range(slots)]
                kept = sorted(range(slots), key=lambda n: -odds[n].item())[: top_k or slots]
                total = sum(odds[n] for n in kept)
                out[b, t, a * e : (a + 1) * e] = sum(odds[n] / total * values[b, a, n] for n in kept)
    return out


@pytest.mark.parametrize("top_k", [None, 3])
def test_factors_multiply_the_odds(top_k):
    query, keys, values, factors = _case()
    inputs = [t.requires_grad_() for t in (query, keys, values)]
    found, expected = slot_bank.read(*inputs, top_k, factors), _loops(*inputs, factors, top_k)
    assert float((found - expected).detach().abs().max()) < 1e-10
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)]
    assert all(float((a - b).abs().max()) < 1e-8 for a, b in zip(*grads, strict=True))
    assert (
        float(
            slot_bank.attention_weights(slot_bank.split_heads(query, 2), keys, top_k, factors)[0, ..., 1].detach().max()
        )
        == 0
    )


def test_factors_of_one_change_nothing():
    query, keys, values, factors = _case()
    ones = torch.ones_like(factors)
    assert (
        float((slot_bank.read(query, keys, values, None, ones) - slot_bank.read(query, keys, values)).abs().max())
        < 1e-12
    )
    assert torch.equal(slot_bank.read(query, keys, values, 2, ones), slot_bank.read(query, keys, values, 2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("how", "top_k"), [("softmax", None), ("competitive", None), ("competitive", 2)])
def test_routing_weights_are_those_that_route_uses(how, top_k, masked):
    query, keys, _, _ = _case(1)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]]) if masked else None
    content = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (expected,), _ = slot_bank.route(query, keys, (content,), how, mask, top_k)
    weights = slot_bank.routing_weights(query, keys, how, mask, top_k)
    assert float((slot_bank.merge_heads(weights @ slot_bank.split_heads(content, 2)) - expected).abs().max()) < 1e-10
    total = weights.sum(-1)
    assert bool(((total - 1).abs() < 1e-10).logical_or(total == 0).all())
    if masked:
        assert float(weights[1, :, :, [2, 4]].abs().max()) == 0


def test_identity_routing_brings_each_token_to_its_slot():
    query, keys, _, _ = _case()
    weights = slot_bank.routing_weights(torch.cat([query, query[:, :1]], dim=1), keys, "identity")
    assert torch.equal(weights, torch.eye(6, dtype=torch.float64).expand(2, 2, -1, -1))
    assert math.isclose(float(weights.sum()), 24)
