"""What is captured while a stream reads: reads, writes, ranks, diagnostics; and that reading stays as it is."""

import math

import pytest
import torch

import mnemic
from mnemic.analysis import capture, effective_rank, look
from mnemic.analysis.captures import Look
from mnemic.core.errors import InputError
from mnemic.core.registry import memory_class, memory_names
from tests.analysis.planted import planted, slots_of, some_ids
from tests.tiny import random_ids, tiny_host

SEGMENT = 8
SLOTTED = [name for name in memory_names() if memory_class(name).slot_use is not mnemic.core.Memory.slot_use]
BANKED = ["cached-transformers", "lm2", "memformer", "r3mem", "rmt", "rmt-1m", "rxt"]


def _attached(name, **options):
    torch.manual_seed(0)
    options = {**({"num_slots": 6} if name == "lm2" else {}), **options}
    model = mnemic.attach(tiny_host(), name, segment=SEGMENT, **options).eval()
    with torch.no_grad():
        for p in model.memory.parameters():
            # Scales that start at 0 would hide what is read.
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p) * 0.3)
    return model


def test_some_memories_tell_how_slots_are_used():
    assert {"lm2", "memformer", "rxt"} <= set(SLOTTED)


@pytest.mark.parametrize("name", SLOTTED)
def test_a_capture_has_a_read_for_every_token_and_changes_nothing(name):
    model, ids = _attached(name), random_ids(1, 3 * SEGMENT + 5)
    with torch.no_grad():
        plain, stream = model.stream().feed(ids, return_logits=True), model.stream()
        with capture(stream) as captured:
            parts = [stream.feed(part, return_logits=True) for part in (ids[:, :5], ids[:, 5:14], ids[:, 14:])]
        assert float((torch.cat(parts, dim=1) - plain).abs().max()) < 1e-4
    found, whole = captured.look(ids), look(model, ids)
    assert stream.cache.watch is None
    assert found.commits == whole.commits == (8, 16, 24)
    assert list(found.reads) == list(model.memory.layers)
    assert torch.equal(found.ids, ids[0])
    for block, reads in found.reads.items():
        assert reads.shape[0] == 29
        assert float((reads.sum(1) - 1).abs().max()) < 1e-5
        assert float((reads - whole.reads[block]).abs().max()) < 1e-4
        bank = model.memory.banks(stream.state)[found.banks[block]]
        assert bank.shape[:2] == (1, reads.shape[1])
    assert [set(one) for one in found.diagnostics] == [set(found.diagnostics[0])] * 3
    assert all(len(ranks) == 4 for ranks in found.ranks.values())


