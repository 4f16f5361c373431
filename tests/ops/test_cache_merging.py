"""Cache merging: whole rows at once and in calls of any size against the slot recurrence, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnemic.ops import cache_merging as cm
from mnemic.ops.ragged_cache import RaggedCache

ROWS, HEADS, KEY_HEADS, WIDTH = 3, 4, 2, 6


def inputs(tokens: int, bias: float = 0.0, seed: int = 0, rows: int = ROWS) -> list[Tensor]:
    """q, k, v, weights and logits; a larger bias merges more."""
    make = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(rows, heads, tokens, width, generator=make, dtype=torch.float64)
        for heads, width in ((HEADS, WIDTH), (KEY_HEADS, WIDTH), (KEY_HEADS, WIDTH + 1))
    )
    weights = 0.01 + torch.rand(rows, KEY_HEADS, tokens, generator=make, dtype=torch.float64)
    logits = bias + torch.randn(rows, KEY_HEADS, tokens, generator=make, dtype=torch.float64)
    return [q, k, v, weights, logits]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x (..., e) at positions (...): pairs (i, i + e/2) turned by p / 100^(2i/e)."""
    half = x.shape[-1] // 2
    angle = positions[..., None].double() / 100 ** (torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, T, e), k, v (B, Hkv, K, .), mask (B, Hkv, T, K) bool or additive."""
    group = q.shape[1] // k.shape[1]
    k, v, mask = (x.repeat_interleave(group, 1) for x in (k, v, mask))
    return F.scaled_dot_product_attention(q, k, v, mask)


def attend_by_recurrence(q, k, v, weights, logits, real=None, split=False) -> Tensor:
    """The output of every real token over the slots of `naive`, others zero."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for row in range(q.shape[0]):
        at = torch.arange(q.shape[2]) if real is None else real[row].nonzero()[:, 0]
        for head in range(q.shape[1]):
            kv = head * k.shape[1] // q.shape[1]
            history = cm.naive(*(x[row, kv, at] for x in (k, v, weights, logits)), split_long_runs=split)
            for t, slots in enumerate(history):
                places = torch.tensor([p for *_, p in slots])
                keys = rotate(torch.stack([key for key, *_ in slots]), places)
                query = rotate(q[row, head, at[t]], torch.tensor(t))
                scores = keys @ query / q.shape[-1] ** 0.5
                out[row, head, at[t]] = scores.softmax(-1) @ torch.stack([value for _, value, _ in slots])
    return out


def attend_in_calls(q, k, v, weights, logits, sizes, real=None, split=False) -> tuple[Tensor, RaggedCache, dict]:
    """Calls of the given sizes: `step`, attention over [cache ; columns], then the survivors written."""
    state = cm.initial_state(k.shape[0], KEY_HEADS, WIDTH, WIDTH + 1, dtype=k.dtype)
    cache = RaggedCache.empty(k.shape[0], KEY_HEADS, WIDTH, WIDTH + 1, capacity=2, dtype=k.dtype)
    outs = []
    for part in zip(*(x.split(sizes, 2) for x in (q, k, v, weights, logits)), strict=True):
        done = sum(o.shape[2] for o in outs)
        here = None if real is None else real[:, done : done + part[0].shape[2]]
        update, state = cm.step(state, *part[1:4], merge=part[4] > 0, real=here, split_long_runs=split)
        places = update.positions[:, None].expand(update.opens.shape)
        keys = rotate(update.keys, places)
        mask = cm.step_mask(update, cache.tensors["lengths"], cache.capacity)
        outs.append(
            attend(
                rotate(part[0], update.positions[:, None].expand(part[0].shape[:3])),
                torch.cat([cache.tensors["keys"], keys], dim=2),
                torch.cat([cache.tensors["values"], update.values], dim=2),
                mask,
            )
        )
        cache.write(keys, update.values, update.positions, update.opens, update.survives, here)
    return torch.cat(outs, dim=2), cache, state


def assert_cache_is(cache: RaggedCache, k, v, weights, logits, real=None, split=False) -> None:
    """The slots are those that `naive` ends with."""
    held = cache.tensors
    kept = 0
    for row in range(k.shape[0]):
        at = torch.arange(k.shape[2]) if real is None else real[row].nonzero()[:, 0]
        for head in range(k.shape[1]):
            history = cm.naive(*(x[row, head, at] for x in (k, v, weights, logits)), split_long_runs=split)
            slots = history[-1] if history else []
            n = len(slots)
            kept += n
            assert held["lengths"][row, head] == n
            assert held["positions"][row, head, :n].tolist() == [p for *_, p in slots]
            for i, (key, value, place) in enumerate(slots):
                torch.testing.assert_close(
                    held["keys"][row, head, i], rotate(key, torch.tensor(place)), rtol=0, atol=1e-10
                )
                torch.testing.assert_close(held["values"][row, head, i], value, rtol=0, atol=1e-10)
    tokens = k.shape[0] * k.shape[2] if real is None else int(real.sum())
    assert cache.compression_ratio() * kept == tokens * k.shape[1]


