"""Slot reports and usage against loops; the tables name what was planted."""

import csv
import io
import math

import pytest
import torch

from mnemic.analysis import look, slot_report, usage
from mnemic.analysis.slots import by_token
from mnemic.core.errors import InputError
from tests.analysis.planted import SLOTS, planted, slots_of, some_ids


def _reads(tokens=30, slots=7, seed=0):
    return torch.rand(tokens, slots, generator=torch.Generator().manual_seed(seed)).log().mul(3).softmax(1)


def test_usage_against_loops():
    reads = _reads()
    shares = [sum(float(reads[t, n]) for t in range(30)) / 30 for n in range(7)]
    entropy = -sum(s * math.log(s) for s in shares) / math.log(7)
    own = [-sum(float(w) * math.log(float(w)) for w in row if w > 0) / math.log(7) for row in reads]
    found = usage(reads)
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found.share.tolist(), shares, strict=True))
    assert math.isclose(found.entropy, entropy, rel_tol=1e-5)
    assert math.isclose(found.focus, 1 - sum(own) / 30, rel_tol=1e-4)
    assert found.used == sum(s >= 0.5 / 7 for s in shares)


def test_usage_of_one_slot_and_of_all_alike():
    one = torch.zeros(5, 4).index_fill(1, torch.tensor([2]), 1.0)
    assert (usage(one).entropy, usage(one).used) == (0.0, 1)
    assert math.isclose(usage(one).focus, 1)
    even = usage(torch.full((5, 4), 0.25))
    assert math.isclose(even.entropy, 1, rel_tol=1e-6)
    assert abs(even.focus) < 1e-6


def test_mass_by_token_against_loops():
    reads, ids = _reads(), torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(1))
    kinds, mass, counts = by_token(reads, ids)
    for row, kind in enumerate(kinds.tolist()):
        places = [t for t in range(30) if int(ids[t]) == kind]
        assert int(counts[row]) == len(places)
        for n in range(7):
            assert math.isclose(float(mass[row, n]), sum(float(reads[t, n]) for t in places), rel_tol=1e-5)


def test_the_report_names_what_was_planted():
    ids = some_ids(64)
    found = slot_report(look(planted(), ids), 0)
    slots = dict(zip(ids, slots_of(ids), strict=True))
    assert {i: shares[0].number for i, shares in found.slots.items()} == slots
    assert all(shares[0].mean > 0.999 for shares in found.slots.values())
    for i, slot in slots.items():
        best = found.readers[slot][0]
        assert (best.number, round(best.mass)) == (i, ids.count(i))
    assert found.bank == "bank/0"
    assert len(found.writers) == SLOTS
    rows = list(csv.reader(io.StringIO(found.table(lambda i: f"word{i}"))))
    assert rows[0] == ["slot", "share", "readers", "writers"]
    assert len(rows) == SLOTS + 1
    assert all(rows[1 + slot][2].split()[0] == f"word{i}" for i, slot in slots.items())


def test_top_writers_are_those_routed_to_a_slot():
    # Slots choose tokens by the same scores: each is written by the token that reads it.
    ids = some_ids(32)
    found = slot_report(look(planted(), ids), 0)
    for i, slot in zip(ids, slots_of(ids), strict=True):
        assert found.writers[slot][0].number == i


def test_tokens_that_are_not_written_yet_are_no_writers():
    assert slot_report(look(planted(), some_ids(20)), 0).writers == ()


def test_a_block_without_slots_is_refused():
    with pytest.raises(InputError, match=r"Block 3 .* \[0\]"):
        slot_report(look(planted(), some_ids(4)), 3)
