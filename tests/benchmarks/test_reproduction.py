"""Reproductions: the paper's layout and margins, recipes, costs before anything is run, findings of a small run."""

import dataclasses
import json

import pytest

from mnemic.benchmarks import reproduction
from mnemic.benchmarks.building import build
from mnemic.benchmarks.evaluation import Evaluation
from mnemic.benchmarks.expected import tokens_measured
from mnemic.benchmarks.jobs import run_jobs
from mnemic.benchmarks.reproduction import cost, printed
from mnemic.benchmarks.reproduction.claims import claims
from mnemic.benchmarks.reproduction.full import estimate
from mnemic.benchmarks.reproduction.layout import layout, margins
from mnemic.benchmarks.reproduction.recipe import full_text, parse
from mnemic.benchmarks.reproduction.tables import board_table
from mnemic.core.errors import ConfigError, InputError, UnknownNameError
from mnemic.hosts import parameter_report
from mnemic.training.tokenizer import listed_tokenizer

SMALL = """
title = "Small"
scale = "tiny"
seeds = [0]
memories = ["lm2", "none", "none + end"]
[reproduction]
main = "main"
model = "lm2"
others = ["none"]
compared = ["0k"]
curves = ["words"]
ship = "lm2"
[train]
segment = 64
batch_size = 2
steps = 2
warmup_steps = 0
log_every = 1
save_every = 0
report_to = []
vocabulary = 64
most_segments = [1]
[train.host_options]
hidden_size = 16
intermediate_size = 16
num_attention_heads = 2
num_key_value_heads = 2
num_hidden_layers = 1
[evaluate]
samples = 2
batch_size = 2
[board.main.evaluate]
lengths = ["0k", "420"]
[board.words]
memories = ["lm2", "none"]
seeds = [0]
[board.words.train]
task = "text"
[board.words.evaluate]
tasks = ["text"]
lengths = ["64"]
[board.attached]
memories = ["lm2"]
after = "words"
[board.attached.train]
task = "text"
[board.attached.evaluate]
tasks = ["text"]
lengths = ["64"]
[memory.lm2]
memory_options = { num_slots = 4 }
[memory."none + end"]
trained = "none"
evaluate = { prompt = "truncated:40" }
"""


def _scores(values):
    """Scores of leaderboards: {(model, task, length, training seed): right of 10}."""
    return [
        {
            "model": model, "task": task, "length": length, "train_seed": seed, "seed": 1, "count": 10, "chance": 0.1,
            "mean_tokens": 1, "truncated": 0,
            **{rule: {"mean": right / 10, "low": 0.0, "high": 1.0} for rule in ("official", "fixed")},
        }
        for (model, task, length, seed), right in values.items()
    ]  # fmt: skip


def test_margins_of_the_printed_table_are_those_that_its_readers_computed():
    found = {other: margins(printed.averages(), "LM2-1.7B", other, printed.COMPARED) for other in printed.MARGINS}
    assert found == {
        "RMT-1.7B": {"ratio_of_means": 36.6, "mean_of_ratios": 39.5},
        "Llama-3.2-1.2B": {"ratio_of_means": 88.0, "mean_of_ratios": 87.0},
    }


def test_the_printed_means_are_those_of_their_rows_but_for_the_slips_that_are_named():
    wrong = {
        (length, name)
        for length, models in printed.TABLE.items()
        for name, row in models.items()
        if abs(sum(row[:10]) / 10 - row[10]) > 0.07
    }
    assert wrong == set()


def test_a_layout_has_lengths_then_models_and_leaves_out_models_that_lack_a_task():
    values = {
        ("a", "qa1", "1k", 0): 4, ("a", "qa1", "1k", 1): 8, ("a", "qa2", "1k", 0): 2, ("a", "qa2", "1k", 1): 2,
        ("a", "qa1", "0k", 0): 10, ("b", "qa1", "1k", 0): 3, ("b", "qa1", "0k", 0): 5,
    }  # fmt: skip
    models = [{"model": name, "memory": name, "parameters": 1} for name in ("a", "b")]
    table = layout({"title": "", "models": models, "scores": _scores(values)})
    assert table.tasks == ("qa1", "qa2")
    assert {length: list(found) for length, found in table.rows.items()} == {"0k": ["a", "b"], "1k": ["a"]}
    assert dataclasses.astuple(table.rows["1k"]["a"]["qa1"]) == pytest.approx((0.6, 0.4, 0.8))
    assert table.averages() == {"0k": {"a": 1.0, "b": 0.5}, "1k": {"a": pytest.approx(0.4)}}
    assert margins(table.averages(), "a", "b", ("0k", "1k")) == {"ratio_of_means": 100.0, "mean_of_ratios": 100.0}
    assert margins(table.averages(), "a", "b", ("1k",)) is None
    assert margins({"0k": {"a": 1.0, "b": 0.0}}, "a", "b", ("0k",)) is None


