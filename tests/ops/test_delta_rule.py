"""Gated delta rule: chunks, recurrence and definition agree; padding, streams, extreme gates, what the rule stores."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next as peer

from mnemic.ops import delta_rule as ops

FORMS = {
    "recurrent": ops.recurrent,
    "chunk 16": lambda *a, **k: ops.chunked(*a, chunk=16, **k),
    "chunk 64": lambda *a, **k: ops.chunked(*a, chunk=64, **k),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def make(
    batch: int, tokens: int, heads: int = 2, d_k: int = 4, d_v: int = 3, dtype=torch.float64, gated: bool = True
) -> tuple[Any, ...]:
    """q, k, v, beta, log_decay, state; all leaves. Keys are unit vectors."""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, tokens, heads, d_k, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, tokens, heads, d_v, dtype=dtype)
    beta = torch.rand(batch, tokens, heads, dtype=dtype)
    decay = -torch.rand(batch, tokens, heads, dtype=dtype) if gated else None
    state = torch.randn(batch, heads, d_k, d_v, dtype=dtype)
    inputs = (ops.l2_normalise(q), ops.l2_normalise(k), v, beta, decay, state)
    return tuple(x if x is None else x.detach().requires_grad_() for x in inputs)


def outcome(form, inputs, real: Tensor | None = None, **options) -> tuple[list[Tensor], list[Tensor]]:
    """(o at real tokens, state), and the gradients of a random projection of them."""
    o, state = form(*inputs, real=real, **options)
    if real is not None:
        o = o * real[:, :, None, None]
    torch.manual_seed(1)
    # Numbers that depend neither on the dtype nor, as those of randn_like do, on the layout in memory.
    o_weights, state_weights = (torch.randn(x.shape, dtype=torch.float64).to(x.device) for x in (o, state))
    loss = (o * o_weights).sum() + (state * state_weights).sum()
    return [o, state], list(torch.autograd.grad(loss, [x for x in inputs if x is not None], allow_unused=True))


def assert_same(a, b, forward: float = 1e-10, backward: float = 1e-8) -> None:
    for tolerance, left, right in zip((forward, backward), a, b, strict=True):
        for x, y in zip(left, right, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("erase", [True, False], ids=["erase", "add"])
@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 200])
def test_forms_equal_the_definition(tokens, erase, gated):
    inputs = make(1, tokens, gated=gated)
    slow = outcome(ops.naive, inputs, erase=erase)
    for form in FORMS.values():
        assert_same(outcome(form, inputs, erase=erase), slow)


@forms
def test_no_decay_is_deltanet(form):
    *rest, _, state = make(2, 70)
    zeros = torch.zeros(2, 70, 2, dtype=torch.float64)
    with_zeros, plain = form(*rest, zeros, state), form(*rest, None, state)
    for a, b in zip(with_zeros, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tokens", [1, 65, 130])
def test_equals_the_reference_of_transformers(tokens):
    q, k, v, beta, g, state = (x.detach() for x in make(2, tokens, d_k=8, d_v=6, dtype=torch.float32))
    # Theirs scales the queries.
    scaled = q * q.shape[-1] ** -0.5
    for theirs in (peer.torch_chunk_gated_delta_rule, peer.torch_recurrent_gated_delta_rule):
        theirs = getattr(theirs, "__wrapped__", theirs)
        o, end = theirs(q, k, v, g, beta, initial_state=state, output_final_state=True)
        for form in FORMS.values():
            ours = form(scaled, k, v, beta, g, state)
            torch.testing.assert_close(ours[0], o, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours[1], end, rtol=0, atol=1e-5)


def masks(batch: int, tokens: int) -> dict[str, Tensor]:
    """Two rows with real tokens, a last row without any."""
    place = torch.arange(tokens)
    holes = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(3)) < 0.6
    rows = {"left": place >= 9, "right": place < tokens - 9, "holes": holes}
    used = (torch.arange(batch) < batch - 1)[:, None]
    return {name: row.expand(batch, tokens) & used for name, row in rows.items()}


@forms
@pytest.mark.parametrize("where", ["left", "right", "holes"])
@pytest.mark.parametrize("erase", [True, False], ids=["erase", "add"])
def test_tokens_that_are_not_real_do_nothing(form, where, erase):
    inputs = make(3, 70)
    real = masks(3, 70)[where]
    assert_same(outcome(form, inputs, real, erase=erase), outcome(ops.naive, inputs, real, erase=erase))
    o, state = form(*inputs, real=real, erase=erase)
    assert torch.equal(state[-1], inputs[-1][-1])
    assert bool(o.isfinite().all())
    # The same as a row without them.
    alone = [x if x is None else x[:1] if x.dim() == 4 and x.shape[1] == 2 else x[:1, real[0]] for x in inputs]
    torch.testing.assert_close(form(*alone, erase=erase)[1], state[:1], rtol=0, atol=1e-10)


@forms
def test_what_pads_hold_reaches_nothing(form):
    inputs = make(3, 40)
    real = masks(3, 40)["holes"]
    dirty = [x.masked_fill(~real.view(3, 40, *[1] * (x.dim() - 2)), float("nan")) for x in inputs[:5]] + [inputs[5]]
    for a, b in zip(form(*dirty, real=real), form(*inputs, real=real), strict=True):
        assert torch.equal(a, b)
    for grad in outcome(form, dirty, real)[1]:
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gates", ["closed", "open", "mixed"])
@forms
def test_extreme_gates_stay_finite(form, gates, dtype):
    q, k, v, beta, _, state = make(2, 130, dtype=dtype)
    share = {"closed": 1, "open": 0, "mixed": 0.5}[gates]
    closed = torch.rand(2, 130, 2, generator=torch.Generator().manual_seed(4)) < share
    g = torch.zeros(2, 130, 2, dtype=dtype).masked_fill(closed, -50).requires_grad_()
    inputs = (q, k, v, beta, g, state)
    fast = outcome(form, inputs)
    assert all(bool(x.isfinite().all()) for part in fast for x in part)
    double = tuple(x.detach().double().requires_grad_() for x in inputs)
    forward, backward = (1e-4, 1e-3) if dtype == torch.float32 else (1e-10, 1e-8)
    slow = [[x.to(dtype) for x in part] for part in outcome(ops.recurrent, double)]
    assert_same(fast, slow, forward, backward)


@pytest.mark.parametrize("seed", range(3))
@forms
def test_random_splits_equal_one_call(form, seed):
    *tokens, state = make(3, 150)
    real = masks(3, 150)["holes"]
    whole, end = form(*tokens, state, real=real)
    cuts = torch.randint(0, 151, (5,), generator=torch.Generator().manual_seed(seed)).sort().values.tolist()
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, 150], strict=True):
        part, state = form(*(x[:, start:stop] for x in tokens), state, real=real[:, start:stop])
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-10)


@forms
def test_reading_after_writing_and_overwriting(form):
    key, first, second = ops.l2_normalise(torch.tensor([1.0, 2.0, -1.0])), torch.randn(4), torch.randn(4)
    k = key.expand(1, 2, 1, 3)
    v = torch.stack((first, second))[None, :, None]
    beta = torch.ones(1, 2, 1)
    state = torch.randn(1, 1, 3, 4)
    # The epsilon of the normalisation leaves the key 1e-7 short of a unit vector.
    o, _ = form(k, k, v, beta, None, state)
    torch.testing.assert_close(o[0, :, 0], v[0, :, 0], rtol=0, atol=2e-6)
    added, _ = form(k, k, v, beta, None, torch.zeros_like(state), erase=False)
    torch.testing.assert_close(added[0, 1, 0], first + second, rtol=0, atol=2e-6)


@forms
def test_orthonormal_keys_recall_exactly(form):
    torch.manual_seed(0)
    keys = torch.linalg.qr(torch.randn(32, 32)).Q[None, :, None]
    values = torch.randn(1, 32, 1, 32)
    _, state = form(keys, keys, values, torch.ones(1, 32, 1), None, torch.zeros(1, 1, 32, 32))
    torch.testing.assert_close(keys[0, :, 0] @ state[0, 0], values[0, :, 0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("erase", [True, False], ids=["erase", "add"])
@forms
def test_half_precision_keeps_a_float32_state_also_under_autocast(form, erase):
    inputs = [x.detach().float() for x in make(2, 70, d_k=8, d_v=8)]
    exact = form(*inputs, erase=erase)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = form(*inputs, erase=erase)
    assert all(torch.equal(a, b) for a, b in zip(exact, cast, strict=True))
    o, state = form(*(x.bfloat16() for x in inputs[:5]), inputs[5], erase=erase)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o.float(), exact[0], rtol=0, atol=5e-2)


def test_arguments_are_not_changed_and_no_tokens_change_nothing():
    inputs = make(2, 9)
    copies = [x.detach().clone() for x in inputs]
    empty = [x[:, :0] for x in inputs[:5]]
    for form in FORMS.values():
        with torch.no_grad():
            form(*inputs)
            o, state = form(*empty, inputs[5])
        assert o.shape == (2, 0, 2, 3)
        assert torch.equal(state, inputs[5])
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("tokens", [1, ops.SHORT, ops.SHORT + 1, 40])
def test_delta_rule_takes_the_form_that_suits(tokens, monkeypatch):
    used = []
    for name in ("recurrent", "chunked"):
        form = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, form=form, name=name, **k: used.append(name) or form(*a, **k))
    # Without a GPU the library is not even looked for.
    monkeypatch.setitem(sys.modules, "fla", None)
    inputs = make(2, tokens)
    slow = ops.naive(*inputs)
    with torch.no_grad():
        for a, b in zip(ops.delta_rule(*inputs), slow, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    ops.delta_rule(*inputs, kernel="torch")
    assert used == ["recurrent" if tokens <= ops.SHORT else "chunked", "chunked"]


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("erase", [True, False], ids=["erase", "add"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_kernels_are_called_with_what_they_expect(gated, erase, short, monkeypatch):
    """Stand-ins with the library's signatures, computing by the definition."""
    used = []

    def kernel(name: str, erases: bool):
        def run(q, k, v, *, g, scale, initial_state, output_final_state, beta=None):
            assert q.dtype == k.dtype == v.dtype == torch.bfloat16
            assert initial_state.dtype == torch.float32
            assert (scale, output_final_state) == (1.0, True)
            used.append(name)
            rate = torch.ones_like(g) if beta is None else beta
            return ops.recurrent(q, k, v, rate, g, initial_state, erase=erases)

        return run

    for path, stem, erases in (("gated_delta_rule", "gated_delta_rule", True), ("simple_gla", "simple_gla", False)):
        module = ModuleType(f"fla.ops.{path}")
        for kind in ("chunk", "fused_recurrent"):
            setattr(module, f"{kind}_{stem}", kernel(f"{kind}_{stem}", erases))
        monkeypatch.setitem(sys.modules, f"fla.ops.{path}", module)
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))

    inputs: list[Any] = [x if x is None else x.detach().float() for x in make(3, 20, gated=gated)]
    q, k, v, beta, g, state = inputs
    real = masks(3, 20)["holes"]
    v = v.bfloat16()
    result = ops._flash_linear_attention(q, k, v, beta, g, state, erase, real, short)
    assert result is not None
    expected = ops.recurrent(q, k, v, beta, g, state, erase=erase, real=real)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-2)
    assert used == [("fused_recurrent_" if short else "chunk_") + ("gated_delta_rule" if erase else "simple_gla")]


