"""mnemic eval and mnemic compare: answers, reports, runs that are killed."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

import mnemic
from tests.cli.conftest import TINY, invoke, restored, succeed


def _report(folder):
    return json.loads((folder / "report.json").read_text())


def test_eval_answers_what_was_trained(recall_run, tmp_path):
    shown = succeed("eval", recall_run, "--lengths", "2,3", "--samples", 16, "--seeds", "5,6", "--output", tmp_path)
    assert "recall" in shown.stdout
    found = _report(tmp_path)
    assert [(s["task"], s["length"], s["seed"], s["count"]) for s in found["scores"]] == [
        ("recall", length, seed, 16) for length in ("2", "3") for seed in (5, 6)
    ]
    assert {s["chance"] for s in found["scores"]} == {1 / 8}
    (model,) = found["models"]
    assert (model["model"], model["memory"]) == (recall_run.name, "lm2")
    assert found["settings"]["versions"]["mnemic"] == mnemic.__version__
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        "recall.jsonl", "report.json", "report.csv", "report.html", "costs.json",
    }  # fmt: skip


def test_by_default_every_setting_has_a_folder_of_its_own(recall_run):
    for samples in (4, 4, 6):
        succeed("eval", recall_run, "--lengths", "2", "--samples", samples)
    folders = sorted((recall_run / "evaluations").iterdir())
    assert sorted(s["count"] for f in folders for s in _report(f)["scores"]) == [4, 6]


@pytest.fixture(scope="module")
def babilong_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "babilong"
    task = ("--task", "babilong", "--memory", "rmt", "--set", "memory.num_tokens=2", "--set", "vocabulary=300")
    with restored():
        succeed("train", *task, *TINY, "--segments", "1", "--steps", 1, "--output", folder)
    return folder


def test_runs_share_a_report(babilong_run, recall_run, tmp_path):
    arguments = ("--tasks", "qa1", "--lengths", "0k,400", "--samples", 3, "--output", tmp_path / "scores")
    refused = invoke("eval", babilong_run, recall_run, *arguments)
    assert (refused.exit_code, "tokenizer cannot read" in refused.stderr) == (2, True)
    succeed("eval", babilong_run, *arguments)
    found = _report(tmp_path / "scores")
    assert [(s["model"], s["task"], s["length"], s["count"]) for s in found["scores"]] == [
        ("babilong", "qa1", "0k", 3), ("babilong", "qa1", "400", 3),
    ]  # fmt: skip
    assert found["settings"]["released_data"] is False


def test_other_settings_do_not_go_into_the_same_folder(recall_run, tmp_path):
    arguments = ("eval", recall_run, "--lengths", "2", "--output", tmp_path, "--samples")
    succeed(*arguments, 4)
    before = (tmp_path / "recall.jsonl").read_bytes()
    result = invoke(*arguments, 5)
    assert (result.exit_code, "samples was 4 and is 5" in result.stderr) == (2, True)
    assert (tmp_path / "recall.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--tasks", "qa21"), "No task is called 'qa21'"),
        (("--tasks", "longmemeval"), "judge"),
        (("--tasks", ","), "--tasks"),
        (("--tasks", "qa1,text"), "text alone"),
        (("--lengths", "3x"), "length"),
        (("--lengths", "200"), "reserve"),
        (("--split", "tets"), "Did you mean 'test'"),
        (("--prompt", "trunctated:9"), "Did you mean"),
        (("--data", "missing"), "does not exist"),
        (("--seeds", "x"), "--seeds"),
    ],
)
def test_eval_errors(arguments, message, babilong_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("eval", babilong_run, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_runs_are_named_and_put_somewhere(recall_run, babilong_run):
    assert "No run" in invoke("eval").stderr
    assert "--output" in invoke("eval", recall_run, babilong_run, "--tasks", "recall").stderr
    assert "equal names" in invoke("eval", recall_run, recall_run, "--output", "x").stderr


def test_tasks_are_listed():
    shown = succeed("eval", "--list").stdout
    assert all(name in shown for name in ("qa20", "ruler_vt", "segment_mqar", "chomsky_parity_check"))


CONFIG = """
title = "Two"
memories = ["none", "rmt"]
[train]
steps = 1
batch_size = 2
segment = 8
least_segments = 2
most_segments = [2]
report_to = []
host_options = { hidden_size = 16, intermediate_size = 16, num_attention_heads = 2, num_key_value_heads = 2 }
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


def test_compare_writes_a_leaderboard_and_does_nothing_twice(tmp_path):
    (tmp_path / "two.toml").write_text(CONFIG)
    plan = succeed("compare", tmp_path / "two.toml", "--output", tmp_path / "board", "--plan")
    assert "2 models, each about 32 tokens" in plan.stderr
    assert not (tmp_path / "board").exists()
    shown = succeed("compare", tmp_path / "two.toml", "--output", tmp_path / "board")
    assert "rmt" in shown.stdout
    found = _report(tmp_path / "board")
    assert [m["model"] for m in found["models"]] == ["none", "rmt"]
    files = {path: path.read_bytes() for path in (tmp_path / "board" / "runs").rglob("*") if path.is_file()}
    succeed("compare", tmp_path / "two.toml", "--output", tmp_path / "board")
    changed = [path for path, content in files.items() if path.read_bytes() != content]
    assert not [path for path in changed if path.name != "description.json"]
    assert _report(tmp_path / "board") == found


def test_compare_errors(tmp_path):
    (tmp_path / "bad.toml").write_text(CONFIG.replace("memories", "memorise"))
    result = invoke("compare", tmp_path / "bad.toml", "--output", tmp_path / "board")
    assert (result.exit_code, "Did you mean 'memories'" in result.stderr) == (2, True)
    (tmp_path / "none.toml").write_text(CONFIG.replace('memories = ["none", "rmt"]', 'memories = ["rmt"]'))
    content = (tmp_path / "none.toml").read_text().replace("num_tokens = 2", "num_tokens = 5000")
    (tmp_path / "none.toml").write_text(content)
    result = invoke("compare", tmp_path / "none.toml", "--output", tmp_path / "board")
    assert (result.exit_code, "No model" in result.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_ten_times_the_report_is_the_same(recall_run, tmp_path):
    """SIGKILL while answers are made and written; compared byte by byte with an evaluation that was left alone."""
    command = [
        sys.executable, "-c", "from mnemic.cli import main; main()", "eval", str(recall_run), "--lengths", "2,40,80",
        "--samples", "60", "--batch-size", "2", "--threads", "1", "--output",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "MNEMIC_DATA"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    log, kills = tmp_path / "killed" / "recall.jsonl", 0
    while kills < 10:
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        before = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size < before + 500):
            time.sleep(0.001)
        assert process.poll() is None, "the evaluation ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    subprocess.run([*command, str(tmp_path / "killed")], check=True, env=environment, capture_output=True)
    for name in ("report.json", "report.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_processes_of_a_killed_comparison_end_with_it(tmp_path):
    (tmp_path / "two.toml").write_text(CONFIG.replace("steps = 1", "steps = 100000"))
    command = [
        sys.executable, "-c", "from mnemic.cli import main; main()", "compare", str(tmp_path / "two.toml"),
        "--processes", "2", "--output", str(tmp_path / "board"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs, deadline = tmp_path / "board" / "runs", time.monotonic() + 200
    while len(list(runs.rglob("experiment.toml"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert len(gone) >= 2
    assert not alive
