"""Transformer-XL against loops, against one long pass, and its schedules."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

import mnemic
from mnemic.core import ConfigError, memory_class, memory_config
from mnemic.core.memory import HostSpec, Segment
from mnemic.core.state import State
from mnemic.core.step import AttentionCall, Step
from mnemic.memories.recurrent.transformer_xl import layout
from mnemic.ops.relative_shift import distances
from mnemic.ops.rotary import rotate
from tests.tiny import random_ids, tiny_host

HEADS, KEY_HEADS, WIDTH, SCALE = 4, 2, 6, 0.4


def build(seed: int = 0, layers: int = 2, **options: Any):
    spec = HostSpec(
        hidden_size=HEADS * WIDTH, num_layers=layers, embedding_std=0.02, dtype=torch.float64,
        device=torch.device("cpu"), num_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=WIDTH,
    )  # fmt: skip
    torch.manual_seed(seed)
    memory = memory_class("transformer-xl")(memory_config("transformer-xl", **options), spec)
    with torch.no_grad():
        for p in memory.parameters():
            p += 0.3 * torch.randn(p.shape, dtype=p.dtype)
    return memory


def dense(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """A host's attention."""
    keys, values = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (keys, values))
    scores = query @ keys.mT * SCALE
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ values).transpose(1, 2)


def turn(first: int, number: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(first, first + number).double()[None, :, None] * torch.tensor([1.0, 0.3, 0.1]).double()
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def loops(memory, layer: int, count: list[int], free: Tensor, keys: Tensor, values: Tensor, rotary: bool) -> Tensor:
    """The card's equations for queries and keys free of position, one row, head and token at a time; the memory's keys
    come first, each row's oldest are empty."""
    length, limit, rows = memory.lengths[layer], memory.ranges[layer], []
    tokens = free.shape[2]
    for b in range(free.shape[0]):
        for h in range(HEADS):
            group = h // (HEADS // KEY_HEADS)
            for i in range(tokens):
                seen = [
                    j
                    for j in range(max(length - count[b], 0), i + length + 1)
                    if limit is None or i + length - j < limit
                ]
                scores = []
                for j in seen:
                    apart, q, k = i + length - j, free[b, h, i], keys[b, group, j]
                    if memory.relative:
                        table = distances(apart + 1, HEADS * WIDTH, memory.config.clamp, dtype=q.dtype)[0]
                        place = torch.einsum("d,de->e", table, memory.position_weight[layer, :, h])
                        scores.append(q @ k + memory.content_bias[layer, h] @ k
                                      + q @ place + memory.position_bias[layer, h] @ place)  # fmt: skip
                    elif rotary:
                        # Only the distance matters: the query at it, the key at 0.
                        scores.append(rotate(q[None, None, None], *turn(apart, 1))[0, 0, 0] @ k)
                    else:
                        scores.append(q @ k)
                weights = torch.softmax(torch.stack(scores) * SCALE, dim=0)
                rows.append(weights @ values[b, group, seen])
    return torch.stack(rows).view(free.shape[0], HEADS, tokens, -1).transpose(1, 2)


CASES: dict[str, dict[str, Any]] = {
    "host": {},
    "host-range": {"ranges": (5, 6)},
    "relative": {"positions": "relative"},
    "relative-clamp-range": {"positions": "relative", "clamp": 4, "ranges": 6},
    "relative-no-memory": {"positions": "relative", "memory_lengths": 0},
}


@pytest.mark.parametrize("rotary", [False, True], ids=["table", "rotary"])
@pytest.mark.parametrize("tokens", [3, 8])
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_loops(name, tokens, rotary):
    memory = build(**{"memory_lengths": (0, 4), **CASES[name]})
    layer, count = 1, [9, 3]
    length, first = memory.lengths[layer], memory.first_position()
    make = torch.Generator().manual_seed(4)
    leaf = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64, requires_grad=True)  # noqa: E731
    free, keys, values = (leaf(2, h, n, WIDTH) for h, n in ((4, tokens), (2, length + tokens), (2, length + tokens)))
    rotation = turn(first, tokens) if rotary else None
    new, old = keys[:, :, length:], keys[:, :, :length]
    if rotary and not memory.relative:
        old = rotate(old, *turn(first - length, length))
    turned = [x if rotation is None else rotate(x, *rotation) for x in (free, new)]
    places = torch.tensor([count]).mT + torch.arange(tokens)
    step = Step.alone(
        memory, layer, state={"count": torch.tensor(count)}, places=places,
        reads={"1/keys": old, "1/values": values[:, :, :length]},
    )  # fmt: skip
    step.frame.reads = {**step.frame.reads, **memory.fetch(State(), free, step)}
    call = AttentionCall(
        query=turned[0], keys=turned[1], values=values[:, :, length:], mask=None, scale=SCALE, new_keys=turned[1],
        new_values=values[:, :, length:], rotation=rotation, key_places=places, base=dense,
    )  # fmt: skip
    got = memory.attention(call, step)
    expected = loops(memory, layer, count, free, keys, values, rotary)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    weight = torch.randn(got.shape, generator=make, dtype=torch.float64)
    leaves = [free, keys, values, *memory.parameters()]
    grads = [
        torch.autograd.grad((o * weight).sum(), leaves, retain_graph=True, allow_unused=True) for o in (got, expected)
    ]
    for fast, slow in zip(*grads, strict=True):
        assert (fast is None) == (slow is None)
        if fast is not None:
            torch.testing.assert_close(fast, slow, atol=1e-8, rtol=0)


