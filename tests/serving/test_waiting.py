"""The queue: turns of tenants, order within each."""

from collections import namedtuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemic.serving.waiting import Waiting

Item = namedtuple("Item", "tenant number")


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_tenants_take_turns_and_each_keeps_its_order(tenants):
    waiting = Waiting()
    items = [Item(tenant, i) for i, tenant in enumerate(tenants)]
    for item in items:
        waiting.put(item)
    taken = [waiting.take() for _ in items]
    assert len(waiting) == 0
    for tenant in "abc":
        assert [i for i in taken if i.tenant == tenant] == [i for i in items if i.tenant == tenant]
    for i in range(len(taken)):
        # Between two turns of one tenant, everyone else who waits has one.
        later = {item.tenant for item in taken[i:]} - {taken[i].tenant}
        following = [item.tenant for item in taken[i + 1 : i + 1 + len(later)]]
        assert set(following) == later
    with pytest.raises(LookupError):
        waiting.take()


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_sifting_asks_once_and_loses_nobody(tenants, every):
    waiting, asked = Waiting(), []
    for i, tenant in enumerate(tenants):
        waiting.put(Item(tenant, i))

    def keep(item):
        asked.append(item)
        return len(asked) % every > 0

    out = waiting.sift(keep)
    left = [waiting.take() for _ in range(len(waiting))]
    assert len(asked) == len(tenants)
    assert sorted(i.number for i in out + left) == list(range(len(tenants)))
