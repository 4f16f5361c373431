"""Fast weights: the chunk form and the step against the token loop with autograd gradients, in float64."""

import pytest
import torch
from torch import Tensor

from mnemic.ops import fast_weights
from mnemic.ops.fast_weights import FastWeights, Rule

WIDTH = 3
SHAPES = {1: [(WIDTH, WIDTH)], 2: [(5, WIDTH), (WIDTH, 5)], 3: [(5, WIDTH), (4, 5), (WIDTH, 4)]}


def learned(depth: int, heads: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    return tuple(
        (torch.randn(heads, *shape, generator=make, dtype=torch.float64) * 0.5).requires_grad_()
        for shape in SHAPES[depth]
    )


def tokens(batch: int, length: int, heads: int = 2, seed: int = 1) -> list[Tensor]:
    """q, k, v, eta, theta, alpha, all leaves; queries and keys of length 1, so that the weights stay small."""
    make = torch.Generator().manual_seed(seed)
    wide = [torch.randn(batch, length, heads, WIDTH, generator=make, dtype=torch.float64) for _ in range(3)]
    gates = [torch.rand(batch, length, heads, generator=make, dtype=torch.float64) for _ in range(3)]
    wide[:2] = [x / x.norm(dim=-1, keepdim=True) for x in wide[:2]]
    gates = [gate * most for gate, most in zip(gates, (0.8, 0.4, 1.0), strict=True)]
    return [x.requires_grad_() for x in wide + gates]


def run(inputs: list[Tensor], state: FastWeights, rule: Rule, **options) -> tuple[Tensor, FastWeights]:
    q, k, v, eta, theta, alpha = inputs
    return fast_weights.run(q, k, v, eta, theta, alpha, state, rule, **options)


def loop(inputs: list[Tensor], state: FastWeights, rule: Rule, **options) -> tuple[Tensor, FastWeights]:
    q, k, v, eta, theta, alpha = inputs
    return fast_weights.naive(q, k, v, eta, theta, alpha, state, rule, **options)


def cut(inputs: list[Tensor], begin: int, end: int) -> list[Tensor]:
    return [x[:, begin:end] for x in inputs]


def assert_state(a: FastWeights, b: FastWeights, tolerance: float = 1e-10) -> None:
    assert a.named().keys() == b.named().keys()
    for name, tensor in a.named().items():
        torch.testing.assert_close(tensor, b.named()[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_gradients(fast: tuple, slow: tuple, leaves: list[Tensor]) -> None:
    """Of a random projection of the outputs and the end state."""
    grads = []
    for y, state in (fast, slow):
        make = torch.Generator().manual_seed(9)
        out = [y, *state.weights, *state.momentum, *state.start]
        loss = torch.stack([(o * torch.randn(o.shape, generator=make, dtype=o.dtype)).sum() for o in out]).sum()
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for leaf, a, b in zip(leaves, *grads, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_equal_the_loop(depth, chunk):
    weights, inputs, rule = learned(depth), tokens(1, 19), Rule(chunk=chunk)
    state = fast_weights.first(weights, 1)
    fast = run(inputs, state, rule)
    slow = loop(inputs, state, rule)
    torch.testing.assert_close(fast[0], slow[0], rtol=0, atol=1e-10)
    assert_state(fast[1], slow[1])
    assert_same_gradients(fast, slow, [*inputs, *weights])


VARIANTS = {
    "sum": {"loss": "sum"},
    "mean": {"loss": "mean"},
    "residual": {"residual": True},
    "plain": {"residual": False},
    "clamp": {"max_norm": 0.7, "loss": "sum"},
}


@pytest.mark.parametrize("pulled", [False, True], ids=["to_zero", "to_initial"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_loop_over_split_calls(variant, depth, pulled):
    weights, inputs, rule = learned(depth), tokens(1, 8), Rule(chunk=3, **VARIANTS[variant])
    options = {"decay_to": weights if pulled else None}
    state = fast_weights.first(weights, 1)
    slow = loop(inputs, state, rule, **options)
    ys = []
    for begin, end in [(0, 1), (1, 7), (7, 8)]:
        y, state = run(cut(inputs, begin, end), state, rule, **options)
        ys.append(y)
    y = torch.cat(ys, 1)
    torch.testing.assert_close(y, slow[0], rtol=0, atol=1e-10)
    assert_state(state, slow[1])
    assert_same_gradients((y, state), slow, [*inputs, *weights])


def test_the_clamp_bounds_the_step_and_is_off_for_small_gradients():
    weights, inputs = learned(2), tokens(1, 1)
    inputs[3] = torch.zeros_like(inputs[3])
    inputs[4] = torch.ones_like(inputs[4])
    state = fast_weights.first(weights, 1)

    def norms(max_norm):
        _, after = run(inputs, state, Rule(chunk=4, max_norm=max_norm))
        return torch.stack([s.square().sum((-1, -2)) for s in after.momentum]).sum(0).sqrt()

    free = norms(None)
    torch.testing.assert_close(norms(1e6), free)
    assert bool((norms(0.1) < 0.1).all())
    torch.testing.assert_close(norms(0.1), free / (1 + (free / 0.1) ** 2).sqrt())


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[1] * 23, [5, 1, 7, 2, 8], [4, 4, 15], [22, 1], [3, 0, 20]], ids=str)
def test_any_split_equals_one_call(depth, sizes):
    weights, inputs, rule = learned(depth), tokens(2, 23), Rule(chunk=4)
    whole, end = run(inputs, fast_weights.first(weights, 2), rule)
    state, parts, begin = fast_weights.first(weights, 2), [], 0
    for size in sizes:
        part, state = run(cut(inputs, begin, begin + size), state, rule)
        parts.append(part)
        begin += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    assert_state(state, end, 1e-11)
    assert state.position.tolist() == [3, 3]


def ragged(inputs: list[Tensor], real: Tensor, state: FastWeights, rule: Rule, row: int) -> tuple[Tensor, FastWeights]:
    """One row alone, its real tokens only."""
    alone = FastWeights.of({name: t[row : row + 1] for name, t in state.named().items()})
    return run([x[row : row + 1, real[row]] for x in inputs], alone, rule)


@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize("depth", [1, 2])
def test_ragged_rows_equal_each_row_alone(depth, length):
    weights, rule, batch = learned(depth), Rule(chunk=4), 5
    make = torch.Generator().manual_seed(length)
    # The rows reach the second call at positions 0, 1, 2, 3, 0 of their chunk.
    before = torch.arange(7)[None] < torch.tensor([0, 1, 6, 7, 4])[:, None]
    _, state = run(tokens(batch, 7), fast_weights.first(weights, batch), rule, real=before)
    assert state.position.tolist() == [0, 1, 2, 3, 0]
    leaves = {name: t.detach().requires_grad_() for name, t in state.named().items() if name != "n"}
    state = FastWeights.of(leaves | {"n": state.position})
    real = torch.rand(batch, length, generator=make) < 0.6
    real[0], real[1] = True, False
    inputs = tokens(batch, length, seed=3)
    y, after = run(inputs, state, rule, real=real)
    assert torch.equal(y[~real], torch.zeros_like(y[~real]))
    for row in range(batch):
        alone, end = ragged(inputs, real, state, rule, row)
        torch.testing.assert_close(y[row, real[row]], alone[0], rtol=0, atol=1e-11)
        for name, tensor in after.named().items():
            torch.testing.assert_close(tensor[row], end.named()[name][0], rtol=0, atol=1e-11)
    slow = loop(inputs, state, rule, real=real)
    assert_same_gradients((y, after), slow, [*inputs, *weights])


@pytest.mark.parametrize("length", [1, 6])
def test_tokens_that_are_not_real_change_nothing_at_all(length):
    weights, rule = learned(2), Rule(chunk=4)
    _, state = run(tokens(2, 6), fast_weights.first(weights, 2), rule)
    real = torch.zeros(2, length, dtype=torch.bool)
    real[1] = True
    inputs = [torch.where(real.view(2, length, *[1] * (x.dim() - 2)), x, torch.nan) for x in tokens(2, length, seed=4)]
    y, after = run(inputs, state, rule, real=real)
    assert bool(y.isfinite().all())
    for name, tensor in after.named().items():
        assert torch.equal(tensor[0], state.named()[name][0]), name
        assert not torch.equal(tensor[1], state.named()[name][1]) or (name == "n" and length == 4) or name[0] == "c"


def test_rows_do_not_see_each_other():
    weights, inputs, rule = learned(2), tokens(3, 9), Rule(chunk=4)
    y, end = run(inputs, fast_weights.first(weights, 3), rule)
    changed = [torch.cat([x[:1], x[1:] * 0.5]) for x in inputs]
    other, after = run(changed, fast_weights.first(weights, 3), rule)
    torch.testing.assert_close(other[0], y[0], rtol=0, atol=1e-13)
    assert not torch.allclose(other[1], y[1])
    for name, tensor in after.named().items():
        torch.testing.assert_close(tensor[0], end.named()[name][0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("depth", [1, 2])
def test_outputs_before_a_token_do_not_depend_on_it(depth):
    inputs, rule = tokens(1, 11), Rule(chunk=4)
    state = fast_weights.first(learned(depth), 1)
    y, _ = run(inputs, state, rule)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[:, 6] *= 0.5
    other, _ = run(changed, state, rule)
    assert torch.equal(y[:, :6], other[:, :6])
    assert not torch.allclose(y[:, 6:], other[:, 6:])


@pytest.mark.parametrize("eta, alpha", [(0.0, 0.3), (0.5, 0.0), (0.5, 1.0), (1.0, 0.5), (0.0, 1.0)])
def test_gates_at_their_ends_have_exact_values_and_gradients(eta, alpha):
    weights, inputs, rule = learned(1), tokens(1, 9), Rule(chunk=4)
    inputs[3] = torch.full_like(inputs[3], eta).requires_grad_()
    inputs[5] = torch.full_like(inputs[5], alpha).requires_grad_()
    state = fast_weights.first(weights, 1)
    fast, slow = run(inputs, state, rule), loop(inputs, state, rule)
    torch.testing.assert_close(fast[0], slow[0], rtol=0, atol=1e-10)
    assert_same_gradients(fast, slow, [*inputs, *weights])


def test_the_chunk_length_is_part_of_the_model():
    state, inputs = fast_weights.first(learned(1), 1), tokens(1, 8)
    ys = [run(inputs, state, Rule(chunk=b))[0] for b in (1, 4)]
    torch.testing.assert_close(ys[0][:, 0], ys[1][:, 0])
    assert not torch.allclose(ys[0][:, 1:], ys[1][:, 1:])


def test_momentum_is_carried_over_chunk_borders():
    state, inputs = fast_weights.first(learned(1), 1), tokens(1, 2)
    inputs[4] = torch.tensor([0.5, 0.0], dtype=torch.float64)[None, :, None].expand_as(inputs[4])
    _, one = run(cut(inputs, 0, 1), state, Rule(chunk=1))
    _, two = run(inputs, state, Rule(chunk=1))
    torch.testing.assert_close(two.momentum[0], inputs[3][:, 1, :, None, None] * one.momentum[0])


def test_spans_of_chunks_change_nothing(monkeypatch):
    weights, inputs, rule = learned(2), tokens(1, 18), Rule(chunk=4)
    state = fast_weights.first(weights, 1)
    whole, end = run(inputs, state, rule)
    monkeypatch.setattr(fast_weights, "_TABLE", 2 * 2 * 16)
    spans, after = run(inputs, state, rule)
    torch.testing.assert_close(spans, whole, rtol=0, atol=1e-12)
    assert_state(after, end, 1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_read_is_the_memory_at_the_weights_and_writes_nothing(depth):
    weights, rule = learned(depth), Rule(chunk=4)
    _, state = run(tokens(2, 6), fast_weights.first(weights, 2), rule)
    q, k, v, eta, theta, _ = tokens(2, 5, seed=5)
    zero = torch.zeros_like(theta)
    still = state._replace(momentum=tuple(torch.zeros_like(s) for s in state.momentum))
    y, after = run([q, k, v, eta, zero, zero], still, rule)
    torch.testing.assert_close(fast_weights.read(q, state, rule), y, rtol=0, atol=1e-12)
    for a, b in zip(after.weights, state.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 9])
def test_learns_without_autograd_and_the_state_keeps_its_size(length):
    weights, rule = learned(2), Rule(chunk=4)
    with torch.inference_mode():
        state = fast_weights.first(weights, 1)
        sizes = {name: t.shape for name, t in state.named().items()}
        for seed in range(6):
            y, state = run(tokens(1, length, seed=seed), state, rule)
            assert {name: t.shape for name, t in state.named().items()} == sizes
            assert not y.requires_grad
    assert not torch.allclose(state.weights[0], weights[0])
    memory = sum(w[0].numel() for w in weights)
    assert sum(t[0, 0].numel() for part in state[:3] for t in part) == 3 * memory


@pytest.mark.parametrize("length", [1, 9])
def test_low_precision_inputs_leave_the_state_in_float32(length):
    state = fast_weights.first(tuple(w.detach().float() for w in learned(2)), 1)
    inputs = [x.detach().bfloat16() for x in tokens(1, length)]
    plain, end = run([x.float() for x in inputs], state, Rule(chunk=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, after = run(inputs, state, Rule(chunk=4))
        assert fast_weights.read(inputs[0], after, Rule(chunk=4)).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, plain.bfloat16())
    assert_state(after, end, 0.0)


def test_the_state_goes_through_names_and_back():
    _, state = run(tokens(2, 5), fast_weights.first(learned(3), 2), Rule(chunk=4))
    named = state.named()
    assert list(named) == ["w1", "w2", "w3", "s1", "s2", "s3", "c1", "c2", "c3", "n"]
    assert all(t.shape[0] == 2 for t in named.values())
    assert named["n"].dtype == torch.int64
    assert_state(FastWeights.of(named | {"other": named["n"]}), state, 0.0)
    with pytest.raises(KeyError, match="s2"):
        FastWeights.of({n: t for n, t in named.items() if n != "s2"})


def test_what_does_not_fit_is_refused():
    state, inputs = fast_weights.first(learned(2), 2), tokens(2, 5)
    rule = Rule(chunk=4)
    with pytest.raises(ValueError, match="at least one token"):
        Rule(chunk=0)
    with pytest.raises(ValueError, match="half_sum, sum or mean"):
        Rule(chunk=1, loss="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="positive"):
        Rule(chunk=1, max_norm=0.0)
    with pytest.raises(ValueError, match="must chain"):
        fast_weights.first((torch.zeros(2, 5, 3), torch.zeros(2, 3, 4)), 1)
    with pytest.raises(ValueError, match="k must be"):
        run([inputs[0], inputs[1][..., :2], *inputs[2:]], state, rule)
    with pytest.raises(ValueError, match="alpha must be"):
        run([*inputs[:5], inputs[5][:, :1]], state, rule)
    with pytest.raises(ValueError, match="real must be bool"):
        run(inputs, state, rule, real=torch.ones(2, 5))
    with pytest.raises(ValueError, match="decay_to must"):
        run(inputs, state, rule, decay_to=learned(1))
    wide = fast_weights.first((torch.zeros(2, 4, 3, dtype=torch.float64),), 2)
    values = torch.zeros(2, 5, 2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="residual=False"):
        run([*inputs[:2], values, *inputs[3:]], wide, Rule(chunk=4, residual=True))
