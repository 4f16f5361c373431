"""mnemic prepare, and the way from a folder of texts to a measured model."""

import json
import tomllib

import pytest

import mnemic
from mnemic.benchmarks.expected import tokens_expected
from mnemic.benchmarks.experiment import Experiment
from mnemic.training import TokenStore
from tests.cli.conftest import TINY, invoke, restored, succeed

SENTENCE = "the cat sat on a mat and saw rain fall over green hills while Mary read her book"
WORDS = SENTENCE.split()


def story(i: int) -> str:
    """A text that says one word of its own again and again."""
    return " ".join(WORDS[(i * 7 + k * (1 + i % 3)) % len(WORDS)] + f" name{i}" * (k % 5 == 0) for k in range(60)) + "."


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(story(i))
    return folder


@pytest.fixture(scope="module")
def prepared(texts):
    folder = texts.parent / "prepared"
    with restored():
        succeed("prepare", texts, "--train-tokenizer", 320, "--validation-fraction", 0.25, "--output", folder)
    return folder


def test_prepare_says_what_it_made(texts, prepared):
    store = TokenStore(prepared)
    again = succeed("prepare", texts, "--train-tokenizer", 320, "--validation-fraction", 0.25, "--output", prepared)
    assert f"{store.tokens:,}" in again.stdout
    assert "validation" in again.stdout
    assert "stored as u2" in again.stdout
    checked = succeed("prepare", "--check", prepared)
    assert "intact" in checked.stdout
    assert (len(store), len(TokenStore(prepared, "validation"))) == (9, 3)


def test_check_finds_damage(texts, tmp_path):
    succeed("prepare", texts, "--train-tokenizer", 300, "--output", tmp_path / "out")
    path = tmp_path / "out" / "train-000000.tokens"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    result = invoke("prepare", "--check", tmp_path / "out")
    assert result.exit_code == 2
    assert "train-000000.tokens is damaged" in result.stderr


def test_skipped_rows_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good words"}\n{"text": 5}\n')
    arguments = ("prepare", tmp_path / "a.jsonl", "--train-tokenizer", 300, "--output", tmp_path / "out")
    assert "a.jsonl, line 2" in invoke(*arguments).stderr
    result = succeed(*arguments, "--on-error", "skip")
    assert "1 bad rows were left out" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "Give sources"),
        (("missing", "--output", "out", "--train-tokenizer", "300"), "does not exist"),
        (("t.txt", "--output", "out"), "Give a tokenizer"),
        (("t.txt", "--output", "out", "--train-tokenizer", "30"), "at least 259"),
        (("t.txt", "--output", "out", "--train-tokenizer", "300", "--on-error", "go on"), "on_error"),
        (("t.txt", "--check", "out"), "no sources"),
        (("--check", "missing"), "manifest.json does not exist"),
    ],
)
def test_prepare_errors(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("words")
    result = invoke("prepare", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


RUN = ("--memory", "rmt", "--set", "memory.num_tokens=2", "--segment", "16", "--segments", "2", *TINY)


def test_from_texts_to_a_measured_model(prepared, tmp_path):
    run = tmp_path / "run"
    trained = succeed(
        "train", "--task", "text", "--data", prepared, "--steps", 3, "--set", "stateful=true", *RUN, "--output", run
    )
    assert f"mnemic eval {run}" in trained.stdout
    assert tomllib.loads((run / "experiment.toml").read_text())["stateful"] is True
    model = mnemic.load(run)
    assert model.config.vocab_size == TokenStore(prepared).vocabulary
    shown = succeed("eval", run, "--batch-size", 2)
    assert "carried through a document" in shown.stdout
    results = json.loads((run / "results-text.json").read_text())
    assert (results["documents"], len(results["records"])) == (3, 3)
    held = [TokenStore(prepared, "validation").length(i) for i in range(3)]
    # The first token of every segment is predicted by nothing.
    assert results["tokens"] == sum(n - -(-n // 16) for n in held)
    one = json.loads((run / "results-text.json").read_text())["scores"]
    succeed("eval", run, "--batch-size", 1)
    for a, b in zip(one, json.loads((run / "results-text.json").read_text())["scores"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for given in (("--lengths", "4k"), ("--prompt", "truncated:9")):
        assert "held-out text" in invoke("eval", run, *given).stderr
    answer = succeed("stream", run, "--ask", "the cat", "--max-new-tokens", 3, text="Mary read her book")
    assert "tokens read" in answer.stderr


def test_samples_of_a_mixture(prepared, tmp_path):
    (tmp_path / "mix.toml").write_text(f"[[part]]\nfolder = {json.dumps(str(prepared))}\nweight = 1\n")
    task = ("--task", "text", "--data", tmp_path / "mix.toml")
    succeed("train", *task, "--steps", 1, *RUN, "--output", tmp_path / "run")
    assert (tmp_path / "run" / "log.json").is_file()


def test_stateful_runs_have_one_length(prepared):
    settings = {"task": "text", "data": str(prepared), "stateful": True, "steps": 10, "batch_size": 2, "segment": 8}
    assert tokens_expected(Experiment(**settings, most_segments=(3,))) == 10 * 2 * 3 * 8
    with pytest.raises(mnemic.ConfigError, match="one number"):
        Experiment(**settings, most_segments=(1, 2))


def test_eval_needs_documents_kept_apart(prepared, texts, tmp_path):
    run = tmp_path / "run"
    succeed("train", "--task", "text", "--data", texts, "--steps", 1, *RUN, "--output", run)
    result = invoke("eval", run)
    assert (result.exit_code, "--validation-fraction" in result.stderr) == (2, True)
    result = invoke("eval", run, "--data", prepared)
    assert (result.exit_code, "another tokenizer" in result.stderr) == (2, True)


def test_stateful_runs_need_shards(texts, tmp_path):
    arguments = ("--task", "text", "--data", texts, "--set", "stateful=true", *RUN, "--output", tmp_path / "run")
    result = invoke("train", *arguments)
    assert (result.exit_code, "mnemic prepare" in result.stderr) == (2, True)
    assert not (tmp_path / "run").exists()
