"""Optimisers that save memory, on the groups of a memory: rates as tensors, states in 8 bits, updates in parts."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import mnemic
from mnemic.training import Collator, MemoryTrainer
from mnemic.training.optimizer import regroup
from tests.tiny import random_ids, tiny_host


def attached() -> Any:
    torch.manual_seed(0)
    return mnemic.attach(
        tiny_host(hidden_size=64, intermediate_size=128), "memory-layers-at-scale", segment=8, preset="attach",
        num_keys=8, num_heads=2, top_k=3, key_dim=16,
    ).train()  # fmt: skip


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = random_ids(2, 16, seed=seed)
    optimizer.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()


def flat(memory: Any, optimizer: torch.optim.Optimizer) -> None:
    """The groups of a memory with the settings of one group: only the order of the update differs."""
    memory.optimizer_groups = dict
    regroup(optimizer, memory)


@pytest.mark.parametrize("foreach", [False, True])
def test_an_update_in_groups_is_the_update_at_once_bit_for_bit(foreach):
    models = [attached(), attached()]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=foreach) for m in models]
    flat(models[1].memory, optimizers[1])
    assert len(optimizers[1].param_groups) == 2
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, seed)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_saved_state_goes_on_bit_for_bit():
    model, again = attached(), attached()
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, again))
    regroup(optimizer, model.memory, 5e-3)
    regroup(other, again.memory, 5e-3)
    for seed in range(3):
        step(model, optimizer, seed)
    again.load_state_dict(model.state_dict())
    # As from a file: what is loaded is not copied.
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 5):
        step(model, optimizer, seed)
        step(again, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_rates_that_are_tensors_stay_tensors_each_groups_own():
    model = attached()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), foreach=False)
    regroup(optimizer, model.memory, 5e-3)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(rate, torch.Tensor) for rate in rates)
    assert len({rate.data_ptr() for rate in rates}) == len(rates)
    constant = next(group for group in optimizer.param_groups if "constant_lr" in group)
    before = constant["lr"]
    for rate in rates:
        rate.fill_(0.5)
    step(model, optimizer, 0)
    # Filled, not replaced: a compiled step holds on to the tensor.
    assert constant["lr"] is before
    assert float(before) == pytest.approx(constant["constant_lr"])
    assert sum(float(rate) == 0.5 for rate in rates) == len(rates) - 1


@pytest.mark.slow
@pytest.mark.parametrize("optim, library", [("adamw_torch_8bit", "torchao"), ("adamw_bnb_8bit", "bitsandbytes")])
@pytest.mark.filterwarnings("ignore")
def test_states_in_8_bits_train_as_well(tmp_path, optim, library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    losses = {}
    for name in ("adamw_torch", optim):
        rows = [{"input_ids": i, "labels": i} for i in (random_ids(16, seed=s).tolist() for s in range(4))]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], optim=name,
            save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True, logging_steps=1,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = MemoryTrainer(
            attached(), arguments, train_dataset=rows, data_collator=Collator(), memory_learning_rate=5e-3
        )
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert [g["constant_lr"] for g in trainer.optimizer.param_groups if "constant_lr" in g] == [1e-3]
    torch.testing.assert_close(torch.tensor(losses[optim]), torch.tensor(losses["adamw_torch"]), atol=0.1, rtol=0)
