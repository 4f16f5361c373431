"""The scripts that look into a trained LM2: what is held still stays, and the model is as it was afterwards."""

import pytest
import torch

from benchmarks import lm2_planted, lm2_retention
from mnemic.benchmarks.experiment import Experiment
from mnemic.benchmarks.runs import run
from mnemic.hosts import load


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings = Experiment(
        memory_options={"num_slots": 4}, task="stories", segment=64, most_segments=(1,), steps=1, batch_size=2,
        vocabulary=300, host_options=small, save_every=0, warmup_steps=0, report_to=(),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("retention")
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MNEMIC_DATA", raising=False)
        run(settings, folder, progress=False)
    return folder


def test_a_frozen_bank_stays_and_the_others_move(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(lm2_retention, "DISTANCES", (0, 1, 3))
    monkeypatch.delenv("MNEMIC_DATA", raising=False)
    found = lm2_retention.retention(trained, rows=3)
    cosines = {name: [p["cosine"] for p in one["points"]] for name, one in found["readings"].items()}
    assert cosines["frozen"] == pytest.approx([1.0] * 3, abs=1e-6)
    sizes = {name: [p["grown"] for p in one["points"]] for name, one in found["readings"].items()}
    assert sizes["frozen"] == pytest.approx([1.0] * 3, abs=1e-6)
    # A bank that is not written can only fade, and one that forgets nothing grows beyond one that does.
    assert sizes["no writing"][-1] < 1
    assert sizes["no forgetting"][-1] > sizes["as trained"][-1]
    assert all(c[0] == pytest.approx(1.0) and c[-1] < 1 - 1e-4 for name, c in cosines.items() if name != "frozen")
    first = {name: one["points"][0]["accuracy"] for name, one in found["readings"].items()}
    assert len(set(first.values())) == 1
    shut = {name: one["diagnostics"] for name, one in found["readings"].items()}
    keys = [key for key in shut["frozen"] if key.endswith("gate_in")]
    assert keys
    assert all(shut["no writing"][key] < 1e-6 < shut["as trained"][key] for key in keys)
    lm2_retention.plot(found, tmp_path / "figures" / "r.png")
    assert (tmp_path / "figures" / "r.png").stat().st_size > 5000


def test_gates_are_as_they_were_after_a_failure(trained):
    memory = load(trained).memory
    before = [memory.bias_in.clone(), memory.bias_forget.clone()]
    try:
        with lm2_retention.held(memory, ("in", "forget")):
            during = memory.bias_in.detach().max()
            raise RuntimeError("stopped")
    except RuntimeError:
        pass
    assert during < -1000
    assert torch.equal(before[0], memory.bias_in)
    assert torch.equal(before[1], memory.bias_forget)


def test_planted_facts_are_looked_for_in_every_slot(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("MNEMIC_DATA", raising=False)
    found = lm2_planted.planted(trained, rows=3)
    assert torch.tensor(found["wrote"]["0"]).shape == (4, 4)
    # A token's reads are shares of all slots; what it wrote is its share of theirs.
    assert torch.tensor(found["read"]["0"]).sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert torch.tensor(found["wrote"]["0"]).sum(0).max() <= 1
    # All four slots of this bank: whosever they are called, the answer is that of an empty bank.
    empty = lm2_planted.planted(trained, rows=3)["without"]
    assert empty["its slots"] == empty["another's slots"]
    monkeypatch.setattr(lm2_planted, "LISTED", 64)
    assert lm2_planted.planted(trained, rows=3)["listed"] == {"names": 100.0, "places": 100.0}
    lm2_planted.plot(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
