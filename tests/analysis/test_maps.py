"""Read maps before and after updates: the planted permutation, and how it moves when the bank is written."""

import pytest
import torch

import mnemic
from mnemic.analysis import read_maps
from mnemic.core.errors import InputError, UnsupportedError
from mnemic.core.state import State
from tests.analysis.planted import ORDER, SLOTS, planted, slots_of, some_ids
from tests.tiny import random_ids, tiny_host


@pytest.mark.parametrize("seed", range(3))
def test_before_updates_each_token_reads_the_slot_planted_for_it(seed):
    ids = some_ids(12, seed)
    found = read_maps(planted(), ids, updates=1, further=some_ids(20, seed + 9))
    assert found.before[0].argmax(1).tolist() == slots_of(ids)
    every = read_maps(planted(), list(range(3, 3 + SLOTS)), further=some_ids(20))
    assert every.before[0].argmax(1).tolist() == ORDER.tolist()


def _rolling(model):
    """Each commit moves every slot's content on by one."""
    model.memory.commit = lambda state, segment: State({"bank": state["bank"].roll(1, dims=2)})
    return model


@pytest.mark.parametrize(("length", "updates"), [(5, 1), (8, 2), (19, 3)])
def test_after_updates_reads_follow_the_contents(length, updates):
    ids = some_ids(length)
    found = read_maps(_rolling(planted(segment=8)), ids, updates=updates, further=some_ids(40, 1))
    moved = length // 8 + updates
    assert found.updates == moved
    assert found.before[0].argmax(1).tolist() == slots_of(ids)
    assert found.after[0].argmax(1).tolist() == [(slot + moved) % SLOTS for slot in slots_of(ids)]
    assert len(found.further) == updates * 8 - length % 8


def test_with_a_write_at_every_token_an_update_is_a_token():
    found = read_maps(_rolling(planted(segment=8, update_every=1)), some_ids(6), updates=4)
    assert len(found.further) == 4
    assert found.updates == 10
    assert found.after[0].argmax(1).tolist() == [(slot + 10) % SLOTS for slot in slots_of(some_ids(6))]


def test_the_model_goes_on_greedily_where_nothing_is_given():
    model, ids = planted(segment=8), some_ids(11)
    found = read_maps(model, ids, updates=2)
    stream = model.stream().feed(ids)
    assert list(found.further) == stream.generate(return_ids=True, max_new_tokens=13, do_sample=False)


def test_a_stream_reads_from_where_it_stands():
    model = _rolling(planted(segment=8))
    stream = model.stream().feed(some_ids(16))
    found = read_maps(stream, some_ids(4, 1), further=some_ids(4, 2))
    assert found.before[0].argmax(1).tolist() == [(slot + 2) % SLOTS for slot in slots_of(some_ids(4, 1))]
    assert stream.tokens_seen == 24


def test_what_cannot_be_mapped():
    with pytest.raises(InputError, match="take 28 tokens"):
        read_maps(planted(), some_ids(4), further=some_ids(3))
    with pytest.raises(InputError, match="updates = 0"):
        read_maps(planted(), some_ids(4), updates=0)
    with pytest.raises(UnsupportedError, match=r"'rmt'.*These apply: zeroing, rank, capacity"):
        read_maps(mnemic.attach(tiny_host(), "rmt", segment=8), random_ids(1, 4))
    with pytest.raises(UnsupportedError, match="slot_use"):
        read_maps(mnemic.attach(tiny_host(), "none", segment=8), torch.tensor([3]))
