"""R3Mem is rmt at its start, and a loop over segments with a plain host at any; its map is undone exactly."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError, Truncation
from mnemic.hosts.anatomy import host_spec
from tests.tiny import random_ids, tiny_host

SEGMENT, MEMORY = 6, 3
OPTIONS: dict[str, Any] = {"num_tokens": MEMORY, "num_blocks": 2, "bottleneck": 5}


def attached(host: str = "llama", noise: float = 0.3, **options: Any) -> Any:
    """R3Mem on a tiny host in float64, with weights as large as everything else."""
    model = tiny_host(host).double()
    torch.manual_seed(1)
    model = mnemic.attach(model, "r3mem", segment=SEGMENT, **{**OPTIONS, **options})
    if noise:
        with torch.no_grad():
            for parameter in model.memory.parameters():
                parameter.normal_(std=noise)
    return model


def phi(memory, written: Tensor) -> Tensor:
    """The coupling, block by block, with the halves changing places."""
    own = memory.coupling
    a, b = written.chunk(2, dim=-1)
    for r in range(len(own.down)):
        hidden = torch.nn.functional.gelu(b @ own.down[r, 0] + own.down_bias[r, 0])
        a = a + hidden @ own.up[r, 0] + own.up_bias[r, 0]
        hidden = torch.nn.functional.gelu(a @ own.down[r, 1] + own.down_bias[r, 1])
        a, b = b + hidden @ own.up[r, 1] + own.up_bias[r, 1], a
    return torch.cat([a, b] if len(own.down) % 2 == 0 else [b, a], dim=-1)


def by_loop(memory, host, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of all segments and the memory after the last complete one."""
    kept, logits = memory.first_tokens.expand(len(ids), -1, -1), []
    for part in ids.split(SEGMENT, dim=1):
        tokens = part.shape[1]
        written = MEMORY if tokens == SEGMENT else 0
        behind = (kept + memory.write_tokens)[:, :written]
        embeds = torch.cat([kept, host.get_input_embeddings()(part), behind], dim=1)
        seen = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril()
        seen[:MEMORY, :MEMORY] = True
        seen[MEMORY + tokens :, MEMORY + tokens :] = True
        hidden = host.base_model(
            inputs_embeds=embeds,
            attention_mask=seen[None, None].expand(len(ids), 1, -1, -1),
            position_ids=torch.arange(embeds.shape[1]).expand(len(ids), -1),
            use_cache=False,
        ).last_hidden_state
        logits.append(host.get_output_embeddings()(hidden)[:, MEMORY : MEMORY + tokens])
        kept = phi(memory, hidden[:, -MEMORY:]) if written else kept
    return torch.cat(logits, dim=1), kept


# Norms of Llama round to float32, alike on both sides.
@pytest.mark.parametrize("host", ["gpt2", "llama"])
@pytest.mark.parametrize("blocks", [0, 2, 3])
def test_equals_a_loop_forward_and_backward(host, blocks):
    model, plain, ids = attached(host, num_blocks=blocks), tiny_host(host).double(), random_ids(2, 3 * SEGMENT + 2)
    output, (logits, memory) = model(ids, use_cache=False), by_loop(model.memory, plain, ids)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.memory_state["memory"], memory, rtol=0, atol=1e-10)
    weights = [p for p in model.memory.parameters() if p.numel()]
    grads = [torch.autograd.grad(x.square().mean(), weights) for x in (output.logits, logits)]
    for mine, theirs in zip(*grads, strict=True):
        assert bool(mine.any())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("host", ["gpt2", "llama"])
def test_it_starts_as_rmt(host):
    ids, model = random_ids(2, 3 * SEGMENT + 2), attached(host, noise=0, num_blocks=3)
    rmt = mnemic.attach(tiny_host(host).double(), "rmt", segment=SEGMENT, num_tokens=MEMORY)
    with torch.no_grad():
        rmt.memory.first_tokens.copy_(model.memory.first_tokens)
        mine, theirs = model(ids, use_cache=False), rmt(ids, use_cache=False)
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.memory_state["memory"], theirs.memory_state["memory"])


