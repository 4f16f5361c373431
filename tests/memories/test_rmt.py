"""RMT against a naive concatenation with an explicit mask; causality, flow of the state, truncation."""

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError, Truncation
from tests.tiny import random_ids, tiny_host

SEGMENT, MEMORY = 6, 3


def attached(host: str = "llama", **options):
    """RMT on a tiny host, with first tokens as large as everything else."""
    model = tiny_host(host)
    torch.manual_seed(1)
    model = mnemic.attach(model, "rmt", segment=SEGMENT, **{"num_tokens": MEMORY, **options})
    with torch.no_grad():
        model.memory.first_tokens.normal_(std=0.5)
    return model


def who_sees_whom(tokens: int, written: int, causal: bool) -> Tensor:
    """(Q, Q) bool over [read ; tokens ; write], row by row from the card's sentence."""
    read, size = MEMORY, MEMORY + tokens + written
    seen = torch.zeros(size, size, dtype=torch.bool)
    for q in range(size):
        for k in range(size):
            if causal:
                seen[q, k] = k <= q
            elif q < read:
                seen[q, k] = k < read
            elif q < read + tokens:
                seen[q, k] = k < read or k <= q
            else:
                seen[q, k] = True
    return seen


def naive(host, ids: Tensor, first: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Logits of all segments and the memory after the last complete one, by concatenation and a plain forward."""
    memory, logits = first.expand(len(ids), -1, -1), []
    for part in ids.split(SEGMENT, dim=1):
        tokens = part.shape[1]
        written = MEMORY if tokens == SEGMENT else 0
        embeds = torch.cat([memory, host.get_input_embeddings()(part), memory[:, :written]], dim=1)
        seen = who_sees_whom(tokens, written, causal)
        given = {
            "inputs_embeds": embeds,
            "attention_mask": seen[None, None].expand(len(ids), 1, -1, -1),
            "position_ids": torch.arange(embeds.shape[1]).expand(len(ids), -1),
            "use_cache": False,
        }
        hidden = host.base_model(**given).last_hidden_state
        logits.append(host.get_output_embeddings()(hidden)[:, MEMORY : MEMORY + tokens])
        memory = hidden[:, -MEMORY:] if written else memory
    return torch.cat(logits, dim=1), memory


@pytest.mark.parametrize("causal", [False, True], ids=["two-way", "causal"])
@pytest.mark.parametrize("host", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tokens", [SEGMENT, 3 * SEGMENT, 2 * SEGMENT + 2])
def test_equals_a_naive_concatenation(host, causal, tokens):
    model, ids = attached(host, memory_causal=causal), random_ids(2, tokens)
    with torch.no_grad():
        output = model(ids, use_cache=False)
        logits, memory = naive(tiny_host(host), ids, model.memory.first_tokens, causal)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.memory_state["memory"], memory, rtol=0, atol=1e-5)


def test_gradients_equal_those_of_the_concatenation():
    model, ids = attached(), random_ids(2, 3 * SEGMENT)
    host, first = tiny_host(), model.memory.first_tokens.detach().clone().requires_grad_()
    model(ids).logits.pow(2).mean().backward()
    naive(host, ids, first, causal=False)[0].pow(2).mean().backward()
    torch.testing.assert_close(model.memory.first_tokens.grad, first.grad, rtol=1e-4, atol=1e-6)
    mine = {name: p.grad for name, p in model.named_parameters() if not name.startswith("memory.")}
    for name, p in host.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, rtol=1e-4, atol=1e-6)


def test_both_masks_differ():
    ids = random_ids(1, 2 * SEGMENT)
    with torch.no_grad():
        difference = (attached()(ids).logits - attached(memory_causal=True)(ids).logits).abs()
    assert float(difference.max()) > 1e-4


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_without_memory_tokens_it_is_the_base_model_segment_by_segment(host):
    model, base, ids = attached(host, num_tokens=0), tiny_host(host), random_ids(2, 3 * SEGMENT + 2)
    assert model.memory.identity_at_attach
    with torch.no_grad():
        expected = torch.cat([base(part, use_cache=False).logits for part in ids.split(SEGMENT, dim=1)], dim=1)
        assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("causal", [False, True], ids=["two-way", "causal"])
@pytest.mark.parametrize("place", [0, 3, SEGMENT - 1, SEGMENT + 2])
def test_a_token_changes_nothing_before_it_and_later_segments(place, causal):
    model, ids = attached(memory_causal=causal), random_ids(1, 3 * SEGMENT)
    other = ids.clone()
    other[0, place] = (ids[0, place] + 1) % 58 + 3
    with torch.no_grad():
        difference = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    assert torch.equal(difference[:place], torch.zeros(place))
    following = (place // SEGMENT + 1) * SEGMENT
    assert float(difference[place]) > 1e-4
    assert float(difference[following:].min()) > 1e-6


def test_state_is_the_written_memory_and_carries_on():
    model, ids = attached(), random_ids(2, 4 * SEGMENT)
    with torch.no_grad():
        whole = model(ids)
        first = model(ids[:, : 2 * SEGMENT])
        rest = model(ids[:, 2 * SEGMENT :], memory_state=first.memory_state)
    assert first.memory_state["memory"].shape == (2, MEMORY, 32)
    torch.testing.assert_close(rest.logits, whole.logits[:, 2 * SEGMENT :], rtol=0, atol=1e-6)
    assert rest.memory_state.nbytes == first.memory_state.nbytes == 2 * MEMORY * 32 * 4


@pytest.mark.parametrize("causal", [False, True], ids=["two-way", "causal"])
def test_token_by_token_equals_all_at_once(causal):
    model, ids = attached(memory_causal=causal), random_ids(2, 3 * SEGMENT + 2)
    with torch.no_grad():
        at_once = model(ids, use_cache=False)
        cache, steps = None, []
        for t in range(ids.shape[1]):
            output = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(cache.state["memory"], at_once.memory_state["memory"], rtol=0, atol=1e-4)


def reached(model, count: int, last: int, truncation: Truncation | None) -> list[bool]:
    """For each of `count` segments, whether the loss of segment `last` has a gradient there; exact zeros otherwise."""
    torch.manual_seed(3)
    embeds = torch.randn(1, count * SEGMENT, 32, requires_grad=True)
    logits = model(inputs_embeds=embeds, truncation=truncation).logits
    logits[:, last * SEGMENT : (last + 1) * SEGMENT].pow(2).sum().backward()
    return [bool(part.any()) for part in embeds.grad[0].split(SEGMENT)]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_tail_truncation_gives_exact_zeros(depth):
    assert reached(attached(), 4, 3, Truncation("tail", depth)) == [s >= 3 - depth for s in range(4)]


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunk_truncation_gives_exact_zeros(size, last):
    expected = [last // size * size <= s <= last for s in range(4)]
    assert reached(attached(), 4, last, Truncation("chunk", size)) == expected


def test_without_truncation_gradients_reach_the_first_segment_and_the_first_tokens():
    model = attached()
    assert reached(model, 4, 3, None) == [True] * 4
    assert bool(model.memory.first_tokens.grad.any(-1).all())


@pytest.mark.parametrize("segment, tokens", [(128, 1), (100, 15)])
def test_a_segment_with_its_memory_must_fit_the_hosts_positions(segment, tokens):
    with pytest.raises(ConfigError, match=f"needs {segment + 2 * tokens} positions"):
        mnemic.attach(tiny_host(), "rmt", segment=segment, num_tokens=tokens)


@pytest.mark.parametrize("options", [{"num_tokens": -1}, {"num_tokens": 1.5}, {"memory_causal": 1}, {"tokens": 3}])
def test_unusable_configurations_are_refused(options):
    host = tiny_host()
    with pytest.raises(ConfigError, match="rmt"):
        mnemic.attach(host, "rmt", segment=SEGMENT, **options)
    assert not mnemic.is_attached(host)


def test_first_tokens_look_like_token_embeddings():
    host = tiny_host()
    torch.manual_seed(0)
    model = mnemic.attach(host, "rmt", segment=SEGMENT, num_tokens=40)
    expected = float(host.get_input_embeddings().weight.detach().std())
    assert float(model.memory.first_tokens.detach().std()) == pytest.approx(expected, rel=0.1)
