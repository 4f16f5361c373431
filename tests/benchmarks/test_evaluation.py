"""Evaluations end with the same scores however often they were interrupted."""

import json
import random
from itertools import count

import pytest
import torch

import mnemic
from mnemic.benchmarks import results
from mnemic.benchmarks.evaluation import Evaluation, evaluate
from mnemic.benchmarks.report import write_report
from mnemic.core.errors import ConfigError, InputError, UnknownNameError
from tests.tiny import tiny_host

EVALUATION = Evaluation(tasks=("segment_mqar", "chomsky_parity_check"), lengths=("2", "3"), samples=10, batch_size=3)
SIZES = {"segment_mqar": {"vocabulary": 32, "pairs": 2}}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mnemic.attach(tiny_host("llama"), "rmt", segment=8, num_tokens=2)


def _cells():
    return EVALUATION.cells(None, 8, SIZES)


def _report(log, folder):
    """The files of the report that carry scores."""
    found, costs = results.summarise([results.Evaluated("rmt", log)])
    models = [{"model": "rmt", "memory": "rmt", "parameters": 1, "state_bytes": 2, "tokens_trained": 3, "note": None}]
    head = {"title": "t", "scale": None, "settings": {}, "models": models}
    written = write_report({**head, **found}, costs, folder)
    return {path.name: path.read_bytes() for path in written if path.name in ("report.json", "report.csv")}


def test_cut_ten_times_it_ends_with_the_same_report(model, tmp_path):
    evaluate(model, _cells(), EVALUATION, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    rng, path = random.Random(1), tmp_path / "cut"
    kept = b""
    for turn in range(10):
        path.write_bytes(kept)
        evaluate(model, _cells(), EVALUATION, path)
        # What a kill leaves: whole lines, and some bytes of the next.
        kept = path.read_bytes()[: len(whole) * turn // 10 + rng.randrange(300)]
    path.write_bytes(kept)
    evaluate(model, _cells(), EVALUATION, path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    reports = _report(tmp_path / "whole", tmp_path / "a"), _report(path, tmp_path / "b")
    assert len(reports[0]) == 2
    assert reports[0] == reports[1]
    records = [[line["records"] for line in results.log.batches(tmp_path / name)] for name in ("whole", "cut")]
    assert len(records[0]) == 4 * 4
    assert records[0] == records[1]


class _Stopping:
    """A cell that fails at its n-th batch, over all cells."""

    def __init__(self, cell, calls, at):
        self.cell, self.calls, self.at = cell, calls, at
        self.task, self.length, self.seed, self.chance = cell.task, cell.length, cell.seed, cell.chance

    def samples(self):
        return self.cell.samples()

    def answer(self, model, samples):
        if next(self.calls) == self.at:
            raise RuntimeError("pulled plug")
        return self.cell.answer(model, samples)


def test_what_was_answered_is_not_answered_again(model, tmp_path):
    calls = count()
    with pytest.raises(RuntimeError, match="pulled plug"):
        evaluate(model, [_Stopping(cell, calls, 6) for cell in _cells()], EVALUATION, tmp_path / "log")
    calls = count()
    evaluate(model, [_Stopping(cell, calls, -1) for cell in _cells()], EVALUATION, tmp_path / "log")
    assert next(calls) == 4 * 4 - 6
    before = (tmp_path / "log").read_bytes()
    evaluate(model, [_Stopping(cell, calls, -1) for cell in _cells()], EVALUATION, tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == before


def test_other_settings_and_other_weights_are_refused(model, tmp_path):
    evaluate(model, _cells()[:1], EVALUATION, tmp_path / "log")
    other = Evaluation(tasks=EVALUATION.tasks, lengths=EVALUATION.lengths, samples=11, batch_size=3)
    with pytest.raises(InputError, match="samples was 10 and is 11"):
        evaluate(model, _cells(), other, tmp_path / "log")
    adapter = torch.nn.Parameter(torch.zeros(1))
    # As a LoRA weight is named; fingerprints of files leave those out.
    model.memory.register_parameter("lora_A", adapter)
    with pytest.raises(InputError, match="model was"):
        evaluate(model, _cells(), EVALUATION, tmp_path / "log")
    del model.memory.lora_A
    weight = next(model.memory.parameters())
    with torch.no_grad():
        weight += 1
    with pytest.raises(InputError, match="model was"):
        evaluate(model, _cells(), EVALUATION, tmp_path / "log")
    with torch.no_grad():
        weight -= 1


def test_no_path_is_in_a_log(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MNEMIC_DATA", str(tmp_path))
    evaluate(model, _cells()[:1], EVALUATION, tmp_path / "log")
    assert str(tmp_path) not in (tmp_path / "log").read_text()
    identity = json.loads((tmp_path / "log").read_text().split("\n")[0].split(" ", 1)[1])["identity"]
    assert identity["released_data"] is True


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"taks": ["qa1"]}, ConfigError, "Did you mean 'tasks'"),
        ({"tasks": []}, ConfigError, "at least one task"),
        ({"samples": 0}, ConfigError, "at least 1"),
        ({"batch_size": "many"}, ConfigError, "expected int"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        Evaluation.from_dict(settings)


def test_unknown_tasks_are_told_before_anything_is_answered():
    with pytest.raises(UnknownNameError, match="segment_mqar"):
        Evaluation(tasks=("segment_mqr",)).cells(None, 8, {})
