"""Memorizing Transformers: its equations against loops, and the checks of its card."""

import unittest.mock
from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic.core.memory import HostSpec, Segment
from mnemic.core.registry import memory_class, memory_config
from mnemic.core.state import State
from mnemic.core.step import AttentionCall, Step
from mnemic.ops.attention import attend
from mnemic.ops.rotary import rotate
from tests.memories.documents import train_toy
from tests.tiny import random_ids, tiny_host

NAME = "memorizing-transformers"
HEADS, KEY_HEADS, WIDTH, TOKENS, FIRST = 4, 2, 6, 3, 5
WIDE: dict[str, Any] = {"dtype": torch.float64}


class Turns:
    """A host's rotation: frequencies 1, 0.3, 0.1; the factor is that of a long-context scaling."""

    factor = 1.2

    def rotary(self, places: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        angles = places[..., None].double() * torch.tensor([1.0, 0.3, 0.1], **WIDE)
        angles = torch.cat([angles, angles], dim=-1)
        return self.factor * angles.cos(), self.factor * angles.sin()


def turned(x: Tensor, place: int) -> Tensor:
    cos, sin = Turns().rotary(torch.tensor([[place]]), 0)
    return rotate(x[None, None, None], cos, sin)[0, 0, 0]


def build(**options: Any) -> Any:
    spec = HostSpec(
        hidden_size=24, num_layers=2, embedding_std=0.02, dtype=torch.float64, device=torch.device("cpu"),
        num_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=WIDTH, rotary=True,
    )  # fmt: skip
    torch.manual_seed(0)
    memory = memory_class(NAME)(memory_config(NAME, **options), spec)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, **WIDE)
    return memory


def softmax(scores: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    total = torch.stack(scores).logsumexp(0)
    return [(s - total).exp() for s in scores], total


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum() + 1e-6).sqrt()


def read_by_loops(memory, past, count, call, free_query, scale_of_host):
    """The attention's result (B, T, H, e), one row, token and head at a time. past: the stored keys and values of each
    row in order, raw; only the last N of `count` are in the store."""
    c, layer = memory.config, memory.layers[0]
    i, group = memory._index[layer], HEADS // KEY_HEADS
    cap = (lambda s: call.softcap * torch.tanh(s / call.softcap)) if call.softcap else (lambda s: s)
    rows = []
    for b in range(len(count)):
        first = max(0, count[b] - c.capacity)
        for t in range(TOKENS):
            for h in range(HEADS):
                own, g = memory.scale[i, h].abs(), h // group
                query, raw = call.query[b, h, t], free_query[b, h, t]
                seen = [j for j in range(call.keys.shape[2]) if bool(call.bool_mask()[0, 0, t, j])]
                if c.normalise == "both":
                    local = [own * unit(query) @ unit(call.keys[b, g, j]) for j in seen]
                else:
                    local = [scale_of_host * query @ call.keys[b, g, j] for j in seen]
                local = [cap(s) for s in local]
                values = [call.values[b, g, j] for j in seen]

                keys = {j: past[0][b, g, j] for j in range(first, count[b])}
                if c.normalise != "none":
                    keys, query, raw = {j: unit(k) for j, k in keys.items()}, unit(query), unit(raw)
                sought = query if c.position_policy == "zero" else raw
                chosen = sorted(keys, key=lambda j: -float((sought @ keys[j]).detach()))[: c.top_k]
                newest_first = sorted(chosen, reverse=True)
                scores = []
                for j in chosen:
                    age = count[b] - 1 - j
                    place = {
                        "none": None,
                        "zero": 0,
                        "original": j - count[b],
                        "slots": -1 - newest_first.index(j) - (age >= c.top_k),
                        "parallel": j % 4 - 4,
                    }[c.position_policy]
                    key = keys[j] if place is None else turned(keys[j], FIRST + place)
                    score = (raw if place is None else query) @ key
                    scores.append(cap(own * scale_of_host * score) if c.normalise == "none" else own * score)
                found = [past[1][b, g, j] for j in chosen]

                if c.merge == "joint":
                    weights, _ = softmax(local + scores)
                    rows.append(sum(w * v for w, v in zip(weights, values + found, strict=True)))
                    continue
                weights, _ = softmax(local)
                out = sum(w * v for w, v in zip(weights, values, strict=True))
                if found:
                    weights, _ = softmax(scores)
                    bias = memory.gate_bias[i, h]
                    gate = torch.tanh(bias) if c.gate == "identity" else torch.sigmoid(bias)
                    out = (1 - gate) * out + gate * sum(w * v for w, v in zip(weights, found, strict=True))
                rows.append(out)
    return torch.stack(rows).view(len(count), TOKENS, HEADS, WIDTH)


