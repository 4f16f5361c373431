"""Comparisons: what files may say, equal terms for all, memories that cannot take part, runs that were interrupted."""

import importlib.util
import itertools
import sys
from concurrent.futures import Future

import pytest
from filelock import FileLock

from mnemic.benchmarks import jobs, log
from mnemic.benchmarks.comparison import Comparison, Job
from mnemic.benchmarks.jobs import Outcome, run_jobs
from mnemic.benchmarks.leaderboard import leaderboard
from mnemic.benchmarks.report import write_report
from mnemic.benchmarks.trained import open_run
from mnemic.core.errors import ConfigError, InputError, MissingExtraError, UnknownNameError

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
    assert made[3].evaluations[0].samples == 8
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
        ("board.mqar.trian", {}, "train, evaluate and memory"),
        ("memory.fwe", {}, "Did you mean 'few'"),
        ("memory.few.steps", 9, "must be equal for all"),
        ("train.stesp", 9, "Did you mean 'steps'"),
        ("evaluate.sampels", 9, "Did you mean 'samples'"),
        ("board.mqar.evaluate", 3, "expected a table"),
        ("board.mqar.evaluate", [], "expected a table"),
        ("board.mqar.evaluate", [{"lengths": ["2", "4"]}] * 2, "qa1 at length 2 with seed 1 twice"),
        ("board.mqar.evaluate", {"options": {"pairs": []}}, "measures nothing"),
        ("board.mqar.evaluate", [{"memories": ["fwe"]}], "Did you mean 'few'"),
        ("board.mqar.evaluate", [{"memories": "few"}], "list of different names"),
        ("board.mqar.evaluate", [{"memories": ["few"]}], "no table measures none"),
        ("costs.rouns", 2, "Did you mean 'rounds'"),
        ("costs.rounds", 0, "at least 1"),
        ("costs.board", "mqra", "Did you mean 'mqar'"),
    ],
)
def test_bad_comparisons(path, value, message):
    with pytest.raises((ConfigError, UnknownNameError), match=message):
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


def test_one_model_is_measured_on_several_tasks_and_sizes(tmp_path):
    evaluate = [
        {"tasks": ["segment_mqar"], "lengths": ["2", "3"]},
        {"tasks": ["segment_mqar"], "lengths": ["3"], "options": {"pairs": [3, 6], "asked": 1}},
        {"tasks": ["text"], "lengths": ["16"], "samples": 2},
    ]
    board = {"train": VALUES["board"]["mqar"]["train"], "evaluate": evaluate}
    only = {**VALUES, "memories": ["none"], "seeds": [0], "memory": {}}
    with pytest.raises(InputError, match="trained on words"):
        _done(Comparison.from_dict({**only, "board": {"mqar": board}}), tmp_path / "words")
    board["evaluate"] = evaluate[:2]
    comparison = Comparison.from_dict({**only, "board": {"mqar": board}})
    found, _ = leaderboard(comparison, tmp_path / "both", _done(comparison, tmp_path / "both"))
    names = [(s["task"], s["length"], s["count"]) for s in found["scores"]]
    assert names == [
        ("segment_mqar", "2", 8), ("segment_mqar", "3", 8),
        ("segment_mqar pairs=3 asked=1", "3", 8), ("segment_mqar pairs=6 asked=1", "3", 8),
    ]  # fmt: skip
    logs = [list(log.batches(path)) for path in jobs.answers(comparison.jobs[0], tmp_path / "both")]
    assert [{len(r["targets"]) for line in lines for r in line["records"]} for lines in logs] == [{2}, {1}]
    assert len(list((tmp_path / "both").rglob("experiment.toml"))) == 1


def test_a_measurement_of_some_entries():
    evaluate = [{"lengths": ["0k"]}, {"lengths": ["1k"], "memories": ["few"]}, {"lengths": ["2k"]}]
    made = Comparison.from_dict(_with("board.mqar.evaluate", evaluate)).jobs
    lengths = {job.entry: [one.lengths for one in job.evaluations] for job in made}
    assert lengths["none"] == [("0k",), ("2k",)]
    assert lengths["few"] == [("0k",), ("1k",), ("2k",)]


def test_sizes_are_those_trained_on_for_tasks_of_one_kind(tmp_path):
    train = {"task": "rewrite", "task_options": {"key_size": 1, "symbols": 4}, "segment": 4}
    board = {"train": train, "evaluate": {"tasks": ["rewrite", "remember"], "lengths": ["3"]}}
    values = {**VALUES, "memories": ["none"], "seeds": [0], "memory": {}, "board": {"pairs": board}}
    comparison = Comparison.from_dict(values)
    found, _ = leaderboard(comparison, tmp_path, _done(comparison, tmp_path))
    assert [(s["task"], s["mean_tokens"], s["chance"]) for s in found["scores"]] == [
        ("rewrite", 12, 0.25),
        ("remember", 12, 0.25),
    ]


