"""The budget of a training run: what is counted is exact, and what is measured is what savers save."""

from typing import Any

import pytest
import torch

import mnemic
from mnemic.training.budget import saved_bytes, training_memory
from mnemic.training.chunked_ffn import chunk_feed_forward
from mnemic.training.compression import CompressedActivations
from tests.contract.cases import checkpointing
from tests.tiny import random_ids, tiny_host


def attached(**changes: Any) -> Any:
    return mnemic.attach(tiny_host(**changes), "rmt", segment=8, num_tokens=2).train()


def trained(kind: str) -> Any:
    if kind == "lora":
        import peft

        return mnemic.add_lora(attached(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    if kind == "memory only":
        return mnemic.freeze_host(attached())
    return attached(tie_word_embeddings=kind == "tied")


@pytest.mark.parametrize("kind", ["everything", "tied", "lora", "memory only"])
@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
def test_weights_gradients_and_states_are_counted_exactly(kind, name):
    model, ids = trained(kind), random_ids(2, 16)
    found = training_memory(model, name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = {
        "adamw": lambda: torch.optim.AdamW(parameters),
        "momentum": lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1),
    }[name]()
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    states = [v for s in optimizer.state.values() for k, v in s.items() if v is not None and k != "step"]
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert found.optimizer == sum(s.nbytes for s in states)
    assert found.activations == 0
    assert found.total == found.weights + found.gradients + found.optimizer


def test_shards_are_rounded_up_by_parameter():
    layer = torch.nn.Linear(8, 5)
    found = training_memory(layer, processes=2)
    # Of five rows the larger half is three.
    assert found.weights == 3 * 8 * 4 + 3 * 4
    assert found.optimizer == 2 * found.gradients == 2 * found.weights


def test_activations_are_what_autograd_keeps():
    x = torch.randn(16, 8, requires_grad=True)
    layer = torch.nn.Linear(8, 4)
    # sin keeps its input, and so does the layer: two tensors, the layer's weight not among them.
    assert training_memory(layer, step=lambda: layer(x.sin())).activations == 2 * x.nbytes
    with saved_bytes() as found:
        # One tensor and a view of it.
        y = x * x.view(8, 16).view(16, 8)
    assert found.total == x.nbytes
    assert y.requires_grad


def test_savers_show():
    ids = random_ids(2, 48)
    kept = {}
    for saver in ("none", "checkpointing", "feed-forward", "segments"):
        model = attached(intermediate_size=256)
        given = {"replay": True} if saver == "segments" else {}
        if saver == "checkpointing":
            checkpointing(model)
        if saver == "feed-forward":
            chunk_feed_forward(model, 4)
        step = lambda model=model, given=given: model(ids, labels=ids, use_cache=False, **given)  # noqa: E731
        kept[saver] = training_memory(model, step=step).activations
    assert kept["checkpointing"] < 0.2 * kept["none"]
    assert kept["segments"] < 0.1 * kept["none"]
    # Gate, its activation, up and their product: 2 blocks, 2 x 48 tokens and 4 memory tokens a segment and row.
    inner = 2 * 2 * (48 + 6 * 4) * 4 * 256 * 4
    assert abs(kept["none"] - kept["feed-forward"] - inner) <= 0.1 * inner


def test_compression_counts_what_it_keeps():
    x = torch.randn(64, 256, requires_grad=True)
    with CompressedActivations([]) as saved:
        x.sin()
    assert saved.before == x.nbytes
    assert saved.after == 64 * (256 + 8)


def test_refuses():
    with pytest.raises(mnemic.ConfigError, match="lion"):
        training_memory(torch.nn.Linear(2, 2), "lion")
    with pytest.raises(mnemic.ConfigError, match="processes = 0"):
        training_memory(torch.nn.Linear(2, 2), processes=0)
