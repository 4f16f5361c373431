"""Importance of slots: the planted slot changes the planted token's loss and no other; zeroing; errors."""

import pytest
import torch

import mnemic
from mnemic.analysis import suppressed, zeroed
from mnemic.analysis.importance import without
from mnemic.core.errors import InputError, UnsupportedError
from tests.analysis.planted import SLOTS, planted, slots_of, some_ids
from tests.tiny import random_ids, tiny_host


@pytest.mark.parametrize("rows", [5, 32])
def test_leaving_a_slot_out_changes_exactly_the_token_that_reads_it(rows):
    model, prompt = planted(), [3, 4]
    answer = [7, 9, 5, 12, 8]
    found = suppressed(model.stream(), prompt, answer, factor=0, rows=rows)
    # The last token before each says it; the prompt's first token only reads.
    readers = slots_of([prompt[-1], *answer[:-1]])
    assert found.slots == tuple(range(SLOTS))
    for slot in range(SLOTS):
        for place, reader in enumerate(readers):
            change = abs(float(found.change[slot, place]))
            assert (change > 1e-3) if reader == slot else (change < 1e-5)
    assert torch.allclose(found.total, found.change.sum(1))


def test_the_losses_are_those_of_the_model():
    model, prompt, answer = planted(), some_ids(9), some_ids(4, 1)
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model(ids).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[8:12], ids[0, 9:], reduction="none")
    assert float((suppressed(model.stream(), prompt, answer).loss - expected).abs().max()) < 1e-5
    fed = model.stream().feed(prompt)
    assert float((suppressed(fed, [], answer).loss - expected).abs().max()) < 1e-5


def test_a_factor_of_one_changes_nothing_and_small_ones_more():
    stream, answer = planted().stream().feed(some_ids(32)), some_ids(3, 2)
    changes = [float(suppressed(stream, some_ids(5), answer, factor=f).change.abs().sum()) for f in (1, 1e-10, 0)]
    assert changes[0] < 1e-4 < changes[1] < changes[2]
    assert stream.tokens_seen == 32


def test_suppressing_against_running_each_slot_alone():
    stream, prompt, answer = planted().stream().feed(some_ids(32)), some_ids(5), some_ids(3, 2)
    found = suppressed(stream, prompt, answer, slots=[4, 1], factor=1e-10)
    for row, slot in enumerate((4, 1)):
        work = stream.fork()
        work.cache.slot_factors = {"bank/0": torch.ones(1, SLOTS).index_fill(1, torch.tensor([slot]), 1e-10)}
        logits = work.feed(prompt + answer, return_logits=True)[0, 4:7]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
        assert float((loss - found.loss - found.change[row]).abs().max()) < 1e-5


@pytest.mark.parametrize("name, options", [("lm2", {"num_slots": 5, "memory_scope": "per_layer"}), ("rmt", {}),
                                           ("cached-transformers", {})])  # fmt: skip
def test_zeroing_sets_one_slot_of_one_bank(name, options):
    model = mnemic.attach(tiny_host(), name, segment=8, **options).eval()
    stream = model.stream().feed(random_ids(1, 8))
    banks = model.memory.banks(stream.state)
    bank = list(banks)[-1]
    rows = torch.tensor([2, 0])
    after = model.memory.banks(without(model.memory, stream.state.select([0, 0]), bank, rows))
    for other, slots in banks.items():
        expected = slots.repeat(2, 1, 1)
        if other == bank:
            expected[0, 2] = expected[1, 0] = 0
        assert torch.equal(after[other], expected)


def test_zeroing_works_for_memories_without_reads_of_slots():
    model = mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=4).eval()
    stream = model.stream().feed(random_ids(1, 16))
    found = zeroed(stream, [5, 6], [7, 8])
    assert (found.bank, found.change.shape) == ("memory", (4, 2))
    work = stream.fork()
    state = work.state
    work.cache.state = type(state)({"memory": state["memory"].index_fill(1, torch.tensor([3]), 0.0)})
    work.cache.reads = None
    logits = work.feed([5, 6, 7], return_logits=True)[0, 1:]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8]), reduction="none")
    assert float((loss - found.loss - found.change[3]).abs().max()) < 1e-5
    assert float(found.change.abs().min()) > 0


def test_what_cannot_be_explained():
    stream = planted().stream()
    for message, options in {
        "factor = -1": {"factor": -1},
        "slots = \\[12\\]": {"slots": [12]},
        "slots = \\[\\]": {"slots": []},
        "No bank of slots is called 'banc'": {"bank": "banc"},
    }.items():
        with pytest.raises(InputError, match=message):
            suppressed(stream, [3], [4], **options)
    with pytest.raises(InputError, match="answer of at least one token"):
        suppressed(stream, [3], [])
    with pytest.raises(InputError, match="a prompt where"):
        suppressed(stream, [], [3])
    with pytest.raises(UnsupportedError, match="zeroing"):
        suppressed(mnemic.attach(tiny_host(), "rmt", segment=8).stream(), [3], [4])
    with pytest.raises(UnsupportedError, match="slot_dims"):
        zeroed(mnemic.attach(tiny_host(), "armt", segment=8).stream(), [3], [4])
