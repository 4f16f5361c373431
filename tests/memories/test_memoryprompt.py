"""MemoryPrompt against a loop over segments with a plain host, in float64; the frozen host; what crosses segments."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError, Truncation
from tests.tiny import random_ids, tiny_host

SEGMENT, PROMPT, WIDTH = 6, 3, 10


def attached(host: str = "llama", **options):
    """MemoryPrompt on a tiny host, with weights as large as everything else."""
    model = tiny_host(host).double()
    torch.manual_seed(1)
    model = mnemic.attach(model, "memoryprompt", segment=SEGMENT, **{"num_tokens": PROMPT, "width": WIDTH, **options})
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.normal_(std=0.3)
    return model


def lstm(memory, z: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The cell, gate by gate."""
    own = memory.lstm
    i, f, g, o = (z @ own.weight_ih.T + own.bias_ih + h @ own.weight_hh.T + own.bias_hh).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def by_loop(memory, host, ids: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits of all segments, the prompts that were read (B, m, e), and h after the last complete segment."""
    first, _, second = memory.mlp
    h = c = torch.zeros(len(ids), PROMPT * 32, dtype=torch.float64)
    logits, prompts = [], []
    for s, part in enumerate(ids.split(SEGMENT, dim=1)):
        embeds = host.get_input_embeddings()(part)
        if s:
            prompts.append(h.view(len(ids), PROMPT, 32))
            embeds = torch.cat([prompts[-1], embeds], dim=1)
        hidden = host.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits.append(host.get_output_embeddings()(hidden)[:, -part.shape[1] :])
        if part.shape[1] == SEGMENT:
            z = torch.relu(hidden[:, -1] @ first.weight.T + first.bias) @ second.weight.T + second.bias
            h, c = lstm(memory, z, h, c)
    return torch.cat(logits, dim=1), prompts, h


# Norms of these hosts round to float32, alike on both sides.
@pytest.mark.parametrize(
    "host, forward, backward", [("gpt2", 1e-10, 1e-8), ("opt", 1e-10, 1e-8), ("llama", 1e-5, 1e-5)]
)
def test_equals_a_loop_forward_and_backward(host, forward, backward):
    """On Llama the positions of a first segment differ by m, and so does the rounding of its float32 rotation."""
    model, plain, ids = attached(host), tiny_host(host).double(), random_ids(2, 3 * SEGMENT + 2)
    output, (logits, _, h) = model(ids, use_cache=False), by_loop(model.memory, plain, ids)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=forward)
    torch.testing.assert_close(output.memory_state["hidden"], h, rtol=0, atol=forward)
    weights = list(model.memory.parameters())
    grads = [torch.autograd.grad(x.square().mean(), weights) for x in (output.logits, logits)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=backward)


def test_the_recurrence_is_torchs_lstm():
    memory = attached().memory
    z = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    whole = torch.nn.LSTM(WIDTH, PROMPT * 32, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for name, weight in memory.lstm.named_parameters():
            getattr(whole, f"{name}_l0").copy_(weight)
        h = c = torch.zeros(2, PROMPT * 32, dtype=torch.float64)
        for step in z.unbind(1):
            h, c = memory.lstm(step, (h, c))
        torch.testing.assert_close(h, whole(z)[0][:, -1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("host, within", [("gpt2", 1e-12), ("llama", 1e-5)])
def test_a_first_segment_is_the_hosts(host, within):
    model, ids = attached(host), random_ids(2, SEGMENT)
    with torch.no_grad():
        expected = tiny_host(host).double()(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=within)
        torch.testing.assert_close(model(ids, use_cache=True).logits, expected, rtol=0, atol=within)


def test_a_frozen_host_is_trained_through_and_stays_what_it_was():
    model = mnemic.freeze_host(attached("gpt2")).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("memory.")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    memory = {n: p.detach().clone() for n, p in model.memory.named_parameters()}
    for step in range(3):
        ids = random_ids(2, 3 * SEGMENT, seed=step)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    own = dict(model.named_parameters())
    assert all(own[n].grad is None and torch.equal(own[n], p) for n, p in before.items())
    assert not any(torch.equal(p, memory[n]) for n, p in model.memory.named_parameters())


def test_left_and_right_padding_give_the_same_state():
    model, row = attached(), random_ids(1, 2 * SEGMENT + 1)
    padding = torch.full((1, 5), 7)
    rows = torch.cat([torch.cat([padding, row], dim=1), torch.cat([row, padding], dim=1)])
    mask = torch.ones_like(rows)
    mask[0, :5], mask[1, -5:] = 0, 0
    with torch.no_grad():
        state, alone = model(rows, attention_mask=mask).memory_state, model(row).memory_state
    for name, tensor in alone.items():
        torch.testing.assert_close(state[name], tensor.expand_as(state[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("truncation, reached", [(None, True), (Truncation("tail", 2), False)])
def test_the_last_loss_trains_the_mlp_through_the_first_segment(truncation, reached):
    model = attached()
    embeds = torch.randn(1, 6 * SEGMENT, 32, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=embeds, truncation=truncation).logits[:, -1].square().sum().backward()
    assert embeds.grad is not None
    assert bool(embeds.grad[:, :SEGMENT].any()) is reached
    assert bool(embeds.grad[:, 3 * SEGMENT :].any())


def test_the_norm_of_prompts_that_are_read_joins_the_training_loss():
    model, ids = attached("gpt2").train(), random_ids(2, 3 * SEGMENT)
    with torch.no_grad():
        output = model(ids, labels=ids)
        _, prompts, _ = by_loop(model.memory, tiny_host("gpt2").double(), ids)
    expected = 0.1 * sum(p.norm(dim=-1).mean() for p in prompts)
    torch.testing.assert_close(output.memory_loss, expected, rtol=0, atol=1e-9)
    with torch.no_grad():
        assert model.eval()(ids, labels=ids).memory_loss is None
        assert attached("gpt2", penalty=0.0).train()(ids, labels=ids).memory_loss is None


def test_rows_that_read_no_more_do_not_pay():
    model = attached("gpt2").train()
    ids, mask = random_ids(2, 3 * SEGMENT), torch.ones(2, 3 * SEGMENT, dtype=torch.long)
    mask[1, SEGMENT:] = 0
    with torch.no_grad():
        both = model(ids, attention_mask=mask).memory_loss
        torch.testing.assert_close(both, model(ids[:1]).memory_loss, rtol=0, atol=1e-9)


def test_the_prompt_starts_small():
    torch.manual_seed(0)
    model = mnemic.attach(tiny_host(), "memoryprompt", segment=SEGMENT)
    with torch.no_grad():
        state = model(random_ids(2, SEGMENT)).memory_state
    assert model.memory.lstm.weight_ih.shape == (4 * 5 * 32, 1024)
    assert float(state["hidden"].abs().max()) < 0.1


@pytest.mark.parametrize("options", [{"num_tokens": 0}, {"width": 0}, {"penalty": -1.0}, {"tokens": 3}])
def test_unusable_configurations_are_refused(options):
    host = tiny_host()
    with pytest.raises(ConfigError, match="memoryprompt"):
        mnemic.attach(host, "memoryprompt", segment=SEGMENT, **options)
    assert not mnemic.is_attached(host)


def test_a_segment_with_its_prompt_must_fit_the_hosts_positions():
    with pytest.raises(ConfigError, match="needs 131 positions"):
        mnemic.attach(tiny_host(), "memoryprompt", segment=128, num_tokens=3)


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_in_a_stack_it_reads_and_writes_as_alone(host):
    """Beside a closed gate, which changes nothing: the stack hands it the hidden states and hides its first prompt."""
    alone, ids = attached(host), random_ids(2, 2 * SEGMENT + 3)
    options: dict[str, Any] = {"num_tokens": PROMPT, "width": WIDTH}
    both = [mnemic.memory_config("cached-transformers:attach"), mnemic.memory_config("memoryprompt", **options)]
    stacked = mnemic.attach(tiny_host(host).double(), both, segment=SEGMENT)
    stacked.memory.members["memoryprompt"].load_state_dict(alone.memory.state_dict())
    with torch.no_grad():
        expected, cache, steps = alone(ids, use_cache=False), None, []
        output = stacked(ids, use_cache=False)
        for token in ids.split(1, dim=1):
            one = stacked(token, past_key_values=cache, use_cache=True)
            cache = one.past_key_values
            steps.append(one.logits)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected.logits, rtol=0, atol=1e-6)
    hidden = output.memory_state["memoryprompt/hidden"]
    torch.testing.assert_close(hidden, expected.memory_state["hidden"], rtol=0, atol=1e-6)
