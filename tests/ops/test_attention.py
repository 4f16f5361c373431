"""Attention in parts: against loops over queries and keys in float64, values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnemic.ops import attention
from mnemic.ops.attention import attend, attend_selected, merge, repeat_heads, with_columns

few = settings(max_examples=15, deadline=None, derandomize=True)
shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "key_heads": st.integers(1, 2),
        "groups": st.integers(1, 2),
        "queries": st.integers(1, 3),
        "keys": st.integers(0, 4),
        "seed": st.integers(0, 10_000),
    }
)


def tensors(shape: dict) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    make = torch.Generator().manual_seed(shape["seed"])
    b, h, t, n = (shape[name] for name in ("batch", "key_heads", "queries", "keys"))
    sizes = [(b, h * shape["groups"], t, 3), (b, h, n, 3), (b, h, n, 2)]
    q, k, v = (torch.randn(s, generator=make, dtype=torch.float64, requires_grad=True) for s in sizes)
    return q, k, v, make


def naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Query by query over the keys whose bias is not -inf; bias (B, H, T, K)."""
    groups = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if bias[b, h, t, j] > -math.inf]
                if not seen:
                    outs.append(q.new_zeros(v.shape[-1]))
                    lses.append(q.new_tensor(-math.inf))
                    continue
                logits = [(q[b, h, t] * k[b, h // groups, j]).sum() * scale + bias[b, h, t, j] for j in seen]
                total = sum(x.exp() for x in logits)
                terms = [x.exp() / total * v[b, h // groups, j] for x, j in zip(logits, seen, strict=True)]
                outs.append(torch.stack(terms).sum(0))
                lses.append(total.log())
    return torch.stack(outs).view(*q.shape[:3], -1), torch.stack(lses).view(q.shape[:3])


def assert_same(fast: tuple[Tensor, ...], slow: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    make = torch.Generator().manual_seed(1)
    grads = []
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    weights = [torch.randn(f.shape, generator=make, dtype=f.dtype) for f in fast]
    for outputs in (fast, slow):
        # -inf is a constant: it takes no part in the loss.
        terms = [(o * w)[o.isfinite()].sum() for o, w in zip(outputs, weights, strict=True)]
        loss = sum(terms) + sum(leaf.sum() * 0 for leaf in leaves)
        grads.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@few
@given(shapes, st.sampled_from(["none", "bool", "float", "shared"]))
def test_attend_equals_loops(shape, kind):
    q, k, v, make = tensors(shape)
    full = (*q.shape[:3], k.shape[2])
    seen = torch.rand(full, generator=make) < 0.6
    if kind == "shared":
        seen = seen[:1, :1]
    mask, bias = None, torch.zeros(full, dtype=torch.float64)
    if kind in ("bool", "shared"):
        mask, bias = seen, bias.masked_fill(~seen, -math.inf)
    elif kind == "float":
        mask = bias = torch.randn(full, generator=make, dtype=torch.float64).masked_fill(~seen, -math.inf)
    assert_same(attend(q, k, v, mask, 0.7), naive(q, k, v, bias, 0.7), [q, k, v])


@few
@given(shapes, st.integers(0, 3))
def test_merge_of_disjoint_keys_equals_attention_over_all(shape, cut):
    q, k, v, make = tensors(shape)
    seen = torch.rand(*q.shape[:3], k.shape[2], generator=make) < 0.5
    parts = [
        attend(q, k[:, :, :cut], v[:, :, :cut], seen[..., :cut], 0.7),
        attend(q, k[:, :, cut:], v[:, :, cut:], seen[..., cut:], 0.7),
        attend(q, k[:, :, :0], v[:, :, :0], None, 0.7),
    ]
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
    assert_same(merge(parts), naive(q, k, v, bias, 0.7), [q, k, v])


@few
@given(shapes)
def test_selected_keys_equal_loops(shape):
    q, _, _, make = tensors({**shape, "keys": 1})
    size = (*q.shape[:3], shape["keys"], 3)
    keys, values = (torch.randn(size, generator=make, dtype=torch.float64, requires_grad=True) for _ in range(2))
    valid = torch.rand(size[:-1], generator=make) < 0.6
    bias = torch.zeros(valid.shape, dtype=torch.float64).masked_fill(~valid, -math.inf)
    # Every query as a batch row of its own.
    rows = [x.flatten(0, 2)[:, None] for x in (q[..., None, :], keys, values, bias[..., None, :])]
    out, lse = naive(*rows, 0.7)
    assert_same(
        attend_selected(q, keys, values, valid, 0.7), (out.view(*q.shape[:3], 3), lse.view(q.shape[:3])), [q, keys]
    )


def test_a_query_without_keys_is_zero_and_has_zero_gradients():
    q, k, v, _ = tensors({"batch": 1, "key_heads": 1, "groups": 2, "queries": 2, "keys": 3, "seed": 0})
    mask = torch.tensor([[True, False, True], [False, False, False]])[None, None]
    part = attend(q, k, v, mask, 1.0)
    out, lse = merge([part, part])
    assert torch.equal(out[:, :, 1], torch.zeros(1, 2, 2, dtype=torch.float64))
    assert bool((lse[:, :, 1] == -math.inf).all())
    grads = torch.autograd.grad(out.sum() + lse[:, :, 0].sum() + (lse.exp()).sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) for g in grads)
    assert torch.equal(grads[0][:, :, 1], torch.zeros(1, 2, 3, dtype=torch.float64))
    assert torch.equal(grads[1][:, :, 1], torch.zeros(1, 1, 3, dtype=torch.float64))


def test_large_logits_stay_finite_and_half_precision_keeps_its_dtype():
    q = torch.full((1, 1, 1, 4), 100.0)
    out, lse = attend(q, q, torch.ones(1, 1, 1, 4))
    assert torch.equal(out, torch.ones(1, 1, 1, 4))
    assert lse.item() == 40_000
    half, lse = attend(q.bfloat16(), q.bfloat16(), q.bfloat16())
    assert half.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


def masks(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    make = torch.Generator().manual_seed(3)
    seen = torch.rand(shape, generator=make) < 0.7
    if kind == "float":
        return torch.randn(shape, generator=make).masked_fill(~seen, -math.inf)
    return seen if kind == "bool" else None


@pytest.mark.parametrize("context", ["none", "bool", "float"])
@pytest.mark.parametrize("extra", ["none", "bool", "float"])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_columns_are_the_same_in_both_branches_and_in_loops(context, extra, key_heads, monkeypatch):
    make = torch.Generator().manual_seed(0)
    sizes = [(2, 4, 5), (2, key_heads, 7), (2, key_heads, 7), (1, key_heads, 3), (1, key_heads, 3)]
    leaves = [torch.randn(*n, 8, generator=make, dtype=torch.float64).requires_grad_() for n in sizes]
    q, k, v, extra_k, extra_v = leaves
    mask, extra_mask = masks(context, (2, 1, 5, 7)), masks(extra, (1, 4, 1, 3))
    results, single = [], []
    for many in (1, 100):
        monkeypatch.setattr(attention, "_MANY_QUERIES", many)
        out = with_columns(q, k, v, mask, extra_k, extra_v, extra_mask, 0.5)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        qf, kf, vf, ef, wf = (leaf.detach().float() for leaf in leaves)
        single.append(with_columns(qf, kf, vf, mask, ef, wf, extra_mask, 0.5))
    torch.testing.assert_close(*single, rtol=0, atol=1e-6)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    causal = torch.ones(5, 7, dtype=torch.bool).tril(2)
    bias = [causal if mask is None else mask, torch.ones(1, 1, 1, 3, dtype=torch.bool)][::-1]
    bias[0] = bias[0] if extra_mask is None else extra_mask
    full = [(m if m.is_floating_point() else torch.zeros(m.shape).masked_fill(~m, -math.inf)) for m in bias]
    full = torch.cat([m.expand(2, 4, 5, -1) for m in full], dim=-1).double()
    keys, values = (torch.cat([e.expand(2, -1, -1, -1), c], dim=2) for e, c in ((extra_k, k), (extra_v, v)))
    torch.testing.assert_close(results[0][0], naive(q, keys, values, full, 0.5)[0], rtol=0, atol=1e-10)


def test_the_branch_is_chosen_by_the_number_of_queries(monkeypatch):
    used = []
    monkeypatch.setattr(attention, "attend", lambda *a: used.append(a[0].shape[2]) or attend(*a))
    for queries in (1, attention._MANY_QUERIES - 1, attention._MANY_QUERIES):
        q, extra = torch.randn(1, 2, queries, 4), torch.randn(1, 2, 3, 4)
        with_columns(q, q, q, None, extra, extra)
    assert used == [1, 1, attention._MANY_QUERIES - 1, attention._MANY_QUERIES - 1]


def test_no_columns_is_plain_causal_attention_bit_for_bit():
    q, none = torch.randn(2, 4, 6, 8), torch.randn(1, 2, 0, 8)
    k, v = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(with_columns(q, k, v, None, none, none), plain)
    one = with_columns(q[:, :, -1:], k, v, None, none, none)
    torch.testing.assert_close(one, plain[:, :, -1:], rtol=0, atol=1e-6)


def test_heads_repeat_in_groups_and_wrong_shapes_are_refused():
    x = torch.randn(2, 2, 3, 4)
    assert torch.equal(repeat_heads(x, 6), x.repeat_interleave(3, dim=1))
    assert repeat_heads(x, 2) is x
    with pytest.raises(ValueError, match="multiple of the key heads: 3, 2"):
        attend(torch.randn(2, 3, 1, 4), x, x)
    with pytest.raises(ValueError, match="4 queries, 3 keys"):
        with_columns(torch.randn(2, 2, 4, 4), x, x, None, x, x)
    with pytest.raises(ValueError, match="Nothing to merge"):
        merge([])
