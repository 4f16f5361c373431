"""Optimiser groups: every parameter in one group, with the settings that the memory names for it."""

from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import mnemic
from mnemic.training import Collator, MemoryTrainer
from mnemic.training.optimizer import regroup
from tests.tiny import random_ids, tiny_host

SIZES: dict[str, Any] = {"num_keys": 6, "num_heads": 2, "top_k": 3, "key_dim": 8}
DECAY, RATE = 0.1, 1e-2


def attached(memory: str = "memory-layers-at-scale", **options: Any) -> Any:
    return mnemic.attach(tiny_host(), memory, segment=8, preset="attach", **SIZES, **options)


def trainer(folder: Any, model: Any, steps: int = 3, **options: Any) -> MemoryTrainer:
    rows = [{"input_ids": random_ids(16, seed=i).tolist(), "labels": random_ids(16, seed=i).tolist()} for i in range(4)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=RATE, weight_decay=DECAY,
        warmup_steps=2, report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
        dataloader_pin_memory=False, logging_steps=1, **options.pop("arguments", {}),
    )  # fmt: skip
    return MemoryTrainer(model, arguments, train_dataset=rows, data_collator=Collator(), **options)


def settings(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Name -> (learning rate, decay); fails where a parameter is in two groups."""
    names, found = {id(p): n for n, p in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    return found


def test_groups_are_exact_and_complete(tmp_path):
    model = attached(qk_norm=True, memory_layers=(0, 1))
    optimizer = trainer(tmp_path, model, memory_learning_rate=0.5).create_optimizer()
    found = settings(model, optimizer)
    assert set(found) == {n for n, _ in model.named_parameters()}
    assert found["memory.values"] == (1e-3, 0.0)
    for i in range(2):
        assert found[f"memory.readers.{i}.subkeys"] == (0.5, 0.0)
        assert found[f"memory.readers.{i}.query_norm.weight"] == (0.5, 0.0)
        assert found[f"memory.readers.{i}.query.weight"] == (0.5, DECAY)
    assert found["model.layers.0.mlp.up_proj.weight"] == (RATE, DECAY)
    assert found["model.layers.0.input_layernorm.weight"] == (RATE, 0.0)
    assert all(group["params"] for group in optimizer.param_groups)
    # The host's two, and of the memory's parameters: table, half-keys, other matrices, norms.
    assert len(optimizer.param_groups) == 6


def test_a_stack_names_the_parameters_of_its_memories(tmp_path):
    host = tiny_host()
    config = mnemic.memory_config("pkm", "attach", **SIZES, values_lr=0.25)
    model = mnemic.attach(host, [config, mnemic.memory_config("lm2", num_slots=4)], segment=8)
    found = settings(model, trainer(tmp_path, model).create_optimizer())
    assert set(found) == {n for n, _ in model.named_parameters()}
    assert found["memory.parts.pkm.values.0"] == (0.25, 0.0)
    assert found["memory.parts.lm2.query.weight.0"] == (RATE, DECAY)


def test_only_what_is_trained_is_grouped(tmp_path):
    model = mnemic.freeze_host(attached())
    model.memory.values.requires_grad_(False)
    found = settings(model, trainer(tmp_path, model).create_optimizer())
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "memory.values" not in found


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_table_has_a_constant_rate_under_any_schedule(tmp_path, schedule):
    model = attached()
    run = trainer(tmp_path, model, arguments={"lr_scheduler_type": schedule})
    rates: list[dict[str, tuple[float, float]]] = []
    optimizer: Any = run.create_optimizer()
    step = optimizer.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        before = model.memory.values.detach().clone()
        result = step(*args, **kwargs)
        rates.append(settings(model, optimizer))
        # Adam moves the rows read by about its rate at each step, the first included.
        moved = float((model.memory.values.detach() - before).abs().max())
        assert 0 < moved <= 1.1e-3
        return result

    optimizer.step = recorded
    # A table whose gradient is zero would not move.
    torch.nn.init.normal_(model.memory.readers[0].out.weight)
    run.train()
    assert len(rates) == 3
    assert all(one["memory.values"][0] == 1e-3 for one in rates)
    # What is not the table warms up.
    assert [one["memory.readers.0.query.weight"][0] for one in rates] == [0, RATE / 2, RATE]


def test_a_schedule_of_another_kind_leaves_the_table_alone():
    memory = attached().memory
    optimizer = torch.optim.AdamW(memory.parameters(), lr=RATE)
    regroup(optimizer, memory)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for _ in range(3):
        optimizer.step()
        scheduler.step(1.0)
    optimizer.step()
    found = settings(memory, optimizer)
    assert found["values"][0] == 1e-3
    assert found["readers.0.out.weight"][0] < RATE / 5


def test_a_scale_follows_the_schedule():
    memory = attached().memory
    memory.optimizer_groups = lambda: {"readers.0.query.*": {"lr_scale": 0.5}, "readers.*": {"weight_decay": 0.3}}
    optimizer = torch.optim.AdamW(memory.parameters(), lr=RATE, weight_decay=DECAY)
    regroup(optimizer, memory, 0.2)
    found = settings(memory, optimizer)
    # The first pattern that fits counts.
    assert found["readers.0.query.weight"] == (0.1, DECAY)
    assert found["readers.0.out.weight"] == (0.2, 0.3)
    assert found["values"] == (0.2, DECAY)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert settings(memory, optimizer)["readers.0.query.weight"][0] == 0.05
    assert len(scheduler.get_last_lr()) == 3


@pytest.mark.parametrize(
    "groups, said",
    [({"value": {"lr": 1.0}}, "readers.0.subkeys"), ({"values": {"rate": 1.0}}, "rate"),
     ({"values": {"lr": 1.0, "lr_scale": 2.0}}, "either")],
)  # fmt: skip
def test_what_a_memory_names_wrongly_is_refused(groups, said):
    memory = attached().memory
    memory.optimizer_groups = lambda: groups
    with pytest.raises(mnemic.ConfigError, match=said):
        regroup(torch.optim.SGD(memory.parameters(), lr=1.0), memory)


def test_an_optimiser_that_is_given_is_left_alone(tmp_path):
    model = attached()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    run = trainer(tmp_path, model, optimizers=(optimizer, None))
    run.create_optimizer()
    assert len(optimizer.param_groups) == 1
