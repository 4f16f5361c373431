"""Checkpoints: whole or not at all, and runs that go on from them bit by bit."""

import json
import shutil
import subprocess
import sys
from itertools import islice

import pytest
import torch
from transformers import TrainingArguments

import mnemic
from mnemic.benchmarks.examples import RecallExamples
from mnemic.benchmarks.recall import RecallTask
from mnemic.training import Collator, MemoryTrainer, SegmentLaw, TextExamples
from mnemic.training.checkpoints import PROGRESS, checkpoints, read_progress
from tests.tiny import random_ids, tiny_host
from tests.training.killing import trainer

pytestmark = pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")
LAW = SegmentLaw(1, (2, 3), batch=2, stage_batches=3)


def documents(count=6):
    return [random_ids(30 + i, seed=i).tolist() for i in range(count)]


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def losses(run):
    return [{k: v for k, v in e.items() if "train_" not in k} for e in run.state.log_history if "loss" in e]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of eight steps, and what it leaves: checkpoints 6 and 8."""
    folder = tmp_path_factory.mktemp("run")
    run = trainer(folder, 8, False)
    run.train()
    return folder, weights(run), losses(run)


# Whole or not at all


def test_killed_runs_end_as_if_nothing_had_been(tmp_path):
    report = killed(tmp_path, "3", "--steps", "14", "--stateful")
    assert len(report["resumed from"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", [(), ("--stateful",)], ids=["samples", "stateful"])
def test_twenty_kills(tmp_path, how):
    report = killed(tmp_path, "20", *how)
    assert report["while writing"] > 0
    assert len(set(report["resumed from"])) > 5


def killed(folder, *arguments):
    command = [sys.executable, "-m", "tests.training.killing", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-500:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["weights equal"]
    assert report["log equal"]
    assert report["left behind"] == []
    assert len(report["kept"]) == 2
    return report


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = trainer(tmp_path, 4, False)

    def full(path):
        raise OSError("no space left on device")

    def first_is_enough(*arguments):
        if run.state.global_step > 2:
            full(arguments)
        return save(*arguments)

    save = run._save_rng_state
    monkeypatch.setattr(run, "_save_rng_state", first_is_enough)
    with pytest.raises(OSError, match="no space left"):
        run.train()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / ".saving" / "checkpoint-4").is_dir()
    again = trainer(tmp_path, 4, False)
    again.train(resume_from_checkpoint=True)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_checkpoint_is_loaded_without_pickle(finished, monkeypatch):
    folder, *_ = finished
    load = torch.load

    def safely(*arguments, **options):
        assert options["weights_only"] is True
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", safely)
    run = trainer(folder, 8, False)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert not (folder / "checkpoint-8" / "training_args.bin").exists()
    assert mnemic.load(folder / "checkpoint-8").memory.name == "lm2"


def test_the_last_and_the_best_are_kept(tmp_path):
    run = trainer(tmp_path, 8, False, load_best_model_at_end=True, metric_for_best_model="x", greater_is_better=True)
    steps = iter((1.0, 3.0, 2.0, 0.0))

    def evaluate(*arguments, **options):
        found = {"eval_x": next(steps, 0.0)}
        run.state.log_history.append({**found, "step": run.state.global_step})
        return found

    run.evaluate = evaluate
    run.args.eval_strategy, run.args.eval_steps = run.args.save_strategy, 2
    seen = []
    run._load_best_model = lambda: seen.append(run.state.best_model_checkpoint)
    run.train()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert seen == [str(tmp_path / "checkpoint-4")]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = trainer(tmp_path, 4, False)
    run._staging, run._tr_loss = False, torch.tensor(0.0)
    with torch.no_grad():
        next(run.model.memory.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(mnemic.TrainingError, match=r"memory\..* is not finite"):
        run._save_checkpoint(run.model, None)
    assert list(tmp_path.iterdir()) == []


# Going on


@pytest.mark.parametrize("at", [6, 8])
def test_resuming_in_the_middle_gives_the_same_run(finished, tmp_path, at):
    folder, expected, log = finished
    shutil.copytree(folder / f"checkpoint-{at}", tmp_path / f"checkpoint-{at}")
    run = trainer(tmp_path, 8, False)
    run.train(resume_from_checkpoint=True)
    assert equal(weights(run), expected)
    assert losses(run) == log


def test_lists_are_resumed_too(tmp_path):
    def listed(folder, steps):
        run = trainer(folder, steps, False)
        run.train_dataset = [e for e, _ in zip(run.train_dataset, range(40), strict=False)]
        return run

    whole = listed(tmp_path / "a", 8)
    whole.train()
    part = listed(tmp_path / "b", 8)
    part.add_callback(stop_after(5))
    part.train()
    again = listed(tmp_path / "b", 8)
    again.train(resume_from_checkpoint=True)
    assert equal(weights(again), weights(whole))


def stop_after(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return Stop()


def test_lora_checkpoints_hold_the_memory(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig

    def adapted():
        torch.manual_seed(0)
        model = mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=2)
        model = mnemic.add_lora(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], save_steps=2,
            disable_tqdm=True, remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        data = TextExamples(documents(), 8, LAW)
        return MemoryTrainer(model, arguments, train_dataset=data, data_collator=Collator())

    whole = adapted()
    whole.train()
    again = adapted()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(weights(again), weights(whole))


# Positions


DATA = {
    "text": lambda seed=0: TextExamples(documents(), 8, LAW, seed),
    "recall": lambda seed=0: RecallExamples(RecallTask(segment_length=8), LAW, seed),
}


@pytest.mark.parametrize("name", DATA)
def test_a_position_gives_the_samples_that_come_after(name):
    whole, later = DATA[name](), DATA[name]()
    expected = list(islice(whole, 20))
    assert whole.state_dict()["samples"] == 20
    later.load_state_dict({**whole.state_dict(), "samples": 7})
    assert list(islice(later, 13)) == expected[7:]
    with pytest.raises(mnemic.DataError, match="other data"):
        DATA[name](seed=1).load_state_dict(whole.state_dict())


def test_positions_are_found_without_making_samples(monkeypatch):
    data = DATA["text"]()
    made = []
    monkeypatch.setattr(data, "_example", made.append)
    data.load_state_dict({**data.state_dict(), "samples": 1000})
    next(iter(data))
    assert len(made) == 1


# What may change


def test_more_steps_and_another_log_are_no_other_run(finished, tmp_path):
    folder, *_ = finished
    run = trainer(tmp_path, 10, False, logging_steps=1, save_steps=100)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert run.state.global_step == 10


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.1}, r"learning_rate was 0\.003 and is 0\.1"),
        ({"weight_decay": 0.5, "max_grad_norm": 9.0}, r"norm was 1\.0 and is 9\.0; weight_decay was 0\.0 and is"),
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"per_device_train_batch_size": 2}, "samples of a step was 8 and is 4"),
    ],
)  # fmt: skip
def test_other_settings_are_refused(finished, tmp_path, changes, message):
    folder, *_ = finished
    run = trainer(tmp_path, 8, False, **changes)
    run._train_batch_size = run.args.train_batch_size
    with pytest.raises(mnemic.ConfigError, match=message):
        run.train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_another_model_tokenizer_or_data_is_refused(finished, tmp_path):
    folder, *_ = finished

    def refused(message, error=mnemic.ConfigError, **changes):
        run = trainer(tmp_path, 8, False)
        for name, value in changes.items():
            setattr(run, name, value)
        with pytest.raises(error, match=message):
            run.train(resume_from_checkpoint=str(folder / "checkpoint-6"))

    model = mnemic.attach(tiny_host("gpt2"), "lm2", segment=8, num_slots=2)
    refused(r"memory\.num_slots was 4 and is 2", model=model)
    refused("segment was 8 and is 16", model=mnemic.attach(tiny_host("gpt2"), "lm2", segment=16, num_slots=4))
    refused("tokenizer was None and is 'abc'", identity={"tokenizer": "abc"})
    refused("other data", mnemic.DataError, train_dataset=DATA["text"]())
    refused(r"data\.length was None and is 5", train_dataset=documents(5))
    refused(r"truncation was None and is .*tail", truncation=mnemic.Truncation("tail", 1))


def test_states_of_rows_need_as_many_processes(finished, tmp_path):
    folder, *_ = finished
    changed = tmp_path / "checkpoint-6"
    shutil.copytree(folder / "checkpoint-6", changed)
    edit(changed, streams=True, world_size=2)
    with pytest.raises(mnemic.ConfigError, match="rows of 2 processes; this run has 1"):
        trainer(tmp_path, 8, False).train(resume_from_checkpoint=True)


def edit(checkpoint, **changes):
    path = checkpoint / PROGRESS
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_checkpoints_say_so(finished, tmp_path):
    folder, *_ = finished
    with pytest.raises(mnemic.InputError, match="no complete checkpoint"):
        trainer(tmp_path, 8, False).train(resume_from_checkpoint=True)
    changed = tmp_path / "checkpoint-6"
    shutil.copytree(folder / "checkpoint-6", changed)
    (changed / "optimizer.pt").write_bytes(b"short")
    with pytest.raises(mnemic.FileFormatError, match=r"optimizer\.pt has 5 bytes"):
        read_progress(changed)
    (changed / "optimizer.pt").unlink()
    with pytest.raises(mnemic.FileFormatError, match=r"optimizer\.pt is missing"):
        read_progress(changed)
    edit(changed, version=9)
    with pytest.raises(mnemic.FileFormatError, match="version 9"):
        read_progress(changed)
    (changed / PROGRESS).write_text("{")
    with pytest.raises(mnemic.FileFormatError, match="damaged"):
        read_progress(changed)
    (changed / PROGRESS).unlink()
    with pytest.raises(mnemic.FileFormatError, match="has no progress"):
        read_progress(changed)
