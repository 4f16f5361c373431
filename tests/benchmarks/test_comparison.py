"""Comparisons: what files may say, equal terms for all, memories that cannot take part, runs that were interrupted."""

import importlib.util
import itertools

import pytest
from filelock import FileLock

from mnemic.benchmarks import jobs
from mnemic.benchmarks.comparison import Comparison
from mnemic.benchmarks.jobs import run_jobs
from mnemic.benchmarks.leaderboard import leaderboard
from mnemic.benchmarks.trained import open_run
from mnemic.core.errors import ConfigError, InputError, MissingExtraError

TINY = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}  # fmt: skip
VALUES = {
    "title": "Three",
    "memories": ["none", "few", "lm2-reference"],
    "seeds": [0, 1],
    "train": {
        "host_options": TINY, "parameters": 14000, "steps": 2, "batch_size": 4, "segment": 8, "most_segments": [3],
        "least_segments": 2, "report_to": [],
    },
    "evaluate": {"samples": 8, "batch_size": 4},
    "memory": {"few": {"memory": "rmt", "memory_options": {"num_tokens": 2}}},
    "board": {
        "mqar": {
            "train": {"task": "segment_mqar", "task_options": {"vocabulary": 16, "pairs": 2}},
            "evaluate": {"tasks": ["segment_mqar"], "lengths": ["2", "4"]},
        },
    },
}  # fmt: skip


def _with(path, value):
    """VALUES with one thing changed; path: keys with dots."""
    *parents, last = path.split(".")
    changed = table = dict(VALUES)
    for key in parents:
        table[key] = dict(table.get(key, {}))
        table = table[key]
    table[last] = value
    return changed


def test_a_job_is_shared_settings_then_the_boards_then_its_own():
    made = Comparison.from_dict(_with("board.mqar.train.steps", 5)).jobs
    assert [(j.board, j.entry, j.seed) for j in made] == [
        ("mqar", entry, seed) for entry in ("none", "few", "lm2-reference") for seed in (0, 1)
    ]
    few = made[3].experiment
    assert (few.memory, few.memory_options, few.seed, few.steps) == ("rmt", {"num_tokens": 2}, 1, 5)
    assert few.task_options == {"vocabulary": 16, "pairs": 2}
    assert made[3].evaluation.samples == 8
    assert str(made[3].folder) == "runs/mqar/few/seed-1"


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("memorise", ["lm2"], "Did you mean 'memories'"),
        ("memories", [], "list of different names"),
        ("memories", ["none", "none"], "list of different names"),
        ("memories", ["none", "few", "lm2-reference", "lm3"], "Did you mean 'lm2'"),
        ("seeds", [0, 0], "whole numbers"),
        ("board", {}, "at least one table"),
        ("board.mqar", 3, "expected a table"),
        ("board.mqar.trian", {}, "train and evaluate"),
        ("memory.fwe", {}, "Did you mean 'few'"),
        ("memory.few.steps", 9, "must be equal for all"),
        ("train.stesp", 9, "Did you mean 'steps'"),
        ("evaluate.sampels", 9, "Did you mean 'samples'"),
    ],
)
def test_bad_comparisons(path, value, message):
    with pytest.raises(ConfigError, match=message):
        Comparison.from_dict(_with(path, value))


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "bad.toml").write_text("memories = [")
    with pytest.raises(ConfigError, match="no valid TOML"):
        Comparison.read(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="Cannot read"):
        Comparison.read(tmp_path / "missing.toml")