def test_boards_of_several_tasks_and_of_one():
    rows = {"0k": {"a": {"qa1": [0.5, 0.4, 0.6], "qa2": [1.0, 1.0, 1.0]}}, "1k": {"b": {"qa1": [0.25, 0.2, 0.3]}}}
    assert board_table({"tasks": ["qa1", "qa2"], "rows": rows}).splitlines()[2:] == [
        "| 0k | a | 50.0 (40 to 60) | 100.0 (100 to 100) | 75.0 |",
        "| 1k | b | 25.0 (20 to 30) | – | 25.0 |",
    ]
    assert board_table({"tasks": ["qa1"], "rows": rows}).splitlines() == [
        "| qa1 | 0k | 1k |",
        "| --- | ---: | ---: |",
        "| a | 50.0 (40 to 60) | – |",
        "| b | – | 25.0 (20 to 30) |",
    ]


def test_claims_are_of_the_tasks_that_were_measured():
    assert "| qa1 at 1K: LM2 / RMT / host | 85.0 / 35.0 / 31.0 | not run yet |" in claims(None)
    rows = {"1k": {name: {"qa1": [mean, mean, mean]} for name, mean in (("lm2", 0.9), ("rmt", 0.6), ("none", 0.5))}}
    found = {"main": "main", "boards": {"main": {"tasks": ["qa1"], "rows": rows}}, "text": {}, "text_changes": []}
    found["besides"] = {}
    found["margins"] = {
        "rmt": {"all": {"ratio_of_means": 50.0, "mean_of_ratios": 51.0}, "interval": [40.0, 60.0]},
        "none": {"all": None, "interval": None},
    }
    said = claims(found).splitlines()
    margin = "+50.0% (+40.0 to +60.0; +51.0% as the mean of ratios)"
    assert f"| qa1, 0K to 4K: LM2 over RMT | +53.2%, from its table | {margin} |" in said
    assert "| qa1, 0K to 4K: LM2 over Llama-3.2 (here: the host alone) | +57.4%, from its table | – |" in said
    assert "| qa1 at 1K: LM2 / RMT / host | 85.0 / 35.0 / 31.0 | 90.0 / 60.0 / 50.0 |" in said
    assert "| qa1 at 2K: LM2 / RMT / host | 58.0 / 44.0 / 25.0 | – / – / – |" in said
    assert "| LM2 with its equations as printed against the one above | – | – |" in said
    design = {
        "tasks": ["mqar"],
        "rows": {"4": {n: {"mqar": [m] * 3} for n, m in (("lm2", 0.8), ("lm2 as printed", 0.1))}},
    }
    said = claims({**found, "boards": {**found["boards"], "design": design}})
    assert "| 10.0 against 80.0 (board design at 4) |" in said
    tasks = [f"qa{number}" for number in range(1, 11)]
    ten = {"1k": {"lm2": {task: [0.1 * at] * 3 for at, task in enumerate(tasks, 1)}}}
    said = claims({**found, "boards": {"main": {"tasks": tasks, "rows": ten}}}).splitlines()
    mean = "| mean of qa1 to qa10 at 1K: LM2 / RMT / host | 78.3 / 47.9 / 50.6 | 55.0 / – / – |"
    assert mean in said
    assert not [line for line in said if "qa1 at 1K" in line]
    boards = {**found["boards"], "tasks": {"tasks": tasks, "rows": ten}}
    said = claims({**found, "boards": boards, "besides": {"tasks": {"rmt": found["margins"]["rmt"]}}}).splitlines()
    assert mean in said
    assert "| qa1 at 1K: LM2 / RMT / host | 85.0 / 35.0 / 31.0 | 90.0 / 60.0 / 50.0 |" in said
    over = "mean of qa1 to qa10, 0K to 4K: LM2 over RMT"
    assert f"| {over} | +37.1% | {margin} |" in said