def test_the_prompt_is_what_the_host_wrote():
    model, ids = attached(), random_ids(2, SEGMENT)
    with torch.no_grad():
        memory = model(ids).memory_state["memory"]
        plain = attached(num_blocks=0)
        named = dict(model.memory.named_parameters())
        for name, parameter in plain.memory.named_parameters():
            if parameter.numel():
                parameter.copy_(named[name])
        written = plain(ids).memory_state["memory"]
        assert float((memory - written).abs().max()) > 0.1
        torch.testing.assert_close(model.memory.prompt(memory), written, rtol=0, atol=1e-12)


def test_in_half_precision_the_memory_stays_float32():
    model = mnemic.attach(tiny_host().bfloat16(), "r3mem", segment=SEGMENT, **OPTIONS)
    with torch.no_grad():
        memory = model(random_ids(2, SEGMENT)).memory_state["memory"]
    assert memory.dtype == model.memory.initial_state(1)["memory"].dtype == torch.float32


@pytest.mark.parametrize("truncation, reached", [(None, True), (Truncation("tail", 1), False)])
def test_gradients_pass_through_the_map_to_the_first_segment(truncation, reached):
    model = attached()
    embeds = torch.randn(1, 4 * SEGMENT, 32, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=embeds, truncation=truncation).logits[:, -1].square().sum().backward()
    assert embeds.grad is not None
    assert bool(embeds.grad[:, :SEGMENT].any()) is reached
    assert bool(model.memory.first_tokens.grad is not None and model.memory.first_tokens.grad.any()) is reached


@pytest.mark.parametrize("place", [0, SEGMENT - 1, SEGMENT + 2])
def test_a_token_changes_nothing_before_it_and_all_later_segments(place):
    model, ids = attached(), random_ids(1, 3 * SEGMENT)
    other = ids.clone()
    other[0, place] = (ids[0, place] + 1) % 58 + 3
    with torch.no_grad():
        difference = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    assert torch.equal(difference[:place], torch.zeros(place, dtype=torch.float64))
    assert float(difference[(place // SEGMENT + 1) * SEGMENT :].min()) > 1e-6


def test_lora_trains_with_the_memory_and_a_frozen_host():
    peft = pytest.importorskip("peft")
    model = attached(noise=0).float()
    model = mnemic.add_lora(mnemic.freeze_host(model), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n or ".memory." in n for n in trained)
    ids = random_ids(2, 3 * SEGMENT)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values())
    assert any(bool(g.any()) for n, g in grads.items() if "lora_B" in n)


@pytest.mark.parametrize("options", [{"num_tokens": 0}, {"num_blocks": -1}, {"bottleneck": 0}, {"reversible": "full"}])
def test_unusable_configurations_are_refused(options):
    host = tiny_host()
    with pytest.raises(ConfigError, match="r3mem"):
        mnemic.attach(host, "r3mem", segment=SEGMENT, **options)
    assert not mnemic.is_attached(host)


def test_an_odd_width_is_refused():
    from dataclasses import replace

    config = mnemic.memory_config("r3mem")
    with pytest.raises(mnemic.HostError, match="even width"):
        mnemic.core.memory_class("r3mem")(config, replace(host_spec(tiny_host()), hidden_size=33))


def test_diagnostics_tell_how_far_the_map_moves():
    ids = random_ids(2, 2 * SEGMENT)
    with torch.no_grad():
        still = attached(noise=0)(ids, memory_diagnostics=True).memory_diagnostics
        moving = attached()(ids, memory_diagnostics=True).memory_diagnostics
    assert float(still["coupling_shift"]) == 0
    assert float(moving["coupling_shift"]) > 0.01
    assert float(moving["memory_norm"]) > 0