@pytest.mark.parametrize("cache", ["hidden", "kv"])
@pytest.mark.parametrize("tokens", [2, 5, 9])
def test_the_last_tokens_are_stored(cache, tokens):
    """FIFO row by row; padding anywhere in a segment is skipped."""
    memory = build(memory_lengths=(5, 2), cache=cache)
    names = ["hidden"] if cache == "hidden" else ["keys", "values"]
    for masked in (False, True):
        state, make = memory.initial_state(2), torch.Generator().manual_seed(3)
        kept: dict[str, list[list[Tensor]]] = {name: [[], []] for name in state if "/" in name}
        for _ in range(3):
            mask = torch.rand(2, tokens, generator=make) < 0.6 if masked else None
            trace: dict[int, dict[str, Tensor]] = {0: {}, 1: {}}
            for layer in (0, 1):
                for name in names:
                    shape = state[f"{layer}/{name}"].shape[2:]
                    new = trace[layer][name] = torch.randn(2, tokens, *shape, generator=make, dtype=torch.float64)
                    for b in range(2):
                        kept[f"{layer}/{name}"][b] += [new[b, t] for t in range(tokens) if mask is None or mask[b, t]]
            state = memory.commit(state, Segment(trace=trace, mask=mask))
            for name, rows in kept.items():
                for b, row in enumerate(rows):
                    length = state[name].shape[1]
                    have = min(len(row), length)
                    assert int(state["count"][b]) == len(row)
                    if have:
                        assert torch.equal(state[name][b, length - have :], torch.stack(row[-have:]))


@pytest.mark.parametrize("cache", ["hidden", "kv"])
def test_segments_with_a_long_memory_are_one_long_pass(cache):
    """With room for all that came before and no stopped gradient: logits and gradients of a full causal pass."""
    ids = random_ids(2, 40)
    options = {"memory_lengths": 32, "cache": cache, "stop_gradient": False}
    plain, model = tiny_host(num_hidden_layers=3), tiny_host(num_hidden_layers=3)
    mnemic.attach(model, "transformer-xl", segment=8, **options)
    grads = []
    for one in (plain, model):
        logits = one(ids, use_cache=False).logits
        logits[:, -8:].square().sum().backward()
        grads.append((logits.detach(), {n: p.grad for n, p in one.named_parameters()}))
    torch.testing.assert_close(grads[1][0], grads[0][0], atol=1e-4, rtol=0)
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(grads[1][1][name], grad, atol=1e-4 * float(grad.abs().max()), rtol=1e-3)
    with torch.no_grad():
        cache_of, logits = None, []
        for part in ids.split([7, 20, 1, 12], dim=1):
            output = model(part, past_key_values=cache_of, use_cache=True)
            cache_of = output.past_key_values
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), grads[0][0], atol=1e-4, rtol=0)