@pytest.mark.parametrize("scale", reproduction.SCALES)
def test_every_scale_has_a_recipe_with_the_models_of_the_paper(scale):
    found = reproduction.recipe("lm2", scale)
    main = [job for job in found.comparison.jobs if job.board == found.main]
    assert {"lm2", "rmt", "none", "none + bm25"} <= {job.entry for job in main}
    assert found.others[0] == "rmt"
    assert set(found.compared) <= {n for e in main[0].evaluations for _, n, _ in e.names()}
    for board in {job.board for job in found.comparison.jobs}:
        alike = [
            (e.steps, e.batch_size, e.most_segments, e.tasks)
            for e in (job.experiment for job in found.comparison.jobs if job.board == board)
        ]
        assert len(set(alike)) == 1


@pytest.mark.parametrize("scale, words", [("cpu", 296), ("gpu", 4096)])
def test_models_of_the_main_board_are_equally_large_and_begin_on_their_own_first_board(scale, words):
    found = reproduction.recipe("lm2", scale)
    jobs = {j.entry: j for j in found.comparison.jobs if j.board == found.main and j.trained is None}
    tokenizer = listed_tokenizer(
        ["<pad>", "<unk>", "<eos>", *(f"w{i}" for i in range(words - 3))],
        pad_token="<pad>", unk_token="<unk>", eos_token="<eos>",
    )  # fmt: skip
    first = {j.entry: j for j in found.comparison.jobs if j.board == "bind"}
    assert jobs.keys() == first.keys()
    for name, job in jobs.items():
        # As near as one unit of width of the feed-forward allows, and the same model on both boards.
        width = 3 * job.experiment.host_options["hidden_size"] * job.experiment.host_options.get("num_hidden_layers", 2)
        assert abs(size(job.experiment, tokenizer) - job.experiment.parameters) <= width, name
        assert size(job.experiment, tokenizer) == size(first[name].experiment, tokenizer)
        assert job.start == first[name].folder


def size(experiment, tokenizer):
    model, _ = build(experiment, tokenizer)
    return sum(part["total"] for part in parameter_report(model).values())


@pytest.mark.parametrize(
    "changed, message",
    [
        (('main = "main"', 'main = "man"'), "Did you mean 'main'"),
        (('curves = ["words"]', 'curves = ["wrds"]'), "Did you mean 'words'"),
        (('others = ["none"]', 'others = ["nonne"]'), "Did you mean 'none'"),
        (('ship = "lm2"', 'ship = "lm3"'), "Did you mean 'lm2'"),
        (('compared = ["0k"]\n', ""), "has no compared"),
        (('compared = ["0k"]', 'compard = ["0k"]'), "Did you mean 'compared'"),
        (('title = "Small"', "title ="), "no valid TOML"),
    ],
)
def test_bad_recipes(changed, message):
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        parse(SMALL.replace(*changed))


def test_unknown_systems_and_scales():
    with pytest.raises(UnknownNameError, match="Did you mean 'lm2'"):
        reproduction.recipe("lm3", "cpu")
    with pytest.raises(UnknownNameError, match="Did you mean 'cpu'"):
        reproduction.recipe("lm2", "cpus")


def test_tokens_that_an_evaluation_reads():
    words = Evaluation(tasks=("qa1", "qa2"), lengths=("0k", "1k"), seeds=(1, 2), samples=10)
    assert tokens_measured(words, 64) == 2 * 2 * 10 * (80 + 1000)
    cut = dataclasses.replace(words, prompt="truncated:64")
    assert tokens_measured(cut, 64) == 2 * 2 * 10 * (64 + 64)
    assert tokens_measured(Evaluation(tasks=("text",), lengths=("256",), samples=3), 64) == 2 * 256 * 3
    assert tokens_measured(Evaluation(tasks=("recall",), lengths=("4",), samples=3), 8) == 4 * 8 * 3