def call_of(raw: list[Tensor], softcap: float | None = None) -> AttentionCall:
    """Attention of tokens at host positions FIRST + 1 .. over one earlier key and theirs; raw: query, keys, values."""
    (query, keys, values), host, scale = raw, Turns(), 0.37
    places = FIRST + torch.arange(keys.shape[2])[None]
    rotation = host.rotary(places[:, -TOKENS:], 0)

    def base(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        seen = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - query.shape[2])
        seen = seen if mask is None else mask
        return attend(query, keys, values, seen, scale, softcap)[0].transpose(1, 2)

    return AttentionCall(
        query=rotate(query, *rotation), keys=rotate(keys, *host.rotary(places, 0)), values=values, mask=None,
        scale=scale, new_keys=rotate(keys[:, :, -TOKENS:], *rotation), new_values=values[:, :, -TOKENS:],
        rotation=rotation, key_places=places, base=base, softcap=softcap,
    )  # fmt: skip


def filled(memory, past, count) -> State:
    """The state after segments of four tokens, raw keys and values (B, Hkv, n, e) of which row b has count[b]."""
    state, layer = memory.initial_state(len(count)), memory.layers[0]
    keys = past[0] if memory.config.normalise == "none" else past[0] * past[0].pow(2).sum(-1, True).add(1e-6).rsqrt()
    for start in range(0, max(count), 4):
        trace = {"keys": keys, "values": past[1]}
        trace = {n: t[:, :, start : start + 4].transpose(1, 2) for n, t in trace.items()}
        mask = (torch.tensor(count) > start)[:, None].expand(-1, 4)
        state = memory.commit(state, Segment(trace={layer: trace}, mask=mask))
    return state


