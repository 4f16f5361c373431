"""Guards: what ends a run, what it says, and that the last checkpoint stays."""

import os
import signal

import pytest
import torch
from torch import nn

import mnemic
from mnemic.core.files import read_file
from mnemic.training import Collator
from mnemic.training.checkpoints import checkpoints
from mnemic.training.guards import StopOnSignal, out_of_memory, watched
from tests.tiny import tiny_host
from tests.training.killing import trainer


def break_at(run, step, how):
    """Before `step` (from 1), `how` is called with the model."""
    from transformers import TrainerCallback

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                how(run.model)

    run.add_callback(Break())
    return run


def test_a_loss_that_is_not_finite_names_step_block_and_segment(tmp_path):
    calls = []

    def nan_in_second_segment(module, args, output):
        calls.append(0)
        return output * torch.nan if len(calls) % 2 == 0 else output

    def breaks(model):
        model.transformer.h[1].mlp.c_proj.register_forward_hook(nan_in_second_segment)

    run = break_at(trainer(tmp_path, 8, False), 4, breaks)
    run.train_dataset.law = type(run.train_dataset.law)(2, (2,), 4)
    message = (
        r"loss is nan in step 4; the first block whose output is not finite is 1 \(in transformer.h.1.mlp.c_proj\), in "
        r"segment 1\. .*failed-step-4.*last checkpoint is .*checkpoint-2"
    )
    with pytest.raises(mnemic.TrainingError, match=message):
        run.train()
    header, tensors = read_file(tmp_path / "failed-step-4.safetensors", "failed step")
    assert header["step"] == 4
    assert tensors["input_ids"].shape == (4, 16)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]
    # Resumed without the fault, the run goes on.
    again = trainer(tmp_path, 8, False)
    again.train_dataset.law = run.train_dataset.law
    assert again.train(resume_from_checkpoint=True).global_step == 8


def test_the_memory_is_named_too():
    model = mnemic.attach(tiny_host(), "lm2", segment=8, num_slots=4)
    name = "query"
    module = model.memory.get_submodule(name)
    module.register_forward_hook(lambda module, args, output: output * torch.inf)
    with watched(model) as found:
        model(**Collator()([{"input_ids": [5] * 16, "labels": [5] * 16}]), use_cache=False)
    assert found.module == f"memory.{name}"
    assert f"(in memory.{name})" in found.said()
    assert not any(m._forward_hooks for m in model.get_output_embeddings().modules())


def test_a_batch_without_labels_is_named(tmp_path):
    run = trainer(tmp_path, 4, False)
    run.train_dataset = [{"input_ids": [5] * 8, "labels": [-100] * 8}] * 40
    run.model_accepts_loss_kwargs = False
    with pytest.raises(mnemic.TrainingError, match="no token of the batch carries a loss"):
        run.train()


def test_gradients_that_are_not_finite_stop_before_the_weights_change(tmp_path):
    def breaks(model):
        model.transformer.wte.weight.register_hook(lambda gradient: gradient * torch.inf)

    run = break_at(trainer(tmp_path, 8, False), 3, breaks)
    with pytest.raises(mnemic.TrainingError, match="norm of the gradients is nan in step 3"):
        run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_out_of_memory_names_the_knobs(tmp_path, error):
    class Full(nn.Module):
        def forward(self, *arguments):
            raise error

    def breaks(model):
        model.transformer.h[1].mlp = Full()

    run = break_at(trainer(tmp_path, 8, False), 4, breaks)
    message = r"Out of memory in step 4, with a batch of 4 x \d+ tokens, on cpu.*4 samples x 2.*replay.*checkpoint-2"
    with pytest.raises(mnemic.TrainingError, match=message) as caught:
        run.train()
    assert caught.value.__cause__ is error
    run.replay, run.chunked_loss = True, object()
    assert "replay" not in run._knobs()
    assert "chunked" not in run._knobs()


def test_memory_that_really_runs_out_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize("number", StopOnSignal.SIGNALS, ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_step_saves_and_stops(tmp_path, number):
    before = signal.getsignal(number)
    guard = StopOnSignal()
    run = break_at(trainer(tmp_path, 8, False), 3, lambda model: os.kill(os.getpid(), number))
    run.add_callback(guard)
    assert run.train().global_step == 3
    assert guard.stopped == signal.Signals(number).name
    assert checkpoints(tmp_path)[-1].name == "checkpoint-3"
    assert signal.getsignal(number) is before
    assert trainer(tmp_path, 8, False).train(resume_from_checkpoint=True).global_step == 8


def test_a_second_signal_does_what_it_would():
    class Ended(Exception):
        pass

    def end(number, frame):
        raise Ended

    before, guard = signal.signal(signal.SIGTERM, end), StopOnSignal()
    try:
        guard.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.stopped == "SIGTERM"
        with pytest.raises(Ended):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        guard.put_back()
        signal.signal(signal.SIGTERM, before)
