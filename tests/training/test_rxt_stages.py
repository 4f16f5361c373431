"""RxT's stages of training: what is encoded, what each loss says, and what it trains."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

import mnemic
from mnemic.benchmarks.recall import RecallTask
from mnemic.core.state import State
from mnemic.training.rxt_stages import Stage, encoding, joint_loss, memory_attention_loss, resampled, train_only
from tests.tiny import random_ids, tiny_host

SEGMENT, SLOTS = 8, 4


def attached():
    torch.manual_seed(1)
    model = mnemic.attach(tiny_host(), "rxt", segment=SEGMENT, num_slots=SLOTS)
    with torch.no_grad():
        model.memory.scale.fill_(0.5)
    return model


def test_an_encoding_is_what_a_commit_gets():
    model, ids = attached(), random_ids(2, SEGMENT)
    first = model.memory.initial_state(2)
    with torch.no_grad():
        after = model.memory.updated(first["slots"], encoding(model, ids, first))
        torch.testing.assert_close(after, model(ids).memory_state["slots"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [SEGMENT, 4, 3, 16])
def test_rows_are_means_over_equal_stretches(rows: int):
    hidden = torch.randn(2, 3, SEGMENT, 5)
    found = resampled(hidden, rows)
    assert found.shape == (2, 3, rows, 5)
    for r in range(rows):
        start, stop = r * SEGMENT // rows, -(-(r + 1) * SEGMENT // rows)
        torch.testing.assert_close(found[:, :, r], hidden[:, :, start:stop].mean(2))


def test_the_joint_loss_reads_a_noisy_encoding_and_trains_what_reads():
    model, ids = train_only(attached(), "joint"), random_ids(2, SEGMENT)
    first = model.memory.initial_state(2)
    with torch.no_grad():
        hidden = encoding(model, ids, first)
        unit = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
        noise = torch.randn(2, 2, SLOTS, 32, generator=torch.Generator().manual_seed(3)) * 0.1
        state = State({"slots": unit.unflatten(2, (SLOTS, 2)).mean(3) + noise})
        logits = model(ids, memory_state=state, use_cache=False).logits
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss = joint_loss(model, ids, noise=0.1, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert "memory.scale" in moved
    assert "model.embed_tokens.weight" in moved
    assert not any(n.startswith(("memory.update", "memory.mix")) for n in moved)


def test_the_attention_loss_follows_its_target_and_trains_what_writes():
    model, ids = train_only(attached(), "attention"), random_ids(2, 3 * SEGMENT)
    state, expected = model.memory.initial_state(2), []
    with torch.no_grad():
        for t, part in enumerate(ids.split(SEGMENT, 1)):
            hidden = encoding(model, part, state)
            share = 0.9 / (t + 1)
            target = (1 - share) * state["slots"] + share * hidden.unflatten(2, (SLOTS, 2)).mean(3)
            state = model(part, memory_state=state, use_cache=False).memory_state
            after = state["slots"]
            cosine = (after * target).sum(-1) / (after.norm(dim=-1) * target.norm(dim=-1))
            expected.append(-cosine.mean())
    loss = memory_attention_loss(model, ids)
    torch.testing.assert_close(loss.detach(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = memory_attention_loss(model, ids)
        loss.backward()
        optimizer.step()
    assert loss.detach() < torch.stack(expected).mean() - 0.2
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moved
    assert all(n.startswith(("memory.update", "memory.mix")) for n in moved)


def test_the_last_stage_trains_everything():
    model, ids = train_only(train_only(attached(), "attention"), "aware"), random_ids(2, 3 * SEGMENT)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_refuses_what_it_cannot_train():
    model, make = attached(), torch.Generator()
    with pytest.raises(mnemic.ConfigError, match="rxt"):
        train_only(tiny_host(), "joint")
    with pytest.raises(mnemic.MnemicError, match="stage of rxt"):
        train_only(model, "joined")  # pyright: ignore[reportArgumentType]
    with pytest.raises(mnemic.InputError, match="up to 8"):
        joint_loss(model, random_ids(1, 9), noise=0.1, generator=make)
    with pytest.raises(mnemic.InputError, match="whole segments"):
        memory_attention_loss(model, random_ids(1, 9))
    with pytest.raises(mnemic.ConfigError, match="first = 0"):
        memory_attention_loss(model, random_ids(1, 8), first=0)


TASK = RecallTask(segment_length=SEGMENT, values=16)


def dialogue_accuracy(model: Any, reset: bool = False) -> float:
    """Share of 1,024 values told in the first of four segments that are named in the last; reset: nothing carried."""
    rows = TASK.batch(1024, torch.Generator().manual_seed(99), segments=4)
    ids = rows.input_ids[:, -SEGMENT:] if reset else rows.input_ids
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False, logits_to_keep=2).logits
    return float((logits[:, 0].argmax(-1) == ids[:, -1]).float().mean())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_name_of_the_first_turn_is_known_in_the_fourth():
    """Measured: 1.0, and 0.06 with nothing carried (1 / 16 is chance). The stage on the memory's attention does not
    help this small a task: without it the last stage is at 0.99 after 50 steps, with it at 0.70, and both reach 1.0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TASK.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.04,
    )  # fmt: skip
    model = mnemic.attach(config, "rxt", segment=SEGMENT, num_slots=8)
    make = torch.Generator().manual_seed(1)
    stages: tuple[tuple[Stage, int], ...] = (("joint", 100), ("attention", 50), ("aware", 100))
    for stage, steps in stages:
        trained = [p for p in train_only(model, stage).train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20)
            turns = 1 if stage == "joint" else int(torch.randint(2, 5, (), generator=make))
            rows = TASK.batch(64, make, segments=turns)
            optimizer.zero_grad()
            if stage == "joint":
                loss = joint_loss(model, rows.input_ids, noise=0.3, generator=make)
            elif stage == "attention":
                loss = memory_attention_loss(model, rows.input_ids)
            else:
                loss = model(rows.input_ids, labels=rows.labels, use_cache=False, logits_to_keep=2).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
    assert dialogue_accuracy(model) > 0.9
    assert dialogue_accuracy(model, reset=True) < 0.15