POLICIES = ("none", "zero", "original", "slots", "parallel")
CASES: list[dict[str, Any]] = [
    *({"position_policy": p, "normalise": n} for p in POLICIES for n in ("both", "none")),
    *({"position_policy": p, "normalise": "none", "merge": "joint"} for p in POLICIES),
    {"merge": "joint"},
    {"merge": "joint", "normalise": "memory", "position_policy": "original", "softcap": 2.0},
    {"merge": "joint", "normalise": "none", "position_policy": "zero", "softcap": 2.0},
    {"normalise": "none", "softcap": 2.0},
    {"normalise": "memory"},
    {"preset": "attach"},
    {"preset": "attach", "top_k": 40, "position_policy": "slots", "normalise": "none"},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_reading_equals_loops(options):
    """Four rows: an empty store, one of few tokens, one just full, one that has forgotten tokens."""
    softcap, options = options.get("softcap"), {k: v for k, v in options.items() if k != "softcap"}
    memory = build(**{"capacity": 16, "top_k": 5, **options})
    count, make = [0, 4, 16, 24], torch.Generator().manual_seed(3)
    leaf = lambda *shape: torch.randn(4, *shape, generator=make, **WIDE).requires_grad_()  # noqa: E731
    past = [leaf(KEY_HEADS, 24, WIDTH) for _ in range(2)]
    leaves = [leaf(HEADS, TOKENS, WIDTH), leaf(KEY_HEADS, TOKENS + 1, WIDTH), leaf(KEY_HEADS, TOKENS + 1, WIDTH)]
    call = call_of(leaves, softcap)
    step = Step.alone(memory, memory.layers[0], state=filled(memory, past, count), host=Turns(), first=FIRST)
    expected = read_by_loops(memory, past, count, call, leaves[0], call.scale)
    got = memory.attention(call, step)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    weight = torch.randn(got.shape, generator=make, **WIDE)
    wanted = [*leaves, *memory.parameters()]
    mine, theirs = (
        torch.autograd.grad((o * weight).sum(), wanted, allow_unused=True, retain_graph=True) for o in (got, expected)
    )
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    # Nothing reaches what is stored.
    assert torch.autograd.grad(got.sum(), past, allow_unused=True) == (None, None)


@pytest.mark.parametrize("options", [{}, {"merge": "joint", "normalise": "none"}], ids=["gate", "joint"])
def test_an_empty_store_gives_the_local_part_bit_for_bit(options):
    memory = build(**options)
    make = torch.Generator().manual_seed(4)
    call = call_of([torch.randn(2, h, TOKENS, WIDTH, generator=make, **WIDE) for h in (4, 2, 2)])
    step = Step.alone(memory, memory.layers[0], state=memory.initial_state(2), host=Turns())
    normalised = {"query": call.query, "keys": call.keys}
    if not options:
        scale = memory.scale[0].abs()[:, None, None] / call.scale
        normalised = {n: t * t.pow(2).sum(-1, True).add(1e-6).rsqrt() for n, t in normalised.items()}
        normalised["query"] = normalised["query"] * scale
    torch.testing.assert_close(memory.attention(call, step), call.plain(**normalised), rtol=0, atol=1e-14)
    assert torch.equal(memory.attention(call, step), memory.attention(call, step))


def test_kept_keys_are_free_of_position_and_normalised():
    memory = build()
    make = torch.Generator().manual_seed(4)
    raw = [torch.randn(2, h, TOKENS, WIDTH, generator=make, **WIDE).requires_grad_() for h in (4, 2, 2)]
    step = Step.alone(memory, memory.layers[0], state=memory.initial_state(2), host=Turns())
    memory.attention(call_of(raw), step)
    kept = step.frame.trace[memory.layers[0]]
    assert not kept["keys"].requires_grad
    assert not kept["values"].requires_grad
    torch.testing.assert_close(kept["keys"][1, 2, 1], unit(raw[1][1, 1, 2]).detach(), rtol=0, atol=1e-12)
    assert torch.equal(kept["values"].transpose(1, 2), raw[2].detach())


# What the card asks for


@pytest.mark.parametrize("host", ["llama", "qwen3", "gemma2"])
def test_all_of_the_past_in_every_block_is_one_long_context(host):
    """Stored tokens at their true places, all chosen, in one softmax: the logits of one forward over the whole text."""
    changes = {"sliding_window": 128, "attn_implementation": "eager"} if host == "gemma2" else {}
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = tiny_host(host, **changes)(ids, use_cache=False).logits
    model = mnemic.attach(
        tiny_host(host, **changes), NAME, segment=16, memory_layers=(0, 1), capacity=32, top_k=32, normalise="none",
        merge="joint", position_policy="original",
    )  # fmt: skip
    with torch.no_grad():
        got = model(ids, use_cache=False).logits
        stream = model.stream(2)
        fed = torch.cat([stream.feed(part, return_logits=True) for part in ids.split([7, 1, 20, 12], dim=1)], dim=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(fed, expected, rtol=0, atol=1e-5)


def test_a_closed_gate_is_the_host():
    ids = random_ids(2, 40)
    host = tiny_host("llama")
    with torch.no_grad():
        expected = torch.cat([host(part, use_cache=False).logits for part in ids.split(16, dim=1)], dim=1)
    model = mnemic.attach(tiny_host("llama"), NAME, segment=16, capacity=32, gate=-30.0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-6)


def test_the_store_keeps_its_size_and_rows_are_reset_alone():
    model = mnemic.attach(tiny_host("llama"), NAME, segment=8, capacity=16, preset="default")
    size = model.memory.initial_state(2).nbytes
    with torch.no_grad():
        state = model(random_ids(2, 40), use_cache=False).memory_state
        assert state.nbytes == size
        reset = state.put([1], model.memory.initial_state(1))
        after = random_ids(2, 16, seed=5)
        kept, new, both = (model(after, memory_state=s, use_cache=False).logits for s in (state, None, reset))
    assert torch.equal(both[0], kept[0])
    assert torch.equal(both[1], new[1])
    assert not torch.allclose(kept[1], new[1], atol=1e-3)


def test_no_gradient_passes_the_store_and_the_gate_has_one():
    model = mnemic.attach(tiny_host("llama"), NAME, segment=8, capacity=16, preset="default")
    embeds = model.get_input_embeddings()(random_ids(2, 16)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[:, 8:].square().sum().backward()
    assert not embeds.grad[:, :8].any()
    assert embeds.grad[:, 8:].any()
    assert model.memory.gate_bias.grad.abs().min() > 0
    assert model.memory.scale.grad.abs().min() > 0


# The store


def test_commits_touch_only_the_pages_they_write_to():
    model = mnemic.attach(tiny_host("llama"), NAME, segment=8, capacity=64, preset="default")
    assert model.memory.config.page == 8
    stream = model.stream(2)
    stream.feed([random_ids(n, seed=n).tolist() for n in (16, 4)])
    before = dict(stream.state)
    stream.feed([random_ids(3, seed=1).tolist(), random_ids(3, seed=2).tolist()])
    assert all(stream.state[name] is t for name, t in before.items())
    # Only the second row completes its segment, its first: page 0, where the first row has tokens of its own.
    stream.feed([random_ids(1, seed=1).tolist(), random_ids(1, seed=2).tolist()])
    changed = {name for name, t in stream.state.items() if t is not before[name]}
    assert changed == {"count", "1/keys/0000", "1/values/0000"}
    assert stream.state["count"].tolist() == [16, 8]
    assert torch.equal(stream.state["1/keys/0000"][0], before["1/keys/0000"][0])
    assert not torch.equal(stream.state["1/keys/0000"][1], before["1/keys/0000"][1])


def test_truncation_copies_no_page():
    model = mnemic.attach(tiny_host("llama"), NAME, segment=8, capacity=64, preset="default").train()
    state = model(random_ids(1, 16)).memory_state
    cut = model(random_ids(1, 16, seed=2), memory_state=state, truncation=mnemic.Truncation("tail", 0)).memory_state
    assert cut["1/keys/0000"] is state["1/keys/0000"]


def test_a_full_store_refuses_or_forgets():
    ids = random_ids(1, 24)
    model = mnemic.attach(tiny_host("llama"), NAME, segment=8, capacity=16, full="refuse")
    with torch.no_grad():
        state = model(ids[:, :16], use_cache=False).memory_state
        with pytest.raises(mnemic.StateError, match="no room for 8 more"):
            model(ids, use_cache=False)
    assert state["count"].tolist() == [16]
    model = mnemic.attach(tiny_host("llama"), NAME, segment=8, capacity=16)
    with torch.no_grad():
        assert model(ids, use_cache=False).memory_state["count"].tolist() == [24]


@pytest.mark.parametrize(
    "options, page",
    [
        ({"capacity": 16}, 2),
        ({"capacity": 8192}, 1024),
        ({"capacity": 65536}, 8192),
        ({"capacity": 100_000}, 6250),
        ({"capacity": 262_144, "search": "faiss"}, 32768),
        ({"capacity": 3}, 1),
    ],
)
def test_pages(options, page):
    config: Any = memory_config(NAME, **options)
    assert config.page == page


def test_default_blocks():
    def blocks(total: int, **options: Any) -> tuple[int, ...]:
        spec = HostSpec(
            hidden_size=8, num_layers=total, embedding_std=0.02, dtype=torch.float32, device=torch.device("cpu"),
            num_heads=2, num_key_value_heads=1, head_dim=4,
        )  # fmt: skip
        return memory_class(NAME)(memory_config(NAME, **options), spec).layers

    assert [blocks(n) for n in (1, 2, 4, 12, 32)] == [(0,), (1,), (2,), (8,), (23,)]
    assert blocks(12, memory_layers=[-4]) == (8,)
    assert blocks(12, memory_layers=[-1, 0]) == (0, 11)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"capacity": 8191}, mnemic.ConfigError, "8192"),
        ({"memory_layers": ()}, mnemic.ConfigError, "empty"),
        ({"memory_layers": (2,)}, mnemic.ConfigError, "expected blocks of 2"),
        ({"top_k": 0}, mnemic.ConfigError, "top_k"),
        ({"gate": "open"}, mnemic.ConfigError, "identity"),
    ],
)
def test_bad_settings(options, error, match):
    with pytest.raises(error, match=match):
        mnemic.attach(tiny_host("llama"), NAME, segment=8, **options)