def test_without_the_library_there_are_no_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    q, k, v, beta, g, state = make(1, 3)
    assert ops._flash_linear_attention(q, k, v, beta, g, state, True, None, True) is None


@pytest.mark.gpu
@pytest.mark.parametrize("erase", [True, False], ids=["erase", "add"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("tokens", [1, 65, 300])
def test_kernels_equal_ours_in_bfloat16(tokens, gated, erase):
    pytest.importorskip("fla")
    inputs: Any = make(2, tokens, d_k=64, d_v=64, dtype=torch.float32, gated=gated)
    inputs = [x if x is None else x.detach().cuda() for x in inputs]
    inputs[:3] = [x.bfloat16() for x in inputs[:3]]
    inputs = tuple(x if x is None else x.requires_grad_() for x in inputs)
    real = masks(2, tokens)["holes"].cuda()
    fast = outcome(ops.delta_rule, inputs, real, erase=erase)
    slow = outcome(ops.delta_rule, inputs, real, erase=erase, kernel="torch")
    for a, b in zip([*fast[0], *fast[1]], [*slow[0], *slow[1]], strict=True):
        assert float((a - b).float().norm()) <= 2e-2 * float(b.float().norm()) + 1e-3
    with torch.no_grad():
        short = ops.delta_rule(*inputs, real=real, erase=erase)
    for a, b in zip(short, slow[0], strict=True):
        a = a * real[:, :, None, None] if a.shape == slow[0][0].shape else a
        assert float((a - b).float().norm()) <= 2e-2 * float(b.float().norm()) + 1e-3


def test_wrong_arguments_are_refused():
    q, k, v, beta, g, state = make(2, 5)
    unknown: Any = "triton"
    with pytest.raises(ValueError, match="beta must have shape"):
        ops.chunked(q, k, v, beta[:, :3], g, state)
    with pytest.raises(ValueError, match="state must have shape"):
        ops.recurrent(q, k, v, beta, g, state.mT)
    with pytest.raises(ValueError, match="bool"):
        ops.recurrent(q, k, v, beta, g, state, real=torch.ones(2, 5))
    with pytest.raises(ValueError, match="at least one token"):
        ops.chunked(q, k, v, beta, g, state, chunk=0)
    with pytest.raises(ValueError, match="'auto' or 'torch'"):
        ops.delta_rule(q, k, v, beta, g, state, kernel=unknown)