def test_relative_positions_are_one_long_pass_too():
    """Three layers: five segments with memory against one segment of all tokens, logits and gradients."""
    ids, grads = random_ids(2, 40), []
    for segment, lengths in ((40, 0), (8, 32)):
        host = tiny_host(num_hidden_layers=3)
        torch.manual_seed(5)
        options = {"positions": "relative", "memory_lengths": lengths, "stop_gradient": False}
        model = mnemic.attach(host, "transformer-xl", segment=segment, **options)
        logits = model(ids, use_cache=False).logits
        logits[:, -8:].square().sum().backward()
        grads.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(grads[1][0], grads[0][0], atol=1e-4, rtol=0)
    assert "memory.position_weight" in grads[0][1]
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(grads[1][1][name], grad, atol=1e-4 * float(grad.abs().max()), rtol=1e-3)


def test_relative_positions_without_memory_are_independent_segments():
    options = {"positions": "relative", "memory_lengths": 0}
    model, ids = mnemic.attach(tiny_host(), "transformer-xl", segment=8, **options), random_ids(2, 20)
    with torch.no_grad():
        expected = torch.cat([model(part, use_cache=False).logits for part in ids.split(8, 1)], dim=1)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=0)
    assert len(model.memory.initial_state(2)) == 0


def test_ranges_are_a_sliding_window():
    """Memory for all, range 16 in all layers: Mistral's window of 16 over one long pass."""
    ids = random_ids(2, 48)
    plain, model = tiny_host("mistral"), tiny_host("mistral")
    mnemic.attach(model, "transformer-xl", segment=8, memory_lengths=40, ranges=16)
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(model(ids, use_cache=True).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_no_memory_is_independent_segments(host):
    plain, ids = tiny_host(host), random_ids(2, 20)
    model = mnemic.attach(tiny_host(host), "transformer-xl", segment=8, memory_lengths=0)
    with torch.no_grad():
        expected = torch.cat([plain(part, use_cache=False).logits for part in ids.split(8, 1)], dim=1)
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert model.memory.identity_at_attach
    assert len(model.memory.initial_state(2)) == 0


def test_state_bytes():
    model = mnemic.attach(tiny_host(num_hidden_layers=3), "transformer-xl", segment=8, memory_lengths=(0, 5, 11))
    state = model(random_ids(3, 16)).memory_state
    assert state.nbytes == (5 + 11) * 32 * 3 * 4 + 3 * 8
    assert set(state) == {"1/hidden", "2/hidden", "count"}
    kept = mnemic.attach(tiny_host(), "transformer-xl", segment=8, memory_lengths=6, cache="kv").memory
    assert kept.initial_state(1).nbytes == 2 * 6 * (2 * 2 * 8) * 4 + 8


@pytest.mark.parametrize("cache", ["hidden", "kv"])
def test_gradients_stop_at_the_memory_and_reach_its_projections(cache):
    """No token of an earlier segment gets any; W_k and W_v learn from stored tokens with "hidden" only."""
    model = mnemic.attach(tiny_host(), "transformer-xl", segment=8, memory_lengths=(0, 8), cache=cache)
    embeds = model.get_input_embeddings()(random_ids(1, 16)).detach().requires_grad_()
    output = model(inputs_embeds=embeds)
    output.logits[:, 8:].square().sum().backward()
    assert not embeds.grad[:, :8].any()
    assert embeds.grad[:, 8:].any()
    assert not any(t.requires_grad for t in output.memory_state.values())
    reads = model.memory.prepare(output.memory_state, model.mnemic.access)
    assert set(reads) == {"1/keys", "1/values"}
    assert all(t.requires_grad == (cache == "hidden") for t in reads.values())


@pytest.mark.parametrize("positions", ["host", "relative"])
def test_causal_across_segments(positions):
    options = {"memory_lengths": (6, 12), "ranges": (None, 14), "positions": positions}
    model = mnemic.attach(tiny_host(), "transformer-xl", segment=8, **options)
    ids = random_ids(1, 16)
    with torch.no_grad():
        before = model(ids).logits
        for t in (3, 8, 13):
            other = ids.clone()
            other[0, t] = 3 + (other[0, t] - 2) % 50
            moved = (model(other).logits - before).abs().amax(-1)[0]
            assert moved[:t].max() < 1e-6
            assert moved[t] > 1e-4
            assert moved[8:].max() > 1e-4


def test_layers_without_memory_store_nothing_and_learn_nothing_from_the_past():
    """Schedule [0, .., 0, M], gradients not stopped: earlier tokens reach the loss through the last layer's memory."""
    options = {"memory_lengths": (0, 0, 8), "stop_gradient": False}
    model = mnemic.attach(tiny_host(num_hidden_layers=3), "transformer-xl", segment=8, **options)
    embeds = model.get_input_embeddings()(random_ids(1, 16)).detach().requires_grad_()
    inputs: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, index=index: inputs.setdefault(index, args[0]))
    output = model(inputs_embeds=embeds)
    assert set(output.memory_state) == {"2/hidden", "count"}
    loss = output.logits[:, 8:].square().sum()
    # The first segment's input of the last layer is stored; what reaches it from below goes through it alone.
    first, stored = torch.autograd.grad(loss, [embeds, inputs[2]], retain_graph=True)
    assert first[:, :8].any()
    assert stored.any()
    through = torch.autograd.grad(inputs[2], embeds, grad_outputs=stored)[0]
    torch.testing.assert_close(through[:, :8], first[:, :8], atol=1e-6, rtol=1e-4)


