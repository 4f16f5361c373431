"""mnemic train, eval and stream: one run folder, from settings to answers."""

import json
import tomllib

import pytest

import mnemic
from mnemic.benchmarks.expected import tokens_expected
from mnemic.benchmarks.experiment import Experiment
from mnemic.cli import stream as stream_command
from tests.cli.conftest import RECALL, TINY, invoke, succeed

STORY = "Mary garden the rain\nfell and John office\n" * 9


# Train


def test_a_run_folder_says_everything(recall_run):
    settings = tomllib.loads((recall_run / "experiment.toml").read_text())
    assert settings["memory_options"] == {"num_slots": 8}
    assert (settings["steps"], settings["segment"], settings["most_segments"]) == (3, 8, [2, 3])
    assert len([e for e in json.loads((recall_run / "log.json").read_text())["history"] if "loss" in e]) == 3
    assert mnemic.load(recall_run).memory.name == "lm2"


def test_a_finished_run_is_not_trained_again(recall_run):
    before = (recall_run / "log.json").read_text()
    result = succeed("train", *RECALL, *TINY, "--steps", 3, "--set", "log_every=1", "--output", recall_run)
    assert "finished" in result.stdout
    assert (recall_run / "log.json").read_text() == before


def test_a_file_with_overrides(tmp_path):
    file = tmp_path / "some.toml"
    file.write_text('memory = "rmt"\ntask = "text"\nsteps = 900\nsegment = 16\n[memory_options]\nnum_tokens = 2\n')
    (tmp_path / "book.txt").write_text("It rained. " * 200)
    folder = tmp_path / "run"
    changes = ("--steps", 1, "--data", tmp_path / "book.txt", "--segments", "1", "--set", "memory.memory_causal=true")
    result = succeed("train", file, *changes, *TINY, "--output", folder)
    assert "mnemic stream" in result.stdout
    assert "1 steps of 4" in result.stderr
    settings = tomllib.loads((folder / "experiment.toml").read_text())
    assert settings["memory_options"] == {"num_tokens": 2, "memory_causal": True}
    assert settings["steps"] == 1