def test_places_need_a_host_that_turns():
    with pytest.raises(mnemic.HostError, match="position_policy='none'"):
        mnemic.attach(tiny_host("gpt2"), NAME, segment=8, position_policy="slots")


def test_it_stands_beside_a_cache_of_the_window_before():
    """With Transformer-XL in the other block the segment stands further on; stored tokens keep their distance."""
    window = memory_config("transformer-xl", memory_lengths=(8, 0))
    store = memory_config(NAME, memory_layers=(1,), capacity=16, top_k=16, normalise="none", position_policy="original")
    ids, found = random_ids(1, 24), []
    for stacked in ([store], [window, store]):
        model = mnemic.attach(tiny_host("llama"), stacked, segment=8)
        with (
            torch.no_grad(),
            unittest.mock.patch.object(model.mnemic.access, "rotary", side_effect=model.mnemic.access.rotary) as rotary,
        ):
            model(ids, use_cache=False)
        found.append(rotary.call_args.args[0].flatten())
    assert found[0].min() == -16
    assert torch.equal(found[1].sort().values, found[0].sort().values + 8)


def test_a_changed_local_part_is_not_shared():
    configs = [memory_config(NAME, capacity=16), memory_config(NAME, preset="attach", capacity=16)]
    with pytest.raises(mnemic.ConfigError, match="for itself"):
        mnemic.attach(tiny_host("llama"), configs, segment=8)
    mnemic.attach(tiny_host("llama"), configs[1:] * 2, segment=8)


def test_faiss_finds_what_exact_search_finds():
    pytest.importorskip("faiss")
    found = []
    for search in ("exact", "faiss"):
        model = mnemic.attach(
            tiny_host("llama"), NAME, segment=32, capacity=512, top_k=8, preset="default", search=search
        )
        with torch.no_grad():
            found.append(model(random_ids(1, 320), use_cache=False).logits)
    # 16 of few cells are searched: nearly all that there are.
    assert float((found[0] - found[1]).abs().mean()) < 1e-3


# The toy: keys and values of a document, asked for again

TOY = {"capacity": 128, "top_k": 16, "scale": 5.0, "preset": "default", "normalise": "memory"}


@pytest.mark.slow
def test_the_toy_is_recalled_across_segments():
    across, within = train_toy(NAME, 800, TOY)
    assert within > 0.95
    assert across > 0.9


@pytest.mark.slow
def test_without_memory_the_toy_is_not_recalled_across_segments():
    across, _ = train_toy("none", 800, {})
    # Values are one of 16.
    assert across < 0.1
