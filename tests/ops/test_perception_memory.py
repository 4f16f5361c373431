"""The block of PMI against the equations written out one number, head and slot at a time, in float64."""

import pytest
import torch
from torch import Tensor

from mnemic.ops.perception_memory import PerceptionMemory, attend

WIDTH, SLOTS, BANKS, HEADS, TOP = 6, 4, 3, 2, 2


def block(**options) -> PerceptionMemory:
    torch.manual_seed(0)
    made = PerceptionMemory(
        WIDTH, dtype=torch.float64,
        **{"num_slots": SLOTS, "num_banks": BANKS, "num_heads": HEADS, "top_k": TOP, **options},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def given(tokens: int = 5, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    shapes = [(rows, tokens, WIDTH), (rows, SLOTS, WIDTH), (rows, BANKS, SLOTS, WIDTH)]
    x, working, long_term = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    return x, working, long_term


def a(own: PerceptionMemory, queries: list[Tensor], others: list[Tensor], top: int | None = None) -> list[Tensor]:
    """A(queries; others), for vectors of one row."""
    size, read = WIDTH // HEADS, []
    for q in queries:
        heads = []
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            asked = own.query(q)[part]
            raised = [torch.exp((asked * own.key(o)[part]).sum()) for o in others]
            total = torch.stack(raised).sum()
            weights = [r / total for r in raised]
            if top is not None:
                best = sorted(range(len(others)), key=lambda j, w=weights: -float(w[j].detach()))[:top]
                weights = [w if j in best else 0 * w for j, w in enumerate(weights)]
            heads.append(sum(w * own.value(o)[part] for w, o in zip(weights, others, strict=True)))
        read.append(torch.cat(heads))
    return read


def write_by_hand(own: PerceptionMemory, x: Tensor, working: Tensor, long_term: Tensor | None):
    """One row: x (T, D) after the input projection, working (N, D), long_term (C, N, D)."""
    old, attended = list(working), a(own, list(working), list(x), TOP)
    slots = []
    for w, got in zip(old, attended, strict=True):
        m = own.norm1(w + got)
        z = torch.relu(own.feed_forward(torch.relu(own.feed_forward(m))))
        slots.append(own.norm2(m + z))
    after = None
    if long_term is not None:
        assert own.norm3 is not None
        after = torch.stack(
            [torch.stack([own.norm3(r + r.sum() * slots[n]) for n, r in enumerate(bank)]) for bank in long_term]
        )
    mean = torch.stack([torch.relu(own.gate_scale * t) for t in x]).mean(0)
    new = []
    for n, w in enumerate(old):
        drive = own.gate_input(mean) + torch.tanh(w) @ own.gate_slots[n] + own.gate_slots_bias[n]
        put = torch.sigmoid(drive[:WIDTH] + own.input_bias)
        keep = torch.sigmoid(drive[WIDTH:] + own.forget_bias)
        new.append(put * torch.tanh(slots[n]) + keep * w)
    return torch.stack(new), after


def read_by_hand(own: PerceptionMemory, x: Tensor, working: Tensor, long_term: Tensor | None, causal: bool) -> Tensor:
    fast = a(own, list(x), list(working))
    if long_term is None:
        return torch.stack(fast)
    slow = a(own, list(x), list(long_term.mean(0)), TOP)
    if own.correction:
        slow = [a(own, [s], fast[: t + 1] if causal else fast)[0] for t, s in enumerate(slow)]
    return torch.stack([own.mixing * f + (1 - own.mixing) * s for f, s in zip(fast, slow, strict=True)])


@pytest.mark.parametrize(
    "options",
    [{}, {"correction": False}, {"num_banks": 0}, {"mixing": 0.0}],
    ids=["all", "uncorrected", "fast", "slow"],
)
def test_the_encoders_block_equals_the_equations_forward_and_backward(options):
    own, (x, working, long_term) = block(**options), given()
    slow = long_term if own.num_banks else None
    out, fast, after = own(x, working, slow)
    rows = []
    for b in range(len(x)):
        tokens = own.input(x[b])
        written = write_by_hand(own, tokens, working[b], None if slow is None else slow[b])
        rows.append((read_by_hand(own, tokens, *written, causal=False), *written))
    mine = [out, fast, *([] if after is None else [after])]
    theirs = [torch.stack(t) for t in zip(*rows, strict=True) if t[0] is not None]
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    weights = [torch.randn_like(t) for t in mine]
    inputs = [x, working, long_term, *own.parameters()]
    grads = [
        torch.autograd.grad(
            torch.stack([(t * w).sum() for t, w in zip(side, weights, strict=True)]).sum(), inputs, allow_unused=True
        )
        for side in (mine, theirs)
    ]
    for got, expected in zip(*grads, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


def test_a_causal_reading_equals_the_equations():
    own, (x, working, long_term) = block(), given()
    fast, slow = own.readings(x, own.keys_values(working), own.keys_values(long_term.mean(1)))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    out = own.joined(fast, slow, own.keys_values(fast), seen)
    expected = [read_by_hand(own, x[b], working[b], long_term[b], causal=True) for b in range(2)]
    torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=1e-10)


def test_padding_is_neither_written_nor_seen():
    own, (x, working, long_term) = block(), given()
    real = torch.tensor([[True] * 3 + [False] * 2, [False, True, True, True, True]])
    out, fast, slow = own(x, working, long_term, real)
    for b in range(2):
        alone = own(x[b : b + 1, real[b]], working[b : b + 1], long_term[b : b + 1])
        for got, expected in zip((out[b : b + 1, real[b]], fast[b : b + 1], slow[b : b + 1]), alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_weights_that_are_kept_are_not_normalised_again():
    torch.manual_seed(0)
    query, keys = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 3, 7, 4).double()
    ones = torch.ones(2, 3, 7, 1).double()
    whole = (query @ keys.transpose(-1, -2)).softmax(-1)
    sums = attend(query, keys, ones, 2).transpose(1, 2)
    torch.testing.assert_close(sums, whole.topk(2).values.sum(-1), rtol=0, atol=1e-12)
    assert float(sums.max()) < 1
    assert torch.equal(attend(query, keys, ones, 7), attend(query, keys, ones))
    assert torch.equal(attend(query, keys, ones, 9), attend(query, keys, ones))


def test_a_query_that_sees_nothing_reads_zeros_and_has_no_gradient():
    query = torch.randn(1, 1, 2, 4, requires_grad=True)
    seen = torch.tensor([[True, False, True], [False, False, False]])
    read = attend(query, torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), seen=seen)
    read.sum().backward()
    assert torch.equal(read[0, 1], torch.zeros(4))
    assert query.grad is not None
    assert bool(query.grad[0, 0, 0].any())
    assert not bool(query.grad[0, 0, 1].any())


def test_first_memories_are_unit_vectors_and_numbers_from_0_to_1():
    own = PerceptionMemory(6, num_slots=4, num_banks=2, num_heads=2)
    working, long_term = own.first(3, torch.Generator().manual_seed(0))
    assert torch.equal(working, torch.eye(6)[:4].expand(3, -1, -1))
    assert long_term is not None
    assert long_term.shape == (3, 2, 4, 6)
    assert 0 <= float(long_term.min()) < float(long_term.max()) < 1
    assert torch.equal(long_term[0], long_term[2])
    wide = PerceptionMemory(2, num_slots=4, num_banks=0, num_heads=2)
    assert torch.equal(wide.first(1)[0][0], torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))


def test_at_the_start_only_a_first_write_moves_the_long_term_memory():
    """LayerNorm without learned weights makes the sum that a write multiplies by zero; with some it moves."""
    torch.manual_seed(0)
    own = PerceptionMemory(6, num_slots=4, num_banks=2, num_heads=2, dtype=torch.float64)
    x, (working, first) = torch.randn(1, 5, 6).double(), own.first(1)
    with torch.no_grad():
        working, second = own.write(x, working, first)
        assert first is not None
        assert second is not None
        third = own.write(torch.randn_like(x), working, second)[1]
        assert float((second - first).abs().max()) > 0.1
        # What is left of a norm's normalised rows is its epsilon, 1e-5.
        torch.testing.assert_close(third, second, rtol=0, atol=1e-4)
        assert own.norm3 is not None
        own.norm3.weight.normal_()
        moved = own.write(torch.randn_like(x), working, own.norm3(first))[1]
        assert moved is not None
        assert float((moved - own.norm3(first)).abs().max()) > 0.1


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="num_heads = 4 does not divide the width 6"):
        PerceptionMemory(6, num_heads=4)
