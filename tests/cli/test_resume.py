"""mnemic train: killed, stopped and resumed runs, and what the folder tells."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from mnemic.benchmarks import runs
from mnemic.training.checkpoints import checkpoints
from tests.cli.conftest import RECALL, TINY, invoke, succeed

ARGUMENTS = ("train", *RECALL, *TINY, "--set", "log_every=2", "--set", "save_every=2", "--set", "report_to=[]")


def model_of(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "whole"
    succeed(*ARGUMENTS, "--steps", 6, "--output", folder)
    return folder


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was told to stop in its third step."""
    step = runs.MeasuredTrainer.training_step

    def told(self, *arguments, **options):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    with monkeypatch.context() as changed:
        changed.setattr(runs.MeasuredTrainer, "training_step", told)
        result = succeed(*ARGUMENTS, "--steps", 6, "--output", tmp_path / "run")
    assert "Stopped by SIGTERM after step 3, and saved. Go on: the same command with --resume." in result.stdout
    return tmp_path / "run"


def test_a_stopped_run_goes_on_to_the_same_weights(stopped, whole):
    assert [p.name for p in checkpoints(stopped)] == ["checkpoint-2", "checkpoint-3"]
    assert not (stopped / "log.json").exists()
    refused = invoke(*ARGUMENTS, "--steps", 6, "--output", stopped)
    assert refused.exit_code == 2
    assert "unfinished run, saved at checkpoint-3. Go on with --resume" in refused.stderr
    succeed(*ARGUMENTS, "--steps", 6, "--output", stopped, "--resume")
    assert equal(model_of(stopped), model_of(whole))
    losses = [
        [(e["step"], e["loss"]) for e in json.loads((f / "log.json").read_text())["history"] if "loss" in e]
        for f in (stopped, whole)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    again = succeed(*ARGUMENTS, "--steps", 6, "--output", stopped, "--resume")
    assert "finished" in again.stdout


def test_other_settings_are_refused(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for changes, message in (
        (("--steps", 6, "--learning-rate", 0.5), "learning_rate was 0.001 and is 0.5"),
        # The stages of its curriculum are thirds, halves ... of all steps.
        (("--steps", 8), "other data"),
    ):
        refused = invoke(*ARGUMENTS, *changes, "--output", folder, "--resume")
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_a_finished_run_takes_more_steps(tmp_path):
    arguments = [a.replace("2,3", "3") for a in ARGUMENTS]
    succeed(*arguments, "--steps", 2, "--output", tmp_path / "run")
    succeed(*arguments, "--steps", 4, "--output", tmp_path / "run", "--resume")
    history = json.loads((tmp_path / "run" / "log.json").read_text())["history"]
    assert [e["step"] for e in history if "loss" in e] == [2, 4]


def test_resuming_what_has_no_checkpoint_says_so(tmp_path):
    result = succeed(*ARGUMENTS, "--steps", 1, "--output", tmp_path / "run", "--resume")
    assert "no checkpoint; the run starts from its beginning" in result.stderr


def test_what_the_folder_tells(tmp_path):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    result = succeed("train", *RECALL, *TINY, "--steps", 3, "--set", "log_every=1", "--output", folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["operations_per_token"] > 0
    assert 0 < summary["utilisation"] < 1
    assert set(summary["memory"]) == {"0", "1"}
    assert "bank_norm" in result.stderr
    assert "utilisation" in result.stderr
    assert list((folder / "runs").rglob("events.out.tfevents.*"))
    assert (folder / "curves.png").is_file()


def test_memory_settings_reach_the_trainer(tmp_path, monkeypatch):
    seen = []
    train = runs.MeasuredTrainer.train

    def look(self, *arguments, **options):
        memory = {id(p) for p in self.model.memory.parameters()}
        groups = self.create_optimizer().param_groups
        seen.append(
            {(id(p) in memory, group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        )
        seen.append({p.requires_grad for n, p in self.model.named_parameters() if not n.startswith("memory.")})
        seen.append(self.args.gradient_accumulation_steps)
        return train(self, *arguments, **options)

    monkeypatch.setattr(runs.MeasuredTrainer, "train", look)
    given = {
        "memory_learning_rate": 0.01, "memory_weight_decay": 0.2, "gradient_accumulation": 2, "replay": "true",
        "freeze": "host", "optim": "adamw_torch",
    }  # fmt: skip
    changes = [argument for key, value in given.items() for argument in ("--set", f"{key}={value}")]
    succeed(*ARGUMENTS, *changes, "--steps", 2, "--output", tmp_path / "run")
    assert (True, 0.01, 0.2) in seen[0]
    assert {ours for ours, *_ in seen[0]} == {True}
    assert seen[1:] == [{False}, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--set", "freeze=everything"), "expected 'none' or 'host'"),
        (("--set", "lora=4"), "lora adapts a pretrained host"),
        (("--set", "optim=adamm"), "transformers refuses"),
        (("--set", "keep=0"), "at least 1"),
    ],
)
def test_settings_that_cannot_be(arguments, message, tmp_path):
    result = invoke("train", *RECALL, *TINY, *arguments, "--output", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_lora_on_a_pretrained_host(recall_run, tmp_path):
    pytest.importorskip("peft")
    from transformers import AutoTokenizer

    import mnemic
    from tests.tiny import tiny_host

    host = tmp_path / "host"
    tiny_host().save_pretrained(host)
    AutoTokenizer.from_pretrained(recall_run).save_pretrained(host)
    (tmp_path / "book.txt").write_text("Mary garden the rain fell and John office " * 20)
    arguments = (
        "train", "--task", "text", "--data", tmp_path / "book.txt", "--memory", "rmt", "--set", "memory.num_tokens=2",
        "--set", f'host="{host}"', "--set", "lora=2", "--segment", 8, "--segments", "2", "--steps", 2,
        "--batch-size", 2, "--threads", 1, "--set", "save_every=1", "--set", "report_to=[]",
    )  # fmt: skip
    folder = tmp_path / "run"
    succeed(*arguments, "--output", folder)
    names = [name for name, _ in mnemic.load(folder).named_parameters() if "lora_" in name]
    assert names
    assert not any("memory" in name for name in names)
