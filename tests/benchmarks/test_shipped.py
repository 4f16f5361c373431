"""Shipped models: exported small, opened by name, asked in the demonstration; the one that there is."""

import re
import time

import pytest
import torch
from rich.console import Console

from mnemic import InputError
from mnemic.benchmarks import demo_asked, shipped
from mnemic.benchmarks.experiment import Experiment
from mnemic.benchmarks.runs import run
from mnemic.benchmarks.trained import open_run
from mnemic.core.errors import DataError, UnknownNameError, UnsupportedError
from mnemic.serving.chat import ChatTemplate

SETTINGS = {
    "host_options": {
        "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    },
    "memory_options": {"num_slots": 4}, "steps": 2, "batch_size": 2, "segment": 64, "most_segments": (1,),
    "vocabulary": 64, "save_every": 0, "report_to": (), "warmup_steps": 0,
}  # fmt: skip
SCORES = [{"task": "qa1", "length": "0k", "count": 8, "official": {"mean": 0.5, "low": 0.25, "high": 0.75}}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MNEMIC_DATA", raising=False)
        run(Experiment(**SETTINGS), folder, progress=False)
    return folder


@pytest.fixture
def models(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    monkeypatch.delenv("MNEMIC_DATA", raising=False)
    shipped.export(trained, tmp_path / demo_asked.NAME, title="A model", scores=SCORES, before=[trained, trained])
    return tmp_path


def test_an_exported_model_is_small_whole_and_answers_as_the_run_rounded_to_bfloat16(trained, models):
    folder = models / demo_asked.NAME
    assert {p.name for p in models.iterdir()} == {demo_asked.NAME}
    assert {"experiment.toml", "log.json", "README.md", "mnemic.json", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }
    before, after = open_run(trained), shipped.open_shipped(demo_asked.NAME)
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    for name, weight in before.model.state_dict().items():
        kept = after.model.state_dict()[name]
        assert kept.dtype == torch.float32
        assert torch.equal(kept, weight.to(torch.bfloat16).float())
    assert (folder / "model.safetensors").stat().st_size < (trained / "model.safetensors").stat().st_size * 0.7
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert re.search(r"after being trained on .* \(`log-before-1.json`\), and then on .* \(`log-before-2.json`\)", card)
    assert (folder / "log-before-2.json").read_bytes() == (trained / "log.json").read_bytes()
    assert "| qa1 | 0k | 50.0 (25.0 to 75.0) | 8 |" in card
    assert not [p for p in folder.iterdir() if str(trained).encode() in p.read_bytes()]


def test_a_conversation_with_it_has_words_that_it_knows(models):
    tokenizer = shipped.open_shipped(demo_asked.NAME).tokenizer
    template = ChatTemplate(tokenizer)
    told = [{"role": "user", "content": "Mary went to the garden."}]
    asked = [{"role": "user", "content": "Where is Mary?"}]
    assert tokenizer.decode(template.first(told + asked)) == "Mary went to the garden . Where is Mary ?"
    assert tokenizer.decode(template.following(asked)) == "Where is Mary ?"
    assert template.closing == [tokenizer.eos_token_id]


def test_what_is_not_exported(trained, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        shipped.export(tmp_path / "none", tmp_path / "a", title="", scores=[])
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="name a new folder"):
        shipped.export(trained, tmp_path / "b", title="", scores=[])
    monkeypatch.setattr(shipped, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="and a shipped one 1,000"):
        shipped.export(trained, tmp_path / "c", title="", scores=[])
    assert {p.name for p in tmp_path.iterdir()} == {"b"}


def test_a_model_that_is_not_there(models):
    with pytest.raises(UnknownNameError, match="lm2-babilong"):
        shipped.open_shipped("lm2-babilon")


def test_the_demonstration_asks_it(models, capsys):
    console = Console(width=150)
    found = demo_asked.ask_shipped(console, lengths=("1k", "2k"))
    assert [(one["task"], one["length"]) for one in found] == [("qa1", "1k"), ("qa1", "2k")]
    assert all(600 < one["tokens"] <= 2000 and one["expected"] for one in found)
    assert all(one["asked"] == 8 and 0 <= one["right"] <= 8 for one in found)
    assert found[0]["state_bytes"] < 2 * found[1]["state_bytes"]
    assert found[1]["tokens"] > 2 * found[0]["tokens"]
    said = capsys.readouterr().out
    assert "8 streams side by side a line" in said
    assert found[1]["question"] in said
    assert demo_asked.ask_shipped(console, lengths=("1k",), seconds=0.0) == []


def test_what_would_take_too_long_at_the_pace_so_far_is_not_asked(models, monkeypatch):
    answered = demo_asked.ask_shipped(Console(width=150), lengths=("1k",))[0]

    def slow(*_):
        time.sleep(0.2)
        return answered

    monkeypatch.setattr(demo_asked, "_ask", slow)
    found = demo_asked.ask_shipped(Console(width=150), lengths=("1k", "64k"), seconds=10.0)
    assert len(found) == 1


def test_the_model_that_comes_with_the_package_answers(monkeypatch):
    monkeypatch.delenv("MNEMIC_DATA", raising=False)
    folder = shipped.MODELS / demo_asked.NAME
    assert sum(p.stat().st_size for p in folder.rglob("*")) <= shipped.MOST_BYTES
    found = demo_asked.ask_shipped(Console(width=150), lengths=("1k", "4k"))
    assert [one["asked"] for one in found] == [8, 8]
    # Of 100 to 200 such questions its card has at least 93% right.
    assert sum(one["right"] for one in found) >= 12


def test_the_demonstration_without_a_model_asks_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    assert demo_asked.ask_shipped(Console(width=150)) == []
    assert capsys.readouterr().out == ""


def test_a_model_of_another_task_cannot_be_asked(models):
    path = models / demo_asked.NAME / "experiment.toml"
    path.write_text(path.read_text(encoding="utf-8").replace('task = "babilong"', 'task = "text"'), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="not trained on BABILong"):
        demo_asked.ask_shipped(Console(width=150))