def test_a_board_of_text_has_perplexities(tmp_path, no_data):
    train = {"task": "text", "segment": 8, "vocabulary": 64, "most_segments": [2], "steps": 1, "batch_size": 2}
    board = {"train": train, "evaluate": {"tasks": ["text"], "lengths": ["24"], "samples": 3}}
    values = {**VALUES, "memories": ["none", "few"], "seeds": [0], "board": {"text": board}}
    comparison = Comparison.from_dict(values)
    found, costs = leaderboard(comparison, tmp_path, _done(comparison, tmp_path))
    assert found["scores"] == []
    none, few = found["text"]
    assert (none["model"], none["task"], none["length"], none["count"], none["predicted"]) == (
        "none",
        "text",
        "24",
        3,
        69,
    )
    assert none["gain"]["mean"] == pytest.approx(0, abs=1e-5)
    assert few["gain"]["mean"] != none["gain"]["mean"]
    assert 1 < few["perplexity"]["low"] <= few["perplexity"]["mean"] <= few["perplexity"]["high"]
    assert [cost["tokens_per_second"] > 0 for cost in costs] == [True, True]
    write_report(found, costs, tmp_path)
    assert (tmp_path / "text.csv").read_text().count("\n") == 3
    # Measured again, nothing is answered anew.
    assert leaderboard(comparison, tmp_path, _done(comparison, tmp_path))[0] == found


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


CHAINED = {
    "memories": ["none", "few", "none + end"],
    "seeds": [0, 1],
    "train": {
        "host_options": TINY, "steps": 2, "batch_size": 2, "segment": 64, "most_segments": [1], "vocabulary": 64,
        "save_every": 0, "report_to": [],
    },
    "evaluate": {"samples": 2, "batch_size": 2},
    "memory": {
        "few": {"memory": "rmt", "memory_options": {"num_tokens": 2}},
        "none + end": {"trained": "none", "evaluate": {"prompt": "truncated:40"}},
    },
    "board": {
        "text": {
            "memories": ["none"], "seeds": [0],
            "train": {"task": "text", "vocabulary_tasks": ["qa1"]},
            "evaluate": {"tasks": ["text"], "lengths": ["64"]},
        },
        "tuned": {
            "memories": ["none", "none + end"], "seeds": [0], "after": "text",
            "evaluate": {"tasks": ["qa1"], "lengths": ["0k"]},
        },
    },
}  # fmt: skip


def test_boards_have_entries_and_seeds_of_their_own_and_entries_are_measured_otherwise():
    made = Comparison.from_dict(CHAINED).jobs
    assert [(j.board, j.entry, j.seed, j.trained) for j in made] == [
        ("text", "none", 0, None),
        ("tuned", "none", 0, None),
        ("tuned", "none + end", 0, "none"),
    ]
    text, tuned, end = made
    assert text.start is None
    assert tuned.start == text.folder
    assert end.start is None
    assert end.model == tuned.folder != end.folder
    assert end.experiment == tuned.experiment
    assert (tuned.evaluations[0].prompt, end.evaluations[0].prompt) == ("whole", "truncated:40")
    # Listed the other way round, and alone: each begins when what it needs has ended.
    assert begun([end, tuned, text]) == [text, tuned, end]
    assert begun([end, tuned]) == [tuned, end]


def test_models_begin_on_the_same_seed_or_on_the_only_one():
    text, tuned = CHAINED["board"]["text"], CHAINED["board"]["tuned"]

    def starts(first: list[int]) -> list[str]:
        boards = {"text": {**text, "seeds": first}, "tuned": {**tuned, "seeds": [0, 1]}}
        made = Comparison.from_dict({**CHAINED, "board": boards}).jobs
        return [str(job.start) for job in made if (job.board, job.entry) == ("tuned", "none")]

    assert starts([0, 1]) == ["runs/text/none/seed-0", "runs/text/none/seed-1"]
    assert starts([3]) == ["runs/text/none/seed-3"] * 2
    with pytest.raises(ConfigError, match="none with seed 1, or with one seed"):
        starts([0, 3])


def test_a_package_that_a_prompt_needs_is_missed_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    memory = {**CHAINED["memory"], "none + end": {"trained": "none", "evaluate": {"prompt": "bm25:40"}}}
    comparison = Comparison.from_dict({**CHAINED, "memory": memory})
    with pytest.raises(MissingExtraError, match=r"mnemic\[retrieval\]"):
        next(run_jobs(comparison.jobs, tmp_path))
    assert not (tmp_path / "runs").exists()