def test_the_paper_s_own_configuration_is_costed_and_has_the_paper_s_size():
    said = estimate(full_text("lm2"))
    lines = dict(line.split(": ", 1) for line in said.splitlines() if ": " in line)
    total, host = (int(part.split()[0].lstrip("(").replace(",", "")) for part in lines["parameters"].split(" (")[:2])
    # 1.2B for the host and 0.5B for the memory in the paper; seven square matrices a block here.
    assert 1.2e9 < host < 1.25e9
    assert total - host == pytest.approx(16 * 7 * 2048**2, rel=0.01)
    assert "Nothing was run." in said
    assert "GPU-hours" in lines["estimate"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduction")
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MNEMIC_DATA", raising=False)
        recipe = parse(SMALL)
        before = cost.costs(recipe.comparison, folder)
        outcomes = list(run_jobs(recipe.comparison.jobs, folder))
        after = cost.costs(recipe.comparison, folder)
    return recipe, folder, outcomes, before, after


def test_costs_are_of_what_is_left(small):
    recipe, folder, _, before, after = small
    assert [one.job for one in before] == list(recipe.comparison.jobs)
    lm2, end = before[0], next(one for one in before if one.job.trained)
    assert lm2.train_tokens == 2 * 2 * 64
    assert lm2.measured_tokens == 2 * (80 + 420)
    assert lm2.seconds > 0
    assert lm2.memory > 2**20
    assert lm2.disk > 1000
    assert end.train_tokens == 0
    assert end.measured_tokens == 2 * 2 * 40
    assert end.disk == 0
    assert {(one.train_tokens, one.measured_tokens, one.seconds, one.disk) for one in after} == {(0, 0, 0.0, 0)}
    # Two kinds of model on each of two tasks; boards that go on share them, and so does the entry that is not trained.
    assert len(json.loads((folder / cost.PACES).read_text(encoding="utf-8"))) == 4


def test_no_room(small, monkeypatch, tmp_path):
    before = small[3]
    cost.check_room(before, tmp_path, 1)
    monkeypatch.setattr(cost, "free_memory", lambda: 2**20)
    with pytest.raises(InputError, match=r"1 models at a time need about [\d.,]+ MiB of memory and 1.0 MiB are free"):
        cost.check_room(before, tmp_path, 1)
    monkeypatch.setattr(cost, "free_memory", lambda: None)
    huge = [dataclasses.replace(before[0], disk=2**60)]
    with pytest.raises(InputError, match=r"need about 1,048,576.0 TiB of disk"):
        cost.check_room(huge, tmp_path / "not yet", 1)


def test_findings_of_a_small_run(small, tmp_path):
    recipe, folder, outcomes, _, _ = small
    found = reproduction.findings(recipe, folder, outcomes)
    assert found == json.loads(json.dumps(found))
    rows = found["boards"]["main"]["rows"]
    assert {length: list(models) for length, models in rows.items()} == {
        "0k": ["lm2", "none", "none + end"], "420": ["lm2", "none", "none + end"],
    }  # fmt: skip
    assert list(found["boards"]) == ["main"]
    texts = {(board, one["model"]): one["perplexity"]["mean"] for board, rows in found["text"].items() for one in rows}
    assert set(texts) == {("words", "lm2"), ("words", "none"), ("attached", "lm2")}
    changes = {(one["board"], one["model"], one["against"]): one for one in found["text_changes"]}
    others = {
        ("words", "lm2", "none"): ("words", "none"),
        ("attached", "lm2", "lm2 before, from board words"): ("words", "lm2"),
    }
    assert changes.keys() == others.keys()
    for key, one in changes.items():
        assert one["mean"] == pytest.approx(100 * (texts[key[:2]] / texts[others[key]] - 1), abs=1e-3)
        assert one["low"] <= one["mean"] <= one["high"]
    assert set(found["margins"]["none"]["seeds"]) == {"0"}
    assert set(found["margins"]["none"]) == {"all", "interval", "seeds"}
    tokens = [at for at, _ in found["curves"]["words"]["lm2"]]
    assert tokens == [2 * 64, 4 * 64]
    paths = reproduction.write(found, tmp_path)
    assert [p.name for p in paths] == ["findings.json", "tables.md", "curves.png"]
    said = paths[1].read_text(encoding="utf-8")
    assert "| qa1 | 0k | 420 |" in said
    assert "\n| none + end | " in said
    assert "paper: RMT-1.7B, printed +37.1%" in said
    assert "## words: held-out" in said
    assert "| attached: lm2 | 0 | 64 | lm2 before, from board words |" in said
    assert reproduction.markdown(json.loads(paths[0].read_text(encoding="utf-8"))) == said