# The last bias makes runs longer than the window of 12.
biases = pytest.mark.parametrize("bias", [-1.0, 0.5, 2.0])
splits = pytest.mark.parametrize("split", [False, True])


@biases
def test_all_at_once_equals_the_slot_recurrence(bias):
    q, k, v, weights, logits = inputs(37, bias)
    columns = cm.parallel(k, v, weights, cm.hard(logits))
    places = torch.arange(37).expand(ROWS, HEADS, -1)
    out = attend(
        rotate(q, places),
        rotate(columns.keys, places[:, :KEY_HEADS]),
        columns.values,
        cm.attention_bias(columns.hidden),
    )
    torch.testing.assert_close(out, attend_by_recurrence(q, k, v, weights, logits), rtol=0, atol=1e-10)


@biases
@splits
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [3, 1, 1, 14, 2, 19], [33, 7]])
def test_calls_of_any_size_equal_the_slot_recurrence(bias, split, sizes):
    q, k, v, weights, logits = inputs(40, bias, seed=1, rows=2)
    out, cache, state = attend_in_calls(q, k, v, weights, logits, sizes, split=split)
    reference = attend_by_recurrence(q, k, v, weights, logits, split=split)
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-10)
    assert_cache_is(cache, k, v, weights, logits, split=split)
    assert state["seen"].tolist() == [40, 40]
    assert not split or int(state["run"].max()) <= cm.WINDOW


@splits
@pytest.mark.parametrize("sizes", [[30], [1] * 30, [4, 1, 12, 13]])
def test_tokens_that_are_not_real_change_nothing(split, sizes):
    q, k, v, weights, logits = inputs(30, 1.5, seed=2)
    real = torch.rand(ROWS, 30, generator=torch.Generator().manual_seed(3)) < 0.7
    # Left padding, right padding with holes, and a row that never starts.
    real[0] = torch.arange(30) >= 5
    real[1, 25:] = False
    real[2] = False
    out, cache, state = attend_in_calls(q, k, v, weights, logits, sizes, real, split)
    reference = attend_by_recurrence(q, k, v, weights, logits, real, split)
    torch.testing.assert_close(out * real[:, None, :, None], reference, rtol=0, atol=1e-10)
    assert_cache_is(cache, k, v, weights, logits, real, split)
    assert state["seen"].tolist() == real.sum(-1).tolist()

    few = [x[:, :, :5] for x in (k, v, weights, logits > 0)]
    noise = cm.step(state, *few, real=torch.zeros(3, 5, dtype=torch.bool))[1]
    assert noise.keys() == state.keys()
    assert all(torch.equal(noise[name], state[name]) for name in state)


def test_the_first_token_opens_whatever_its_logit():
    _, k, v, weights, logits = inputs(20, 1.0, seed=16)
    real = torch.arange(20).expand(ROWS, -1) >= 3
    for mask, first in ((None, 0), (real, 3)):
        columns = []
        for value in (float("inf"), float("-inf"), 0.3):
            logits[..., first] = value
            columns.append(cm.parallel(k, v, weights, logits, real=mask))
        assert all(torch.equal(a, b) for other in columns[1:] for a, b in zip(columns[0], other, strict=True))


def test_padding_is_invisible_to_whole_rows():
    _, k, v, weights, logits = inputs(30, 1.0, seed=4)
    real = torch.rand(ROWS, 30, generator=torch.Generator().manual_seed(5)) < 0.6
    padded = cm.parallel(k, v, weights, logits * 3, real=real)
    for row in range(ROWS):
        k_row, v_row, weights_row, odds_row = (x[row : row + 1, :, real[row]] for x in (k, v, weights, logits * 3))
        alone = cm.parallel(k_row, v_row, weights_row, odds_row)
        for a, b in zip(padded, alone, strict=True):
            torch.testing.assert_close(a[row : row + 1, :, real[row]], b, rtol=0, atol=1e-12)
    assert bool(padded.hidden.masked_select(~real[:, None]).eq(float("-inf")).all())