def test_a_board_has_settings_of_an_entry_of_its_own():
    memories = {"none", "few"}
    board = {
        "memory": {"few": {"memory_options": {"memory_causal": False}}},
        "evaluate": {"tasks": ["qa1"], "lengths": ["0k"]},
    }
    values = {**CHAINED, "memories": ["none", "few"], "memory": {"few": CHAINED["memory"]["few"]}, "seeds": [0]}
    later = {**board, "train": {"task": "stories", "tasks": ["qa1"]}}
    made = Comparison.from_dict({**values, "board": {"one": {**later, "memory": {}}, "two": later}}).jobs
    options = {(j.board, j.entry): j.experiment.memory_options for j in made if j.entry in memories}
    assert options == {
        ("one", "none"): {}, ("one", "few"): {"num_tokens": 2},
        ("two", "none"): {}, ("two", "few"): {"num_tokens": 2, "memory_causal": False},
    }  # fmt: skip


def begun(made: list[Job]) -> list[Job]:
    """Jobs in the order in which they are begun, where two may run at a time."""
    order: list[Job] = []

    def begin(job: Job) -> "Future[Outcome]":
        order.append(job)
        return jobs.done(Outcome(job))

    assert [outcome.job for outcome in jobs.in_order(made, 2, begin)] == order
    return order


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("board.tuned.memories", ["none", "fwe"], "Did you mean 'few'"),
        ("board.tuned.memories", [], "list of different names"),
        ("board.tuned.seeds", [0, 0], "whole numbers"),
        ("board.text.seeds", [1, 2], "further up that trains none with seed 0"),
        ("board.tuned.memories", ["none", "none + end", "few"], "further up that trains few with seed 0"),
        ("board.text.host", "none", "goes with after"),
        ("board.text.memory", {"few": {}}, "few"),
        ("board.tuned.memory", {"none": {"steps": 3}}, "must be equal for all"),
        ("board.tuned.after", "tuned", "further up"),
        ("board.text.after", "tuned", "further up"),
        ("board.tuned.memories", ["none + end"], "another entry of the same boards"),
        ("memory.none + end.trained", "none + end", "another entry of the same boards"),
        ("memory.none + end.evaluate", {}, "and beside it a table evaluate"),
        ("memory.none + end.memory_options", {"num_tokens": 2}, "nothing else"),
        ("train.vocabulary_tasks", ["qa99"], "qa99"),
    ],
)
def test_bad_chains(path, value, message):
    changed = {**VALUES, **CHAINED}
    *parents, last = path.split(".")
    table = changed
    for key in parents:
        table[key] = dict(table[key])
        table = table[key]
    table[last] = value
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        Comparison.from_dict(changed)


def test_a_board_begins_with_the_weights_of_another_and_a_model_is_measured_twice(tmp_path, monkeypatch):
    monkeypatch.delenv("MNEMIC_DATA", raising=False)
    values = {**CHAINED, "train": {**CHAINED["train"], "learning_rate": 0.0}}
    comparison = Comparison.from_dict(values)
    outcomes = list(run_jobs(comparison.jobs, tmp_path))
    assert [(o.job.folder, o.refused) for o in outcomes] == [(j.folder, None) for j in comparison.jobs]
    text, tuned, end = comparison.jobs
    first, second = (open_run(tmp_path / job.folder) for job in (text, tuned))
    assert tuned.experiment.task == "babilong"
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    weights = second.model.state_dict()
    assert all(weights[name].equal(weight) for name, weight in first.model.state_dict().items())
    assert not (tmp_path / end.folder / "log.json").exists()
    found, _ = leaderboard(comparison, tmp_path, outcomes)
    assert [s["model"] for s in found["scores"]] == ["none", "none + end"]
    seen = {s["model"]: s["mean_tokens"] for s in found["scores"]}
    assert seen["none + end"] <= 40 + 20 < seen["none"] + 20


def test_a_memory_begins_on_the_host_of_another_entry(tmp_path, monkeypatch):
    monkeypatch.delenv("MNEMIC_DATA", raising=False)
    tuned = {**CHAINED["board"]["tuned"], "memories": ["few"], "host": "none"}
    values = {
        **CHAINED, "train": {**CHAINED["train"], "learning_rate": 0.0}, "board": {**CHAINED["board"], "tuned": tuned},
    }  # fmt: skip
    text, few = Comparison.from_dict(values).jobs
    assert few.start == text.folder
    assert [o.refused for o in run_jobs([text, few], tmp_path)] == [None, None]
    first, second = (open_run(tmp_path / job.folder).model.state_dict() for job in (text, few))
    assert set(first) < set(second)
    assert all(second[name].equal(weight) for name, weight in first.items())


def test_what_a_job_needs_was_not_trained(tmp_path):
    _, tuned, end = Comparison.from_dict(CHAINED).jobs
    first, second = (str(o.refused) for o in run_jobs([tuned, end], tmp_path))
    assert "runs/text/none/seed-0, which was not trained" in first
    assert "runs/tuned/none/seed-0, which was not trained" in second
