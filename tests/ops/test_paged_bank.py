"""Paged bank: against a Python list of the rows that each batch row appended."""

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnemic.ops import nearest, paged_bank
from mnemic.ops.paged_bank import Bank, append, empty, order, search, take, valid, view

few = settings(max_examples=20, deadline=None, derandomize=True)
FIELDS = {"keys": ((2, 3), torch.float64), "hidden": ((4,), torch.float64), "ids": ((), torch.int64)}


def rows(batch: int, tokens: int, make: torch.Generator) -> dict[str, Tensor]:
    return {
        "keys": torch.randn(batch, 2, tokens, 3, generator=make, dtype=torch.float64),
        "hidden": torch.randn(batch, tokens, 4, generator=make, dtype=torch.float64),
        "ids": torch.randint(1, 1000, (batch, tokens), generator=make),
    }


def assert_holds(bank: Bank, said: list[list[dict[str, Tensor]]], capacity: int, page: int) -> None:
    """Every slot holds what a list of all appended rows says, and nothing else is valid."""
    for b, history in enumerate(said):
        assert bank["count"][b].item() == len(history)
        for i in range(capacity // page):
            for p in range(page):
                standing = [n for n in range(len(history)) if n % capacity == i * page + p]
                assert valid(bank, i)[b, p].item() == bool(standing)
                assert order(bank, i)[b, p].item() == (standing[-1] if standing else -1)
                if standing:
                    row = history[standing[-1]]
                    assert torch.equal(view(bank, "keys")[i][b, :, p], row["keys"])
                    assert torch.equal(view(bank, "hidden")[i][b, p], row["hidden"])
                    assert torch.equal(view(bank, "ids")[i][b, p], row["ids"])


@few
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["all", "some", "one row"])), max_size=5),
    st.integers(0, 1000),
)
def test_appending_equals_a_list_of_rows(page, num_pages, calls, seed):
    make = torch.Generator().manual_seed(seed)
    capacity, said = page * num_pages, [[], []]
    bank = empty(FIELDS, capacity, page, 2)
    for tokens, kind in calls:
        new = rows(2, tokens, make)
        real = torch.rand(2, tokens, generator=make) < 0.6
        real = torch.tensor([[True], [False]]).expand(2, tokens) if kind == "one row" else real
        bank = append(bank, new, None if kind == "all" else real)
        for b in range(2):
            for t in range(tokens):
                if kind == "all" or real[b, t]:
                    said[b].append(
                        {"keys": new["keys"][b, :, t], "hidden": new["hidden"][b, t], "ids": new["ids"][b, t]}
                    )
    assert_holds(bank, said, capacity, page)


def test_untouched_pages_are_the_same_objects_and_the_old_bank_is_unchanged():
    make = torch.Generator().manual_seed(0)
    first = append(empty(FIELDS, 12, 4, 2), rows(2, 5, make))
    before = {name: tensor.clone() for name, tensor in first.items()}
    second = append(first, rows(2, 2, make), torch.tensor([[True, True], [False, False]]))
    same = {name for name in first if second[name] is first[name]}
    assert same == {f"{name}/{i:04d}" for name in FIELDS for i in (0, 2)}
    assert all(torch.equal(before[name], first[name]) for name in first)
    nothing = append(second, rows(2, 1, make), torch.zeros(2, 1, dtype=torch.bool))
    assert all(nothing[name] is second[name] for name in second if name != "count")


def test_unwritten_pages_take_no_memory_and_stored_rows_have_no_graph():
    bank = empty({"keys": ((2, 64), torch.float32)}, 1 << 20, 1 << 18, 8)
    assert sum(t.untyped_storage().nbytes() for t in bank.values()) <= 4 * 4 + 8 * 8
    small = append(empty({"keys": ((3,), torch.float32)}, 4, 2, 1), {"keys": torch.randn(1, 2, 3, requires_grad=True)})
    assert not any(t.requires_grad for t in small.values())


def filled(batch: int, counts: list[int], capacity: int, page: int, seed: int = 0) -> Bank:
    make = torch.Generator().manual_seed(seed)
    new = rows(batch, max(counts), make)
    bank = empty(FIELDS, capacity, page, batch)
    return append(bank, new, torch.arange(max(counts)) < torch.tensor(counts)[:, None])