@pytest.mark.parametrize("tokens,window", [(1, 12), (7, 12), (41, 12), (70, 4), (9, 1)])
def test_relaxed_decisions_and_their_gradients_equal_loops(tokens, window):
    _, k, v, weights, logits = inputs(tokens, 1.0, seed=6, rows=1)
    leaves = [x.requires_grad_() for x in (k, v, weights, logits)]
    make = torch.Generator().manual_seed(7)
    noise = torch.randn(logits.shape, generator=make, dtype=torch.float64)
    log_odds = cm.relaxed(logits, noise, tau=0.7)
    fast = cm.parallel(k, v, weights, log_odds, window)
    b = log_odds.sigmoid()
    heads = [cm.naive_relaxed(k[0, h], v[0, h], weights[0, h], b[0, h], window) for h in range(KEY_HEADS)]
    slow = [torch.stack(parts)[None] for parts in zip(*heads, strict=True)]
    grads = []
    for columns in (fast, slow):
        make.manual_seed(8)
        terms = [(c * torch.randn(c.shape, generator=make, dtype=c.dtype)).sum() for c in columns]
        loss = torch.stack(terms).sum()
        grads.append(torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for leaf, a, b in zip(leaves, *grads, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=0, atol=1e-8)


def test_relaxed_decisions_that_are_sure_are_the_hard_ones():
    _, k, v, weights, logits = inputs(40, 1.0, seed=9)
    sure = cm.parallel(k, v, weights, logits.sign() * 800)
    exact = cm.parallel(k, v, weights, cm.hard(logits))
    torch.testing.assert_close(sure.keys, exact.keys, rtol=0, atol=1e-12)
    torch.testing.assert_close(sure.hidden.exp(), exact.hidden.exp(), rtol=0, atol=1e-12)


def test_gradients_stay_finite_with_extreme_decisions():
    _, k, v, weights, logits = inputs(40, 0.0, seed=10)
    leaves = [x.requires_grad_() for x in (k, v, weights, logits)]
    columns = cm.parallel(k, v, weights, logits * 1e4)
    out = attend(k, columns.keys, columns.values, cm.attention_bias(columns.hidden))
    assert bool(out.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))


