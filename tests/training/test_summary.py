"""What a run tells: counted operations, diagnostics by block, the curves."""

import json
import sys

import pytest
import torch
from transformers import TrainingArguments

import mnemic
from mnemic.training import Collator, SegmentLaw, TextExamples
from mnemic.training.summary import (
    CURVES,
    SUMMARY,
    MeasuredTrainer,
    block_diagnostics,
    peak_memory,
    peak_rate,
    plot_curves,
    summarise,
    write_summary,
)
from tests.tiny import VOCABULARY, random_ids, tiny_host

HISTORY = [
    {"step": 1, "loss": 2.0, "memory/block0/gate": 0.5, "memory/block3/gate": 0.25, "memory/entropy": 0.1},
    {"step": 2, "loss": 1.0, "memory/block0/gate": 0.75, "memory/block3/gate": 0.125},
    {"step": 2, "train_loss": 1.5},
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    torch.manual_seed(0)
    model = mnemic.attach(tiny_host(), "none", segment=8)
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], logging_steps=1,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    data = TextExamples([random_ids(40).tolist()], 8, SegmentLaw(2, (2,), 2))
    trainer = MeasuredTrainer(model, arguments, train_dataset=data, data_collator=Collator())
    trainer.train()
    return trainer, summarise(trainer)


def test_operations_are_those_of_the_products(measured):
    trainer, summary = measured
    # Tokens of a segment pass q, k, v, o (32 x 32, 32 x 16 twice, 32 x 32), the feed-forward part (3 x 32 x 48), and
    # the head, twice (multiply and add), forward and twice backward; attention is 8 x 8 in 4 heads of 8.
    products = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * VOCABULARY
    least = 3 * 2 * products
    attention = 2 * (2 + 5) * 2 * 4 * 8 * 8
    assert least <= summary["operations_per_token"] <= least + attention
    assert summary["tokens"] == 4 * 2 * 16
    assert trainer.first_tokens == 2 * 16
    assert all(p.grad is None for p in trainer.model.parameters())


def test_operations_of_a_memory_whose_slots_are_parameters(tmp_path):
    """With its diagnostics logged: the counter fails on parameters that are read without gradients."""
    torch.manual_seed(0)
    model = mnemic.attach(tiny_host(), "lm2:paper", segment=8, num_slots=4)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], logging_steps=1, save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    data = TextExamples([random_ids(40).tolist()], 8, SegmentLaw(2, (2,), 2))
    trainer = MeasuredTrainer(model, arguments, train_dataset=data, data_collator=Collator(), log_memory=True)
    trainer.train()
    assert summarise(trainer)["operations_per_token"] > 0
    assert trainer.log_memory
    assert any(key.startswith("memory/block0/") for line in trainer.state.log_history for key in line)


def test_speed_is_of_the_steps_after_the_first(measured):
    trainer, summary = measured
    assert summary["tokens_per_second"] == pytest.approx(3 * 2 * 16 / trainer.seconds, rel=1e-3)
    rate = summary["operations_per_token"] * summary["tokens_per_second"] / summary["peak"]["operations_per_second"]
    assert summary["utilisation"] == pytest.approx(rate, abs=1e-4)
    assert "float32, measured on cpu" in summary["peak"]["of"]
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["tokens_per_second" in line for line in lines] == [False, True, True, True]
    assert summary["loss"] == {"first": lines[0]["loss"], "last": lines[-1]["loss"]}


def test_measuring_changes_no_bit(measured):
    from mnemic.training import MemoryTrainer

    trainer, _ = measured
    torch.manual_seed(0)
    model = mnemic.attach(tiny_host(), "none", segment=8)
    plain = MemoryTrainer(model, trainer.args, train_dataset=trainer.train_dataset, data_collator=Collator())
    plain.train()
    ours = dict(trainer.model.named_parameters())
    assert all(torch.equal(ours[name], p) for name, p in model.named_parameters())


def test_peaks():
    before = torch.get_num_threads()
    assert peak_rate(torch.device("cpu")) > 1e8
    assert torch.get_num_threads() == before
    # This process holds torch, and less than a machine.
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**38


def test_diagnostics_by_block():
    assert block_diagnostics(HISTORY) == {"0": {"gate": 0.75}, "3": {"gate": 0.125}, "all": {"entropy": 0.1}}


def test_the_files(measured, tmp_path):
    _, summary = measured
    write_summary(summary, tmp_path)
    assert json.loads((tmp_path / SUMMARY).read_text()) == summary
    pytest.importorskip("matplotlib")
    plot_curves(HISTORY, tmp_path / CURVES)
    assert (tmp_path / CURVES).read_bytes().startswith(b"\x89PNG")


def test_curves_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(mnemic.MissingExtraError, match=r"mnemic\[plots\]"):
        plot_curves(HISTORY, tmp_path / CURVES)
    assert list(tmp_path.iterdir()) == []