@pytest.mark.parametrize("counts", [[0, 0], [3, 1], [8, 5], [11, 20]])
@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_search_equals_search_over_the_pages_in_one_piece(counts, metric):
    bank = filled(2, counts, capacity=8, page=2)
    query = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys = torch.cat([p.expand(2, 2, 2, 3) for p in view(bank, "keys")], dim=2)
    seen = torch.cat([valid(bank, i) for i in range(4)], dim=1)
    scores, slots = search(query, bank, 5, metric=metric)
    expected = nearest.exact(query, keys, seen, 5, metric)
    torch.testing.assert_close(scores, expected[0].to(scores.dtype), rtol=0, atol=1e-10)
    assert torch.equal(slots, expected[1])
    for name in FIELDS:
        chosen = take(bank, name, slots)
        for b, h, t, j in slots.ge(-1).nonzero().tolist():
            slot = slots[b, h, t, j].item()
            row = view(bank, name)[slot // 2][b]
            row = {"keys": lambda r, h=h: r[h // 2], "hidden": lambda r: r, "ids": lambda r: r}[name](row)[slot % 2]
            assert torch.equal(chosen[b, h, t, j], row if slot >= 0 else torch.zeros_like(row))


def test_keys_shared_by_the_heads_are_searched_by_each():
    bank = filled(2, [8, 8], capacity=8, page=4)
    query = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    keys = torch.cat(view(bank, "hidden"), dim=1)
    assert torch.equal(search(query, bank, 3, name="hidden")[1], (query @ keys[:, None].mT).topk(3).indices)


def test_faiss_indexes_closed_pages_once_and_again_only_when_they_change(monkeypatch):
    pytest.importorskip("faiss")
    built = []
    add = nearest.FaissIndex.add
    monkeypatch.setattr(nearest.FaissIndex, "add", lambda self, v: built.append(len(v)) or add(self, v))
    make = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 3, generator=make, dtype=torch.float64)

    def same(bank: Bank) -> None:
        scores, slots = search(query, bank, 5, index="faiss", kind="flat")
        expected = search(query, bank, 5)
        assert torch.equal(slots, expected[1])
        torch.testing.assert_close(scores.double(), expected[0], rtol=1e-5, atol=1e-5)

    bank = filled(2, [9, 8], capacity=12, page=4)
    same(bank)
    # Pages 0 and 1 are full and closed: two rows, two heads each.
    assert built == [4] * 8
    bank = append(bank, rows(2, 1, make))
    same(bank)
    assert built == [4] * 8
    # Page 2 closes; then page 0 is written over and searched exactly until it is full again.
    bank = append(bank, rows(2, 3, make), torch.tensor([[True, True, False], [True, True, True]]))
    same(bank)
    assert built == [4] * 12
    bank = append(bank, rows(2, 2, make))
    same(bank)
    assert built == [4] * 12
    view(bank, "keys")[1].mul_(-1)
    same(bank)
    assert built == [4] * 16


def test_an_index_lives_as_long_as_its_page():
    pytest.importorskip("faiss")
    gc.collect()
    before = len(paged_bank._indexes)
    bank = filled(1, [9], capacity=12, page=4)
    search(torch.randn(1, 2, 1, 3), bank, 2, index="faiss", kind="flat")
    assert len(paged_bank._indexes) == before + 2
    del bank
    gc.collect()
    assert len(paged_bank._indexes) == before


def test_inference_mode_pages_can_be_indexed():
    pytest.importorskip("faiss")
    with torch.inference_mode():
        bank = filled(1, [9], capacity=12, page=4)
        query = torch.randn(1, 2, 1, 3, dtype=torch.float64)
        assert torch.equal(search(query, bank, 2, index="faiss", kind="flat")[1], search(query, bank, 2)[1])


def test_an_empty_bank_finds_nothing():
    bank = empty(FIELDS, 4, 2, 1)
    scores, slots = search(torch.randn(1, 2, 3, 3), bank, 2)
    assert slots.unique().tolist() == [-1]
    assert scores.unique().tolist() == [-math.inf]
    assert torch.equal(take(bank, "keys", slots), torch.zeros(1, 2, 3, 2, 3, dtype=torch.float64))


def test_wrong_sizes_and_names_are_refused():
    with pytest.raises(ValueError, match="multiple of the page, not 10 of pages of 4"):
        empty(FIELDS, 10, 4, 1)
    with pytest.raises(ValueError, match="at least one field"):
        empty({}, 8, 4, 1)
    bank = empty(FIELDS, 8, 4, 2)
    new = rows(2, 3, torch.Generator())
    with pytest.raises(ValueError, match=r"the new rows \['keys'\]"):
        append(bank, {"keys": new["keys"]})
    with pytest.raises(ValueError, match=r"'keys' must have shape \(2, 2, 3, 3\)"):
        append(bank, {**new, "keys": new["keys"][:, :, :2]}, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(KeyError, match="no field 'values'; it has keys, hidden, ids"):
        view(bank, "values")
    with pytest.raises(ValueError, match="Unknown index 'tree'"):
        search(torch.randn(2, 2, 1, 3), bank, 1, index="tree")