def test_schedules():
    assert layout("first", 2, 6, 100, 10) == (100, 100, 10, 10, 10, 10)
    assert layout("last", 2, 6, 100, 10) == (10, 10, 10, 10, 100, 100)
    assert layout("interleaved", 2, 8, 9, 1) == (1, 1, 1, 9, 1, 1, 1, 9)
    assert layout("interleaved", 4, 24, 1) == tuple(int(i in (5, 11, 17, 23)) for i in range(24))
    for layers in range(1, 30):
        for n in range(layers + 1):
            found = layout("interleaved", n, layers, 1)
            assert sum(found) == n
            assert n == 0 or found[-1] == 1
    with pytest.raises(ConfigError, match="n_long"):
        layout("first", 3, 2, 1)
    with pytest.raises(ConfigError, match="kind"):
        layout("middle", 1, 2, 1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"memory_lengths": (4,)}, "2 layers"),
        ({"memory_lengths": (4, -1)}, "memory_lengths"),
        ({"ranges": (0, 3)}, "ranges"),
        ({"ranges": (None, 3, 3)}, "3 values"),
        ({"clamp": 5}, "relative"),
        ({"memory_lengths": 125}, "positions"),
    ],
)
def test_what_it_refuses(options, match):
    with pytest.raises(ConfigError, match=match):
        mnemic.attach(tiny_host(), "transformer-xl", segment=8, **options)


def test_distances_have_no_meaning_for_memory_tokens():
    stack = [memory_config("rmt", num_tokens=2), memory_config("transformer-xl", memory_lengths=4, ranges=5)]
    with pytest.raises(ConfigError, match="memory tokens"):
        mnemic.attach(tiny_host(), stack, segment=8)


def _bits_per_token(lengths: tuple[int, ...], steps: int = 160) -> float:
    """After training on text whose tokens, from the 64th on, are those of 64 places before; noise has 4 bits."""
    make = torch.Generator().manual_seed(0)

    def loss(rows: int) -> Tensor:
        ids = torch.randint(0, 16, (rows, 64), generator=make).repeat(1, 3)[:, :144]
        logits = model(ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / math.log(2)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.05,
    )  # fmt: skip
    model = mnemic.attach(config, "transformer-xl", segment=16, memory_lengths=lengths, positions="relative")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 10, (steps - i) / 60))
    for _ in range(steps):
        optimizer.zero_grad()
        loss(8).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(loss(64))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_long_memories_of_four_do_as_well():
    """Copies from 64 tokens ago, memories of 80 tokens or 16. The floor is 1.8 bits; measured: all long 2.16, the first
    two long 2.17, all short 4.00. Two interleaved ones learn nothing yet (3.94 after 320 steps): a copy from a fixed
    distance needs one layer only, so this text does not show the paper's order of placements."""
    every, first, none = (_bits_per_token(layout("first", n, 4, 80, 16)) for n in (4, 2, 0))
    assert every < none - 0.5
    assert first < none - 0.5
    assert abs(every - first) < 0.1
