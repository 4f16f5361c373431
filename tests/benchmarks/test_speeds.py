"""Speeds of a comparison: who is measured beside whom, what is carried, and where it is written."""

import csv
import io
import itertools
import json

import pytest
from filelock import FileLock
from rich.console import Console

from mnemic.benchmarks import speeds
from mnemic.benchmarks.comparison import Comparison
from mnemic.benchmarks.report import page, print_report, write_report
from mnemic.benchmarks.trained import carried_bytes
from tests.benchmarks.report_cases import results, score
from tests.cli.conftest import invoke, succeed

TINY = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}  # fmt: skip
VALUES = {
    "title": "Costs",
    "memories": ["few", "lm2-reference", "none"],
    "train": {
        "host_options": TINY, "parameters": 14000, "steps": 1, "batch_size": 2, "segment": 8, "most_segments": [2, 3],
        "least_segments": 2, "report_to": [], "task": "segment_mqar", "task_options": {"vocabulary": 16, "pairs": 2},
    },
    "costs": {"history": 20, "tokens": 10, "steps": 1, "rounds": 2},
    "memory": {"few": {"memory": "rmt", "memory_options": {"num_tokens": 2}}},
    "board": {
        "mqar": {"evaluate": {"tasks": ["segment_mqar"], "lengths": ["2"], "samples": 2}},
        "long": {"evaluate": {"tasks": ["segment_mqar"], "lengths": ["3"], "samples": 2}},
    },
}  # fmt: skip


@pytest.fixture
def turns(monkeypatch):
    """(memory, tokens of a call, streaming) of every call of a model, and a clock that ticks once a reading."""
    clock = itertools.count()
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: float(next(clock)))
    seen, train, decode = [], speeds.Contender._train, speeds.Contender._decode
    monkeypatch.setattr(speeds.Contender, "_train", lambda self: seen.append((self.name, "train")) or train(self))
    monkeypatch.setattr(speeds.Contender, "_decode", lambda self: seen.append((self.name, "decode")) or decode(self))
    monkeypatch.setattr(speeds.Contender, "name", property(lambda self: self.base.memory.name), raising=False)
    return seen


def test_every_turn_is_beside_one_of_the_host(turns):
    found = speeds.measure(Comparison.from_dict(VALUES))
    assert found["settings"]["board"] == "mqar"
    few, reference, none = found["models"]
    assert "one slot per token" in reference["refused"]
    one_round = [("rmt", "train"), ("none", "train"), ("none", "train"), ("none", "train")]
    assert turns == one_round * 3 + [(name, "decode") for name, _ in one_round] * 3
    # By the clock of the test every turn takes a second: 2 rows of 3 segments of 8 tokens, and 10 tokens.
    alike = {"ratio": 1.0, "low": 1.0, "high": 1.0}
    for one in (few, none):
        assert one["train"] == {"tokens_per_second": 48.0, **alike}
        assert one["decode"] == {"tokens_per_second": 10.0, **alike}
    # Two vectors of 16 floats; the open segment of four tokens has keys and values.
    assert none["state_bytes"] < few["state_bytes"]


def test_the_history_is_read_once_and_the_state_is_that_behind_it():
    values = {**VALUES, "memories": ["few"], "costs": {**VALUES["costs"], "history": 64, "board": "long"}}
    found = speeds.measure(Comparison.from_dict(values))
    assert found["settings"]["board"] == "long"
    (few,) = found["models"]
    contender = speeds.Contender(Comparison.from_dict(values).jobs[0].experiment, Comparison.from_dict(values).costs)
    # 64 tokens are the eight segments behind which a leaderboard counts.
    assert few["state_bytes"] == carried_bytes(contender.model)
    assert contender.speed("decode") > 0
    seen = contender._cache.seen.tolist()
    assert contender.speed("decode") > 0
    assert (seen, contender._cache.seen.tolist()) == ([74], [84])


