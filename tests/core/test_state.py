"""State: a value with the batch first, whose operations never change it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnemic import State, StateError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


@st.composite
def states(draw, min_rows: int = 0, max_rows: int = 4) -> State:
    """A state of one to three tensors, always with a counter of shape (B,)."""
    rows = draw(st.integers(min_rows, max_rows))
    make = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensors = {"count": torch.randint(0, 9, (rows,), generator=make)}
    for i in range(draw(st.integers(0, 2))):
        shape = (rows, *draw(st.lists(st.integers(0, 3), max_size=2)))
        tensors[f"t{i}"] = torch.randn(shape, generator=make).to(draw(st.sampled_from(DTYPES)))
    return State(tensors)


quick = settings(max_examples=40, deadline=None, derandomize=True)


def rows_of(state: State) -> list[dict[str, list]]:
    return [{name: t[i].tolist() for name, t in state.items()} for i in range(state.batch_size)]


@quick
@given(states(min_rows=1), st.data())
def test_select_takes_rows_in_order_with_repeats(state, data):
    rows = data.draw(st.lists(st.integers(0, state.batch_size - 1), max_size=6))
    before = state.clone()
    chosen = state.select(rows)
    assert rows_of(chosen) == [rows_of(state)[i] for i in rows]
    assert chosen.equal(state.select(torch.tensor(rows, dtype=torch.long)))
    assert state.equal(before)


@quick
@given(states(), st.integers(1, 3))
def test_repeat_puts_copies_next_to_each_other(state, times):
    assert rows_of(state.repeat(times)) == [row for row in rows_of(state) for _ in range(times)]


@quick
@given(states(min_rows=1), st.data())
def test_put_and_where_replace_the_rows_given_and_no_others(state, data):
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=state.batch_size, max_size=state.batch_size)))
    other = state.map(lambda t: t.flip(0) if t.dtype is torch.bool else t + 1)
    before = state.clone()
    expected = [b if m else a for a, b, m in zip(rows_of(state), rows_of(other), mask.tolist(), strict=True)]
    rows = mask.nonzero().squeeze(1)
    assert rows_of(state.where(mask, other)) == expected
    assert rows_of(state.put(rows, other.select(rows))) == expected
    assert state.equal(before)
    assert state.where(mask, other).equal(other.where(~mask, state))


@quick
@given(states(), st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_cat_is_undone_by_select(state, sizes):
    parts = [state.select(torch.arange(min(n, state.batch_size))) for n in sizes]
    joined = State.cat(parts)
    assert joined.batch_size == sum(p.batch_size for p in parts)
    start = 0
    for part in parts:
        assert joined.select(range(start, start + part.batch_size)).equal(part)
        start += part.batch_size


@quick
@given(states())
def test_equal_is_bit_for_bit(state):
    assert state.equal(state.clone())
    for name, tensor in state.items():
        assert not state.equal(State({**state, name: tensor[:, None]}))
        assert not state.equal(State({n: t for n, t in state.items() if n != name}))
        if tensor.dtype is torch.float32:
            assert not state.equal(State({**state, name: tensor.double()}))
            if tensor.numel():
                assert not state.equal(State({**state, name: torch.nextafter(tensor, tensor + 1)}))


@quick
@given(states())
def test_size_in_bytes(state):
    assert state.nbytes == sum(t.numel() * t.element_size() for t in state.values())
    assert state.repeat(2).nbytes == 2 * state.nbytes


def example(rows: int = 3, requires_grad: bool = False) -> State:
    bank = torch.arange(rows * 4.0).reshape(rows, 2, 2)
    return State({"bank": bank.requires_grad_(requires_grad), "count": torch.arange(rows)})


def test_is_a_mapping_and_says_what_it_holds():
    state = example()
    assert list(state) == ["bank", "count"]
    assert len(state) == 2
    assert dict(state)["count"] is state["count"]
    assert repr(state) == "State(bank: (3, 2, 2) float32, count: (3,) int64)"
    assert "bank" in state
    assert "keys" not in state


def test_the_set_of_tensors_cannot_be_changed():
    tensors = {"count": torch.zeros(2)}
    state = State(tensors)
    tensors["late"] = torch.zeros(2)
    assert list(state) == ["count"]
    with pytest.raises(TypeError):
        state["count"] = torch.ones(2)
    with pytest.raises(AttributeError):
        state.extra = 1


def test_empty_states():
    empty = State()
    assert empty.batch_size is None
    assert empty.nbytes == 0
    assert empty.equal(State({}))
    assert empty.select([0, 0]).equal(empty)
    assert State.cat([empty, empty]).equal(empty)
    assert example(0).batch_size == 0


@pytest.mark.parametrize(
    "tensors",
    [{"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": torch.tensor(1.0)}, {"a": torch.zeros(2), "b": torch.tensor(0)}],
    ids=["two-sizes", "scalar", "scalar-among-others"],
)
def test_tensors_without_a_common_batch_are_refused(tensors):
    with pytest.raises(StateError, match="batch as its first dimension"):
        State(tensors)


@pytest.mark.parametrize(
    "other",
    [
        State({"bank": torch.zeros(3, 2, 2)}),
        State({"bank": torch.zeros(3, 2, 3), "count": torch.arange(3)}),
        State({"bank": torch.zeros(3, 2, 2).double(), "count": torch.arange(3)}),
    ],
    ids=["name", "shape", "dtype"],
)
def test_states_of_different_memories_are_not_mixed(other):
    state, mask = example(), torch.tensor([True, False, True])
    for mix in (
        lambda: state.put([0, 1, 2], other),
        lambda: state.where(mask, other),
        lambda: State.cat([state, other]),
    ):
        with pytest.raises(StateError, match="different memories"):
            mix()
    with pytest.raises(StateError, match="at least one"):
        State.cat([])


@pytest.mark.parametrize("name", ["archive", "rmt-1m/archive"])
def test_what_grows_is_filled_up_with_zeros_where_rows_meet(name):
    short, long = (State({name: torch.ones(2, n, 3), "count": torch.full((2,), n)}) for n in (1, 4))
    both = State.cat([short, long])
    assert both[name].shape == (4, 4, 3)
    assert both[name].sum(dim=(1, 2)).tolist() == [3, 3, 12, 12]
    assert both.select([2, 3]).equal(long)
    for mixed in (short.put([1], long.select([0])), short.where(torch.tensor([False, True]), long)):
        assert mixed[name].sum(dim=(1, 2)).tolist() == [3, 12]
        assert mixed["count"].tolist() == [1, 4]
    for other in (torch.ones(2, 4, 2), torch.ones(2, 4, 3, 1), torch.ones(2, 4, 3).double()):
        with pytest.raises(StateError, match="different memories"):
            State.cat([short, State({name: other, "count": torch.ones(2).long()})])


def test_detach_cuts_all_rows_or_the_rows_of_a_mask():
    state = example(requires_grad=True)
    assert not state.detach()["bank"].requires_grad
    cut = state.detach(torch.tensor([True, False, True]))
    assert cut.equal(state)
    cut["bank"].sum().backward()
    assert state["bank"].grad.flatten(1).sum(1).tolist() == [0, 4, 0]


def test_operations_keep_the_graph():
    state = example(requires_grad=True)
    joined = State.cat([state.select([2]), state.put([0], state.select([1])), state.repeat(2)])
    joined["bank"].sum().backward()
    assert state["bank"].grad.flatten(1).sum(1).tolist() == [8, 16, 16]


def test_to_changes_the_dtype_of_floats_only():
    half = example().to(torch.bfloat16)
    assert (half["bank"].dtype, half["count"].dtype) == (torch.bfloat16, torch.int64)
    assert half.to(torch.float32).equal(example())
    moved = example().to("meta", torch.float64)
    assert {t.device.type for t in moved.values()} == {"meta"}
    assert (moved["bank"].dtype, moved["count"].dtype) == (torch.float64, torch.int64)
    assert {t.device.type for t in example().to(device="meta").values()} == {"meta"}


def test_clone_shares_no_memory():
    state = example()
    twin = state.clone()
    twin["bank"].zero_()
    assert state.equal(example())
    assert isinstance(state["bank"], Tensor)