def test_tokens_are_counted_over_the_stages():
    one = Experiment(task="recall", segment=8, steps=10, batch_size=2, least_segments=1, most_segments=(1, 3))
    assert tokens_expected(one) == (5 * 1 + 5 * 2) * 2 * 8
    assert tokens_expected(Experiment(task="recall", segment=8, steps=1, batch_size=2, most_segments=(1, 3))) == 16


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--memory", "lm3"), "Did you mean 'lm2'"),
        (("--task", "reacll"), "Did you mean 'recall'"),
        (("--set", "stesp=5"), "Did you mean 'steps'"),
        (("--set", "steps"), "expected key=value"),
        (("--set", 'steps="many"'), "expected int"),
        (("--steps", "0"), "at least 1"),
        (("--steps", "5", "--set", "steps=5"), "given twice"),
        (("--segments", "1,x"), "--segments"),
        (("--set", "most_segments=[1.5]"), "whole numbers"),
        (("--set", "memory.num_slot=5"), "Did you mean 'num_slots'"),
        (("--set", "task.valeus=5"), "Did you mean 'values'"),
        (("--set", "host=lama"), "Did you mean 'llama'"),
        (("--task", "babilong", "--tasks", "qa21"), "No bAbI task"),
        (("--task", "babilong", "--data", "missing"), "does not exist"),
        (("--task", "babilong", "--data", "."), "books_train.jsonl.gz does not exist"),
        (("--task", "text", "--data", "missing.txt"), "plain text"),
        (("missing.toml",), "Cannot read"),
    ],
)
def test_train_errors_leave_no_folder(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = () if "--task" in arguments else ("--task", "recall")
    result = invoke("train", *task, *arguments, "--output", "run")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("mnemic: ")
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_other_folders_are_not_overwritten(recall_run, tmp_path):
    result = invoke("train", *RECALL, *TINY, "--steps", 4, "--output", recall_run)
    assert (result.exit_code, "other settings" in result.stderr) == (2, True)
    (tmp_path / "model.safetensors").touch()
    result = invoke("train", *RECALL, *TINY, "--steps", 4, "--output", tmp_path)
    assert (result.exit_code, "holds a model" in result.stderr) == (2, True)
    result = invoke("train", *RECALL, *TINY, "--steps", 4, "--output", tmp_path / "model.safetensors")
    assert (result.exit_code, "is a file" in result.stderr) == (2, True)


@pytest.mark.parametrize("command", ["eval", "stream"])
def test_folders_that_are_no_runs(command, tmp_path):
    result = invoke(command, tmp_path / "missing")
    assert (result.exit_code, "does not exist" in result.stderr) == (2, True)
    result = invoke(command, tmp_path)
    assert (result.exit_code, "no model with memory" in result.stderr) == (2, True)
    (tmp_path / "mnemic.json").write_text("{}")
    result = invoke(command, tmp_path)
    assert (result.exit_code, "damaged" in result.stderr) == (2, True)


# Stream


def test_a_stream_is_saved_and_read_on(recall_run, tmp_path):
    file, book = tmp_path / "alice.mnemic", tmp_path / "book.txt"
    book.write_text(STORY)
    first = succeed("stream", recall_run, "--save", file, text=STORY)
    assert "72 tokens read" in first.stderr
    assert first.stdout == ""
    ask = ("--ask", "? Mary", "--max-new-tokens", 4)
    later = succeed("stream", recall_run, "--load", file, *ask)
    at_once = succeed("stream", recall_run, "--feed", book, *ask)
    assert later.stdout == at_once.stdout
    assert len(later.stdout.split()) == 4
    assert "78 tokens read" in later.stderr


def test_answers_are_those_of_the_library(recall_run):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recall_run)
    stream = mnemic.load(recall_run).stream(tokenizer=tokenizer).feed(STORY)
    expected = stream.generate("? John", max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    shown = succeed("stream", recall_run, "--ask", "? John", "--max-new-tokens", 5, text=STORY).stdout
    assert shown.strip() == expected.strip()


def test_the_prompt(recall_run, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_command, "_terminal", lambda: True)
    file = tmp_path / "s.mnemic"
    lines = ["Mary garden", f"/save {file}", "/reset", "/stats", "/save", "/nothing", f"/load {file}", "", "/quit"]
    result = succeed("stream", recall_run, "--max-new-tokens", 2, text="\n".join(lines))
    said = result.stderr.splitlines()
    assert [line.split(",")[0] for line in said if "tokens read" in line] == [
        "4 tokens read", "0 tokens read", "0 tokens read", "4 tokens read", "4 tokens read",
    ]  # fmt: skip
    assert "mnemic: /save needs a file." in said
    assert any(line.startswith("mnemic: There is no /nothing") for line in said)
    # The end of input ends the prompt too, and saves.
    succeed("stream", recall_run, "--load", file, "--save", tmp_path / "t.mnemic", text="rain\n")
    assert (tmp_path / "t.mnemic").is_file()


def test_ctrl_c_stops_an_answer_and_not_the_prompt(recall_run, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(stream_command, "_terminal", lambda: True)
    monkeypatch.setattr(stream_command, "_answer", interrupted)
    result = succeed("stream", recall_run, text="Mary\n/stats\n")
    assert result.stderr.splitlines()[1] == "stopped"
    assert "0 tokens read" in result.stderr.splitlines()[2]


def test_a_host_gets_a_memory(recall_run, tmp_path):
    from transformers import AutoTokenizer

    from tests.tiny import tiny_host

    tiny_host().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(recall_run).save_pretrained(tmp_path)
    result = succeed("stream", tmp_path, "--memory", "rmt", "--segment", 16, text=STORY)
    assert "72 tokens read" in result.stderr


def test_text_is_cut_between_words(monkeypatch, tmp_path):
    monkeypatch.setattr(stream_command, "BLOCK", 16)
    monkeypatch.setattr(stream_command, "LIMIT", 64)
    for text in (STORY, "word " * 40, "x" * 100, "", "\n" * 40, "short"):
        (tmp_path / "text").write_text(text)
        with open(tmp_path / "text") as file:
            parts = list(stream_command.pieces(file))
        assert "".join(parts) == text
        assert all(parts)
        assert [w for part in parts for w in part.split()] == text.split() or text == "x" * 100


def foreign(path):
    path.write_bytes(b"\x80 not text, nor a stream")
    return path


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--load", "foreign"), "damaged"),
        (("--load", "missing"), "does not exist"),
        (("--feed", "missing"), "does not exist"),
        (("--feed", "foreign"), "no UTF-8 text"),
        (("--save", "missing/file"), "does not exist"),
        (("--ask", ""), "Empty input"),
        ((), "Nothing to do"),
        (("--segment", "8"), "goes with --memory"),
        (("--memory", "rmt"), "has a memory already"),
        (("--tokenizer", "."), "No tokenizer"),
    ],
)
def test_stream_errors(arguments, message, recall_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign(tmp_path / "foreign")
    result = invoke("stream", recall_run, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("mnemic: ")
    assert message in result.stderr


# Demo


def test_demo_hands_its_options_on(monkeypatch, tmp_path):
    from mnemic.benchmarks import demo

    seen = []
    monkeypatch.setattr(demo, "run", lambda folder, **options: seen.append((folder, options)))
    succeed("demo", tmp_path, "--quick", "--threads", 2)
    assert seen == [(tmp_path, {"quick": True, "threads": 2})]
