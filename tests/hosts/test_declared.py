"""What a memory declares it cannot do is refused by generic code; a state can be kept without its stream."""

import pytest
import torch

import mnemic
from mnemic.memories.baselines.none import NoMemory
from tests.tiny import random_ids, tiny_host


def test_a_memory_that_cannot_reorder_refuses_beams(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(NoMemory, "reorderable", False)
    model = mnemic.attach(tiny_host(), "none", segment=8)
    ids = random_ids(1, 5)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 7)
    with pytest.raises(mnemic.UnsupportedError, match=r"num_beams.*'none'"):
        model.generate(ids, max_new_tokens=2, num_beams=2)


def test_a_memory_that_is_not_batch_safe_refuses_batches(monkeypatch: pytest.MonkeyPatch):
    model = mnemic.attach(tiny_host(), "none", segment=8)
    monkeypatch.setattr(NoMemory, "batch_safe", False)
    model(random_ids(1, 5))
    with pytest.raises(mnemic.UnsupportedError, match="one row at a time; got 2"):
        model(random_ids(2, 5))


@pytest.mark.parametrize("memory, options", [("lm2", {"num_slots": 4}), ("rmt", {"num_tokens": 2})])
def test_a_state_alone_can_be_kept(tmp_path, memory: str, options: dict):
    model = mnemic.attach(tiny_host(), memory, segment=8, **options)
    state = model(random_ids(2, 16)).memory_state.detach()
    mnemic.save_state(model, state, tmp_path / "state.mnemic")
    loaded = mnemic.load_state(model, tmp_path / "state.mnemic")
    assert loaded.equal(state)
    more = random_ids(2, 11, seed=1)
    assert torch.equal(model(more, memory_state=loaded).logits, model(more, memory_state=state).logits)
    with pytest.raises(mnemic.FileFormatError, match="state"):
        model.stream(load=tmp_path / "state.mnemic")
    other = mnemic.attach(tiny_host(seed=1), memory, segment=8, **options)
    with pytest.raises(mnemic.StateError, match="other weights of the host"):
        mnemic.load_state(other, tmp_path / "state.mnemic")
    with pytest.raises(mnemic.HostError, match="no memory"):
        mnemic.save_state(tiny_host(), state, tmp_path / "x")
