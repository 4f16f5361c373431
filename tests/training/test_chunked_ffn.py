"""Feed-forward in chunks: the same loss and gradients, less kept, adapters inside, and what is refused."""

from typing import Any

import pytest
import torch

import mnemic
from mnemic.training.budget import saved_bytes
from mnemic.training.chunked_ffn import ChunkedFFN, chunk_feed_forward
from tests.tiny import random_ids, tiny_host


def attached(host: str = "llama", memory: str = "rmt", **changes: Any) -> Any:
    options = {"rmt": {"num_tokens": 2}, "lm2": {"preset": "default", "num_slots": 4}}.get(memory, {})
    return mnemic.attach(tiny_host(host, **changes), memory, segment=12, **options).double().train()


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = random_ids(2, 24)
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [4, 5, 100])
@pytest.mark.parametrize("host, memory", [("llama", "rmt"), ("gpt2", "lm2")])
def test_loss_and_gradients_are_the_same(host, memory, chunk):
    model = attached(host, memory)
    loss, expected = gradients(model)
    chunk_feed_forward(model, chunk)
    same, found = gradients(model)
    torch.testing.assert_close(same, loss, atol=1e-12, rtol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=0)


def test_only_the_input_is_kept():
    mlp = tiny_host(intermediate_size=256).model.layers[0].mlp
    x = torch.randn(2, 16, 32, requires_grad=True)
    kept = {}
    for name, run in (("whole", mlp), ("chunks", ChunkedFFN(mlp, 4))):
        with saved_bytes(tuple(mlp.parameters())) as found:
            kept[name] = run(x), found.total
    assert kept["chunks"][1] == x.nbytes
    # Gate, its activation, up, and their product, besides the input.
    assert kept["whole"][1] >= 4 * 2 * 16 * 256 * 4


def test_adapters_inside_take_part():
    import peft

    model = attached()
    config = peft.LoraConfig(target_modules=["up_proj", "down_proj"], r=2, init_lora_weights=False)
    lora = mnemic.add_lora(model, config).double().train()
    loss, expected = gradients(lora)
    chunk_feed_forward(lora, 5)
    same, found = gradients(lora)
    torch.testing.assert_close(same, loss, atol=1e-12, rtol=0)
    assert any("lora_A" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=0)


def test_a_host_without_memory():
    host, ids = tiny_host(), random_ids(1, 9)
    before = host(ids).logits
    chunk_feed_forward(host, 2)
    torch.testing.assert_close(host(ids).logits, before, atol=1e-5, rtol=0)


def test_refused():
    with pytest.raises(mnemic.ConfigError, match="chunk = 0"):
        chunk_feed_forward(attached(), 0)
    with pytest.raises(mnemic.UnsupportedError, match="experts"):
        chunk_feed_forward(tiny_host("qwen3_moe"), 4)
    with pytest.raises(mnemic.HostError, match="feed-forward"):
        chunk_feed_forward(tiny_host("opt"), 4)
    twice = attached()
    chunk_feed_forward(twice, 4)
    with pytest.raises(mnemic.UnsupportedError, match="other code"):
        chunk_feed_forward(twice, 4)
    table = mnemic.attach(tiny_host(), "memory-layers-at-scale", segment=8, preset="attach", num_keys=6, num_heads=2,
                          top_k=3, key_dim=8)  # fmt: skip
    with pytest.raises(mnemic.UnsupportedError, match="a memory in their place"):
        chunk_feed_forward(table, 4)