def test_without_merging_it_is_plain_attention_without_the_deciding_dimension():
    q, k, v, *_ = inputs(30, seed=11)
    decided = cm.decisions(q, k)
    never = torch.full_like(decided.logits, float("-inf"))
    columns = cm.parallel(decided.k, v, decided.weights, cm.hard(never))
    q_zero, k_zero = (x * torch.tensor([1.0] * (WIDTH - 1) + [0.0]) for x in (q, k))
    assert torch.equal(decided.q, q_zero)
    torch.testing.assert_close(columns.keys, k_zero, rtol=0, atol=1e-14)
    places = torch.arange(30).expand(ROWS, HEADS, -1)
    rotated_q, rotated_k = rotate(q_zero, places), rotate(k_zero, places[:, :KEY_HEADS])
    causal = torch.ones(ROWS, KEY_HEADS, 30, 30, dtype=torch.bool).tril()
    plain = attend(rotated_q, rotated_k, v, causal)
    out, cache, _ = attend_in_calls(decided.q, decided.k, v, decided.weights, never, [7, 1, 22])
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)
    assert cache.compression_ratio() == 1
    torch.testing.assert_close(
        attend(rotated_q, rotated_k, columns.values, cm.attention_bias(columns.hidden)), plain, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dim", [-1, 2])
def test_decisions_come_from_one_dimension(dim):
    q, k, *_ = inputs(5, seed=12)
    decided = cm.decisions(q, k, dim)
    for h in range(KEY_HEADS):
        mean = (q[:, 2 * h, :, dim] + q[:, 2 * h + 1, :, dim]) / 2
        expected = 1 / (1 + (-mean - 5).exp()) + 0.0078125
        torch.testing.assert_close(decided.weights[:, h], expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(decided.logits[:, h], k[:, h, :, dim] - 5)
    assert bool((decided.q[..., dim] == 0).all() and (decided.k[..., dim] == 0).all())
    keep = [i for i in range(WIDTH) if i != dim % WIDTH]
    assert torch.equal(decided.k[..., keep], k[..., keep])
    assert cm.decisions(q.bfloat16(), k.bfloat16()).logits.dtype == torch.float32
    with pytest.raises(ValueError, match="multiple of the key heads: 3, 2"):
        cm.decisions(q[:, :3], k)


def test_relaxed_noise_is_logistic_and_drawn_from_the_generator():
    logits = torch.zeros(200_000)
    draw = [cm.relaxed(logits, torch.Generator().manual_seed(1), tau=0.1) for _ in range(2)]
    assert torch.equal(*draw)
    # The logistic distribution: mean 0, variance pi^2 / 3; dividing by tau gives the scale.
    assert abs(draw[0].mean().item() * 0.1) < 0.02
    assert abs(draw[0].var().item() * 0.01 / (torch.pi**2 / 3) - 1) < 0.02


def test_straight_through_is_hard_with_a_soft_gradient():
    z = torch.tensor([-2.0, 0.0, 0.5, 3.0], requires_grad=True)
    d = cm.straight_through(z)
    torch.testing.assert_close(d.detach(), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    (grad,) = torch.autograd.grad(d.sum(), z)
    soft = z.detach().sigmoid()
    torch.testing.assert_close(grad, soft * (1 - soft))


def test_auxiliary_loss_counts_each_row_by_itself():
    d = torch.zeros(3, 2, 2, 8)
    d[1, :, :, :2] = 1.0
    d[2] = 1.0
    torch.testing.assert_close(cm.auxiliary_loss(d, 2.0), torch.tensor((0.5 + 0.25 + 0.0) / 3))
    real = torch.ones(3, 8, dtype=torch.bool)
    real[1, 4:] = False
    torch.testing.assert_close(cm.auxiliary_loss(d, 2.0, real), torch.tensor((0.5 + 0.0 + 0.0) / 3))
    with pytest.raises(ValueError, match="at least 1"):
        cm.auxiliary_loss(d, 0.5)


@pytest.mark.parametrize("ratio", [2.0, 4.0])
def test_auxiliary_loss_drives_merging_to_the_ratio(ratio):
    # The loss never pushes back, so a step or a momentum too large stays, and so does what the noise of few decisions
    # adds: small steps along a ramp, and many decisions.
    make = torch.Generator().manual_seed(13)
    start = -1 + torch.randn(1, 2, 32768, generator=make)
    shift = torch.zeros(2, 1, requires_grad=True)
    for i in range(250):
        now = 1 + (ratio - 1) * min(1, i / 200)
        log_odds = cm.relaxed(start + shift, make)
        (grad,) = torch.autograd.grad(cm.auxiliary_loss(cm.straight_through(log_odds), now), shift)
        with torch.no_grad():
            shift -= 0.2 * grad
    merged = (cm.relaxed((start + shift.detach()).repeat(8, 1, 1), make) > 0).float().mean().item()
    assert abs(merged / (1 - 1 / ratio) - 1) < 0.02


def test_bfloat16_keys_are_averaged_in_float32():
    _, k, v, weights, logits = inputs(50, 2.0, seed=14)
    k, v, weights = k.bfloat16(), v.bfloat16(), weights.float()
    columns = cm.parallel(k, v, weights, cm.hard(logits.float()))
    wide = cm.parallel(k.double(), v.double(), weights.double(), cm.hard(logits))
    assert columns.keys.dtype == torch.bfloat16
    # Rounding the result is the only loss beyond float32.
    torch.testing.assert_close(columns.keys.double(), wide.keys, rtol=2**-8, atol=1e-6)
    state = cm.initial_state(ROWS, KEY_HEADS, WIDTH, WIDTH + 1, dtype=torch.bfloat16)
    update, state = cm.step(state, k, v, weights, logits > 0)
    assert state["recent_weights"].dtype == torch.float32
    torch.testing.assert_close(update.keys.double(), wide.keys, rtol=2**-8, atol=1e-6)


def test_step_leaves_its_state_as_it_was_and_says_what_happened():
    _, k, v, weights, _ = inputs(4, seed=15, rows=1)
    merge = torch.tensor([[[True, True, False, True], [False, False, False, False]]])
    state = cm.initial_state(1, KEY_HEADS, WIDTH, WIDTH + 1, dtype=torch.float64)
    before = {name: x.clone() for name, x in state.items()}
    update, after = cm.step(state, k, v, weights, merge)
    assert all(torch.equal(before[name], state[name]) for name in state)
    assert update.opens.tolist() == [[[True, False, True, False], [True] * 4]]
    assert update.overwrites.tolist() == [[[False, True, False, True], [False] * 4]]
    assert update.survives.tolist() == [[[False, True, False, True], [True] * 4]]
    assert update.run.tolist() == [[[1, 2, 1, 2], [1] * 4]]
    assert update.positions.tolist() == [[0, 1, 2, 3]]
    assert after["run"].tolist() == [[2, 1]]
    # Head 0 holds 2 slots and its first token overwrites the last of them; head 1 holds 4 and opens two more.
    merge = torch.tensor([[[True, False, True], [False, False, True]]])
    update, _ = cm.step(after, *(x[:, :, :3] for x in (k, v, weights)), merge=merge)
    mask = cm.step_mask(update, torch.tensor([[2, 4]]), 5)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1, 0, 1]]
    assert mask[0, 1].int().tolist() == [[1, 1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 1, 0, 1]]


def test_a_window_holds_the_token_itself():
    with pytest.raises(ValueError, match="window >= 1"):
        cm.initial_state(1, 1, 2, window=0)