def test_models_are_equally_large_and_see_equal_samples_and_one_may_not_take_part(tmp_path):
    comparison = Comparison.from_dict(_with("seeds", [0]))
    outcomes = list(run_jobs(comparison.jobs, tmp_path))
    assert [(o.job.entry, o.refused is None) for o in outcomes] == [
        ("none", True),
        ("few", True),
        ("lm2-reference", False),
    ]
    found, costs = leaderboard(comparison, tmp_path, outcomes)
    none, few, reference = found["models"]
    assert abs(none["parameters"] - 14000) <= abs(14000 // 16)
    assert abs(few["parameters"] - none["parameters"]) <= 14000 // 16
    assert none["tokens_trained"] == few["tokens_trained"] > 0
    assert "one slot per token" in reference["note"]
    assert [(s["model"], s["length"], s["count"]) for s in found["scores"]] == [
        (model, length, 8) for model in ("none", "few") for length in ("2", "4")
    ]
    assert len(costs) == 4
    questions = [
        [record["question"] for line in lines for record in line["records"]]
        for lines in (list(jobs_log(tmp_path, comparison, i)) for i in (0, 1))
    ]
    assert questions[0] == questions[1]
    assert open_run(tmp_path / comparison.jobs[1].folder).model.memory.name == "rmt"


def jobs_log(folder, comparison, number):
    from mnemic.benchmarks import log

    return log.batches(folder / comparison.jobs[number].folder / jobs.ANSWERS)


def test_an_interrupted_comparison_goes_on_and_ends_alike(tmp_path, monkeypatch):
    comparison = Comparison.from_dict(_with("seeds", [0]))
    whole = leaderboard(comparison, tmp_path / "whole", _done(comparison, tmp_path / "whole"))[0]
    calls = itertools.count()

    def pulled(*arguments, **options):
        if next(calls) == 1:
            raise RuntimeError("pulled plug")
        return evaluate(*arguments, **options)

    evaluate = jobs.evaluate
    monkeypatch.setattr(jobs, "evaluate", pulled)
    with pytest.raises(RuntimeError, match="pulled plug"):
        _done(comparison, tmp_path / "cut")
    trained = []
    monkeypatch.setattr(jobs, "run", lambda *a, **k: trained.append(a) or (_ for _ in ()).throw(ConfigError("no")))
    again = leaderboard(comparison, tmp_path / "cut", _done(comparison, tmp_path / "cut"))[0]
    # Both models were trained before the plug was pulled; only the one that cannot be is tried again.
    assert [a[0].memory for a in trained] == ["lm2-reference"]
    assert again["scores"] == whole["scores"]
    assert again["grouped"] == whole["grouped"]


def _done(comparison, folder):
    folder.mkdir(exist_ok=True)
    return list(run_jobs(comparison.jobs, folder))


def test_tasks_of_two_boards_are_told_apart(tmp_path):
    values = _with("board.again", VALUES["board"]["mqar"])
    comparison = Comparison.from_dict({**values, "memories": ["none"], "seeds": [0], "memory": {}})
    found, _ = leaderboard(comparison, tmp_path, run_jobs(comparison.jobs, tmp_path))
    assert {s["task"] for s in found["scores"]} == {"mqar: segment_mqar", "again: segment_mqar"}


def test_only_what_a_memory_refuses_is_a_note(tmp_path, monkeypatch):
    comparison = Comparison.from_dict({**VALUES, "memories": ["none"], "seeds": [0], "memory": {}})
    _done(comparison, tmp_path)
    other = Comparison.from_dict({**_with("train.steps", 3), "memories": ["none"], "seeds": [0], "memory": {}})
    with pytest.raises(InputError, match="of another comparison"):
        _done(other, tmp_path)

    def full(*arguments, **options):
        raise InputError("no space left")

    monkeypatch.setattr(jobs, "evaluate", full)
    with pytest.raises(InputError, match="no space left"):
        _done(comparison, tmp_path)


def test_two_do_not_work_in_one_folder(tmp_path):
    comparison = Comparison.from_dict({**VALUES, "seeds": [0]})
    with FileLock(tmp_path / ".lock"), pytest.raises(InputError, match="Another process"):
        next(run_jobs(comparison.jobs, tmp_path))


@pytest.mark.slow
def test_processes_find_what_one_finds(tmp_path):
    comparison = Comparison.from_dict(VALUES)
    (tmp_path / "one").mkdir()
    one = leaderboard(comparison, tmp_path / "one", run_jobs(comparison.jobs, tmp_path / "one"))[0]
    two = leaderboard(comparison, tmp_path / "two", run_jobs(comparison.jobs, tmp_path / "two", processes=2))[0]
    assert one == two


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.timeout(600)
def test_ray_finds_what_one_process_finds(tmp_path):
    comparison = Comparison.from_dict(_with("seeds", [0]))
    one = leaderboard(comparison, tmp_path / "one", run_jobs(comparison.jobs, tmp_path / "one"))[0]
    ray = leaderboard(comparison, tmp_path / "ray", run_jobs(comparison.jobs, tmp_path / "ray", ray="local"))[0]
    assert one == ray


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_extra_is_named(tmp_path):
    comparison = Comparison.from_dict(VALUES)
    with pytest.raises(MissingExtraError, match=r"mnemic\[ray\]"):
        next(run_jobs(comparison.jobs, tmp_path, ray="local"))
