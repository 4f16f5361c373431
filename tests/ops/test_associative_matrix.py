"""Associative matrix: against loops in float64, values and gradients; rewriting; capacity."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnemic.ops import associative_matrix as am

EPS = 1e-5
leads = st.lists(st.integers(1, 2), max_size=3)
sizes = st.integers(1, 3)
seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None, derandomize=True)


def naive_dpfp(x: Tensor, nu: int) -> Tensor:
    """One vector (d,)."""
    u = [max(v, v * 0) for v in x] + [max(-v, v * 0) for v in x]
    return torch.stack([u[i] * u[(i - r) % len(u)] for r in range(1, nu + 1) for i in range(len(u))])


def naive_read(features: Tensor, matrix: Tensor, normaliser: Tensor) -> Tensor:
    """One row: features (T, D), matrix (d, D), normaliser (D,) -> (T, d)."""
    out = []
    for phi in features:
        below = sum(normaliser[c] * phi[c] for c in range(len(phi))) + EPS
        out.append(torch.stack([sum(line[c] * phi[c] for c in range(len(phi))) / below for line in matrix]))
    return torch.stack(out)


def naive_write(features, values, beta, matrix, normaliser, first: bool, gamma: str) -> tuple[Tensor, Tensor]:
    """One row, memory token by memory token, all against the state that entered."""
    new_matrix, new_normaliser = matrix, normaliser
    for phi, value, strength in zip(features, values, beta, strict=True):
        known = (normaliser * phi).sum()
        returned = torch.zeros_like(value) if first else matrix @ phi / (known + EPS)
        share = torch.ones_like(known)
        if not first and gamma == "delta":
            share = (1 - known / ((phi * phi).sum() + EPS)).clamp(0, 1).detach()
        new_matrix = new_matrix + strength * torch.outer(value - returned, phi)
        new_normaliser = new_normaliser + share * phi
    return new_matrix, new_normaliser


def by_rows(function, lead: tuple[int, ...], *tensors: Tensor) -> list[Tensor]:
    """`function` on every index of the leading dimensions, outputs stacked back."""
    flat = [t.reshape(-1, *t.shape[len(lead) :]) for t in tensors]
    rows = [function(*row) for row in zip(*flat, strict=True)]
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [torch.stack(parts).view(*lead, *parts[0].shape) for parts in zip(*rows, strict=True)]


def make_inputs(lead: list[int], tokens: int, width: int, features: int, seed: int) -> list[Tensor]:
    """features, values, beta, matrix, normaliser: leaves; features and normaliser positive, as DPFP makes them."""
    make = torch.Generator().manual_seed(seed)
    new = lambda *size: torch.randn(*lead, *size, generator=make, dtype=torch.float64)  # noqa: E731
    made = [
        new(tokens, features).relu() + 0.1, new(tokens, width), new(tokens).sigmoid(), new(width, features),
        0.2 + new(features).abs(),
    ]  # fmt: skip
    return [x.requires_grad_() for x in made]


def assert_same(fast: list[Tensor], slow: list[Tensor], leaves: list[Tensor]) -> None:
    make = torch.Generator().manual_seed(1)
    weights = [torch.randn(f.shape, generator=make, dtype=f.dtype) for f in fast]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(outputs, leaves, weights, allow_unused=True) for outputs in (fast, slow)]
    for leaf, a, b in zip(leaves, *grads, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=0, atol=1e-8)


@few
@given(leads, sizes, st.integers(1, 6), seeds)
def test_dpfp_equals_loops(lead, width, nu, seed):
    nu = min(nu, 2 * width)
    x = torch.randn(*lead, 2, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x.requires_grad_()
    fast = am.dpfp(x, nu)
    slow = by_rows(lambda v: naive_dpfp(v, nu), (*lead, 2), x)
    assert fast.shape == (*lead, 2, 2 * nu * width)
    assert bool((fast >= 0).all())
    assert_same([fast], slow, [x])


def test_dpfp_refuses_rolls_that_repeat():
    for nu in (0, 5):
        with pytest.raises(ValueError, match="expected 1 <= nu <= 4"):
            am.dpfp(torch.zeros(3, 2), nu)


@few
@given(leads, sizes, sizes, st.integers(1, 5), seeds)
def test_read_equals_loops(lead, tokens, width, features, seed):
    queries, _, _, matrix, normaliser = make_inputs(lead, tokens, width, features, seed)
    leaves = [queries, matrix, normaliser]
    assert_same([am.read(*leaves)], by_rows(naive_read, tuple(lead), *leaves), leaves)


@few
@given(leads, sizes, sizes, st.integers(1, 5), seeds, st.sampled_from(["delta", "one"]), st.booleans())
def test_write_equals_loops(lead, tokens, width, features, seed, gamma, flagged):
    leaves = make_inputs(lead, tokens, width, features, seed)
    first = torch.rand(lead, generator=torch.Generator().manual_seed(seed)) < 0.5 if flagged else None
    fast = am.write(*leaves, first=first, gamma=gamma)
    flags = torch.zeros(lead, dtype=torch.bool) if first is None else first
    slow = by_rows(
        lambda *row: naive_write(*row[:-1], first=bool(row[-1]), gamma=gamma), tuple(lead), *leaves, flags
    )  # fmt: skip
    assert_same(list(fast), slow, leaves)


def test_gamma_is_a_constant_for_gradients():
    leaves = make_inputs([], 2, 3, 4, seed=3)
    *_, normaliser = leaves
    (grad,) = torch.autograd.grad(am.write(*leaves)[1].sum(), normaliser)
    assert torch.equal(grad, torch.ones_like(grad))


def test_rows_and_layers_in_one_call_equal_one_call_each():
    leaves = make_inputs([2, 3], 2, 3, 4, seed=5)
    first = torch.tensor([True, False])
    matrix, normaliser = am.write(*leaves, first=first[:, None])
    for b in range(2):
        for layer in range(3):
            one = am.write(*(x[b, layer] for x in leaves), first=first[b])
            torch.testing.assert_close(matrix[b, layer], one[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(normaliser[b, layer], one[1], rtol=0, atol=1e-12)


def test_an_empty_matrix_reads_zero_and_needs_no_flag():
    features, values, beta, _, _ = make_inputs([2], 3, 4, 5, seed=6)
    empty = torch.zeros(2, 4, 5, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    assert torch.equal(am.read(features, *empty), torch.zeros(2, 3, 4, dtype=torch.float64))
    plain = am.write(features, values, beta, *empty)
    flagged = am.write(features, values, beta, *empty, first=torch.tensor([True, True]))
    for a, b in zip(plain, flagged, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gamma", ["delta", "one"])
def test_writing_a_known_key_again_replaces_its_value_only_with_the_delta_gamma(gamma):
    make = torch.Generator().manual_seed(0)
    phi = am.dpfp(torch.randn(1, 64, generator=make))
    old, new = torch.randn(2, 1, 64, generator=make)
    state = torch.zeros(64, 384), torch.zeros(384)
    once = am.write(phi, old, torch.ones(1), *state)
    torch.testing.assert_close(am.read(phi, *once), old, rtol=0, atol=1e-5)
    twice = am.write(phi, new, torch.ones(1), *once, gamma=gamma)
    read = am.read(phi, *twice)
    if gamma == "delta":
        torch.testing.assert_close(read, new, rtol=0, atol=2e-6)
        torch.testing.assert_close(twice[1], once[1], rtol=0, atol=2e-6)
    else:
        # z has counted the key twice and A holds only the new value.
        torch.testing.assert_close(read, new / 2, rtol=0, atol=1e-5)
        torch.testing.assert_close(twice[1], 2 * once[1])
        assert float((read - new).abs().max()) > 0.5


def plain_sum(features, values, beta, matrix, normaliser) -> tuple[Tensor, Tensor]:
    """The Hebbian baseline: no vbar, gamma = 1."""
    return matrix + (beta.unsqueeze(-1) * values).mT @ features, normaliser + features.sum(-2)


def recalled(write, width: int, pairs: tuple[int, ...], draws: int = 5) -> list[float]:
    """Per cent of pairs whose read is nearest (cosine) to their own value, written one at a time; mean of draws."""
    make = torch.Generator().manual_seed(0)
    most = max(pairs)
    phi = am.dpfp(torch.randn(draws, most, width, generator=make))
    values = torch.randn(draws, most, 64, generator=make)
    state = torch.zeros(draws, 64, 6 * width), torch.zeros(draws, 6 * width)
    scores = []
    for i in range(most):
        state = write(phi[:, i : i + 1], values[:, i : i + 1], torch.ones(draws, 1), *state)
        if i + 1 in pairs:
            read = F.normalize(am.read(phi[:, : i + 1], *state), dim=-1)
            chosen = (read @ F.normalize(values[:, : i + 1], dim=-1).mT).argmax(-1)
            scores.append(100 * (chosen == torch.arange(i + 1)).float().mean().item())
    return scores


# The card of ARMT, measured: 50, 100, 200 and 400 pairs.
@pytest.mark.parametrize(
    "width, expected", [(64, (99.6, 99.4, 95.0, 79.8)), (32, (92, 83, 70, 45)), (16, (68, 54, 36, 21))]
)
def test_capacity(width, expected):
    found = recalled(am.write, width, (50, 100, 200, 400))
    assert found[2] == pytest.approx(expected[2], abs=3)
    if width == 64:
        hebbian = recalled(plain_sum, width, (200,))
        assert found[2] >= hebbian[0] + 15


def test_the_state_stays_wide_under_autocast():
    features, values, beta, matrix, normaliser = (x.detach().float() for x in make_inputs([2], 3, 8, 12, seed=8))
    plain = am.write(features, values, beta, matrix, normaliser)
    with torch.autocast("cpu", torch.bfloat16):
        cast = am.write(features, values, beta, matrix, normaliser)
        assert torch.equal(am.read(features, *cast), am.read(features, *plain))
    assert cast[0].dtype == cast[1].dtype == torch.float32
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)
    narrow = am.write(features.bfloat16(), values.bfloat16(), beta.bfloat16(), matrix, normaliser)
    assert narrow[0].dtype == torch.float32


def test_what_cannot_be_written_is_refused():
    features, values, beta, matrix, normaliser = (x.detach() for x in make_inputs([2], 1, 2, 3, seed=9))
    with pytest.raises(TypeError, match=r"matrix has dtype torch\.bfloat16; keep it in float32 or float64"):
        am.read(features, matrix.bfloat16(), normaliser)
    with pytest.raises(TypeError, match=r"normaliser has dtype torch\.float16"):
        am.write(features, values, beta, matrix, normaliser.half())
    with pytest.raises(TypeError, match="expected bool"):
        am.write(features, values, beta, matrix, normaliser, first=torch.ones(2))
    with pytest.raises(ValueError, match="'delta' or 'one'"):
        am.write(features, values, beta, matrix, normaliser, gamma="half")