@pytest.mark.parametrize("name", SLOTTED)
def test_factors_of_one_change_no_logits_and_of_nearly_nothing_do(name):
    model, ids = _attached(name), random_ids(1, SEGMENT, seed=2)
    stream = model.stream().feed(random_ids(1, 2 * SEGMENT))
    plain = stream.fork().feed(ids, return_logits=True)
    changes = []
    for factor in (1.0, 1e-6):
        work = stream.fork()
        factors = {n: torch.ones(1, slots.shape[1]) for n, slots in model.memory.banks(stream.state).items()}
        for one in factors.values():
            one[:, : one.shape[1] // 2] = factor
        work.cache.slot_factors = factors
        changes.append(float((work.feed(ids, return_logits=True) - plain).abs().max()))
        assert not work.fork().cache.slot_factors
    assert changes[0] < 1e-5 < 1e-3 < changes[1]


@pytest.mark.parametrize("name", BANKED)
def test_banks_are_parts_of_the_state(name):
    memory = _attached(name).memory
    state = memory.initial_state(3)
    banks = memory.banks(state)
    assert sum(slots.numel() for slots in banks.values()) == sum(state[n].numel() for n in memory.slot_dims)
    assert all(slots.shape[0] == 3 for slots in banks.values())
    assert sorted(memory.slot_dims) == sorted({name.split("/")[0] for name in banks})


def test_writes_of_a_block_sum_to_its_input_gate():
    model, ids = _attached("lm2"), random_ids(1, 2 * SEGMENT + 3)
    found = look(model, ids)
    for block, writes in found.writes.items():
        for commit, diagnostics in enumerate(found.diagnostics):
            mine = writes[commit * SEGMENT : (commit + 1) * SEGMENT]
            assert math.isclose(float(mine.sum(0).mean()), diagnostics[f"block{block}/gate_in"], rel_tol=1e-4)
        assert float(writes[2 * SEGMENT :].abs().max()) == 0


@pytest.mark.parametrize("options", [{"route": "competitive", "top_k": 2}, {"write_scores": "read"},
                                     {"memory_scope": "per_layer"}, {"update_every": 2}])  # fmt: skip
def test_settings_of_lm2(options):
    model, ids = _attached("lm2", **options), random_ids(1, 2 * SEGMENT)
    found = look(model, ids)
    assert len(found.commits) == 16 // options.get("update_every", SEGMENT)
    assert len(set(found.banks.values())) == (2 if "memory_scope" in options else 1)
    assert all(float((reads.sum(1) - 1).abs().max()) < 1e-5 for reads in found.reads.values())
    if "top_k" in options:
        assert all(bool(((reads > 0).sum(1) <= 2 * 4).all()) for reads in found.reads.values())


def test_planted_reads_are_found():
    ids = some_ids(20)
    found = look(planted(), ids)
    assert found.reads[0].argmax(1).tolist() == slots_of(ids)
    assert float(found.reads[0].amax(1).min()) > 0.999


def test_a_stack_names_its_banks():
    model = mnemic.attach(
        tiny_host(), [mnemic.memory_config("lm2", num_slots=4), mnemic.memory_config("rmt")], segment=SEGMENT
    )
    found = look(model, random_ids(1, SEGMENT))
    assert set(found.ranks) == {"lm2/bank/0", "rmt/memory"}
    assert set(found.banks.values()) == {"lm2/bank/0"}


def test_memories_without_slots_are_captured_too():
    found = look(_attached("armt"), random_ids(1, SEGMENT))
    assert (found.reads, found.ranks) == ({}, {})
    assert found.diagnostics[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_effective_rank_against_eigenvalues(seed):
    slots = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = [max(v, 0.0) ** 0.5 for v in torch.linalg.eigvalsh(slots.T @ slots).tolist()]
    entropy = -sum(v / sum(values) * math.log(v / sum(values)) for v in values)
    assert math.isclose(effective_rank(slots), math.exp(entropy), rel_tol=1e-4)


def test_effective_rank_of_known_banks():
    assert math.isclose(effective_rank(torch.eye(6, 9)), 6, rel_tol=1e-5)
    assert math.isclose(effective_rank(torch.ones(4, 3)), 1, rel_tol=1e-3)
    assert effective_rank(torch.zeros(4, 3)) == 0


def test_what_cannot_be_captured():
    model = _attached("lm2")
    with pytest.raises(InputError, match="2"), capture(model.stream(2)):
        pass
    stream = model.stream().feed(random_ids(1, 3))
    with pytest.raises(InputError, match="3 tokens behind a commit"), capture(stream):
        pass
    stream = model.stream()
    with pytest.raises(InputError, match="nested"), capture(stream), capture(stream):
        pass
    with capture(stream) as captured:
        stream.feed(random_ids(1, SEGMENT))
    with pytest.raises(InputError, match=f"4 ids for {SEGMENT}"):
        captured.look([1, 2, 3, 4])
    assert isinstance(captured.look(random_ids(1, SEGMENT)), Look)


def test_copies_are_not_captured():
    stream = _attached("lm2").stream()
    with capture(stream) as captured:
        stream.feed(random_ids(1, SEGMENT))
        stream.fork().feed(random_ids(1, SEGMENT))
        stream.select([0, 0]).feed(random_ids(2, SEGMENT))
    assert captured.commits == [SEGMENT]