def test_ratios_are_medians_of_turns_not_of_sums():
    found = speeds._summary([(10.0, 20.0), (30.0, 10.0), (8.0, 8.0)])
    assert found == {"tokens_per_second": 10.0, "ratio": 1.0, "low": 0.5, "high": 3.0}


def test_speeds_are_in_every_report(tmp_path):
    one = {"tokens_per_second": 12345.0, "ratio": 0.5, "low": 0.25, "high": 0.75}
    settings = {"board": "recall", "history": 2048, "tokens": 64, "steps": 2, "rounds": 5}
    own = {"train": one, "decode": {**one, "tokens_per_second": 678.0}, "state_bytes": 3 * 2**10}
    found = {"settings": settings, "environment": {"device": "cpu", "threads": 1}}
    speeds.write({**found, "models": [{"model": "lm2", **own}, {"model": "gone", "refused": "no"}]}, tmp_path)
    plain = results(score("lm2", "qa1", "1k", 0.5), score("rmt", "qa1", "1k", 0.4))
    assert speeds.with_speeds(plain, tmp_path / "elsewhere") == plain
    data = speeds.with_speeds(plain, tmp_path)
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    print_report(data, [], console)
    shown = console.file.getvalue()
    for text in (shown, page(data, [])):
        assert "12.3k (0.50)" in text
        assert "678 (0.50)" in text
        assert "3 KiB" in text
        assert "one row that has read 2,048 tokens" in text
    assert "decode" not in page(plain, [])
    write_report(data, [], tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["models"][0]["speeds"] == own
    lm2, rmt = csv.DictReader((tmp_path / "report" / "models.csv").read_text().splitlines())
    assert (lm2["train_ratio"], lm2["decode_tokens_per_second"], lm2["long_state_bytes"]) == ("0.5", "678.0", "3072")
    assert (rmt["model"], rmt["train_ratio"]) == ("rmt", "")
    assert "models.csv" not in [path.name for path in write_report(plain, [], tmp_path / "plain")]


CONFIG = """
memories = ["none", "rmt"]
[train]
steps = 1
batch_size = 2
segment = 8
least_segments = 2
most_segments = [2]
report_to = []
host_options = { hidden_size = 16, intermediate_size = 16, num_attention_heads = 2, num_key_value_heads = 2 }
[costs]
history = 8
tokens = 4
rounds = 1
[memory.rmt]
memory_options = { num_tokens = 2 }
[board.mqar.train]
task = "segment_mqar"
task_options = { vocabulary = 16, pairs = 2 }
[board.mqar.evaluate]
tasks = ["segment_mqar"]
lengths = ["2"]
samples = 4
"""


def test_costs_come_before_or_after_the_comparison(tmp_path):
    (tmp_path / "two.toml").write_text(CONFIG)
    command = ("compare", tmp_path / "two.toml", "--output", tmp_path / "board")
    assert "rmt" in succeed(*command, "--costs").stdout
    assert sorted(path.name for path in (tmp_path / "board").iterdir()) == [".lock", "speeds.json"]
    before = json.loads((tmp_path / "board" / "speeds.json").read_text())
    assert "decode" in succeed(*command).stdout
    report = tmp_path / "board" / "report.json"
    assert [m["speeds"]["train"] for m in json.loads(report.read_text())["models"]] == [
        m["train"] for m in before["models"]
    ]
    scores = json.loads(report.read_text())["scores"]
    succeed(*command, "--costs")
    after = json.loads(report.read_text())
    assert after["scores"] == scores
    assert after["models"][1]["speeds"] == {
        k: v
        for k, v in json.loads((tmp_path / "board" / "speeds.json").read_text())["models"][1].items()
        if k != "model"
    }
    with FileLock(tmp_path / "board" / ".lock"):
        result = invoke(*command, "--costs")
    assert (result.exit_code, "while nothing else is" in result.stderr) == (2, True)
