"""TransformerFAM: against a plain model that follows the card layer by layer, its limits, growth, the passkey toy."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError, Truncation
from mnemic.ops.rotary import rotate
from tests.memories.exact_host import exact_host
from tests.memories.segment_recall import accuracy, trained
from tests.tiny import random_ids, tiny_host

SEGMENT, NUMBER = 6, 3


def attached(host: Any = "llama", **options: Any) -> Any:
    """TransformerFAM on a tiny host, with first embeddings as large as everything else."""
    model = tiny_host(host) if isinstance(host, str) else host
    torch.manual_seed(1)
    model = mnemic.attach(model, "transformer-fam", segment=SEGMENT, **{"num_tokens": NUMBER, "past": 0, **options})
    with torch.no_grad():
        model.memory.first_tokens.normal_(std=0.5)
    return model


# The card on llama's own modules: one row, one query at a time


def turned(host: Any, x: Tensor, places: list[int], start: int) -> Tensor:
    """(heads, n, e) turned to places counted from the block's start. Angles are of float32, so the start has to be the
    memory's own."""
    cos, sin = host.model.rotary_emb(x, torch.tensor([places]) + start)
    return rotate(x[None], cos, sin)[0]


def heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(0, 1)


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query (H, e) over keys and values (Hkv, n, e)."""
    groups = query.shape[0] // keys.shape[0]
    rows = []
    for h in range(query.shape[0]):
        k, v = keys[h // groups], values[h // groups]
        rows.append(torch.softmax(k @ query[h] / query.shape[1] ** 0.5, dim=0) @ v)
    return torch.cat(rows)


def one_layer(
    host: Any,
    layer: Any,
    x: Tensor,
    f: Tensor,
    asks: Tensor,
    residual: Tensor,
    past: tuple[Tensor, Tensor],
    start: int,
    write: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """x (T, d), f (F, d), the queries of f and their residual, past keys free of position and values -> x, the next f,
    the block's keys and values."""
    attention, width = layer.self_attn, host.config.head_dim
    tokens, number, old = len(x), len(f), past[0].shape[1]
    z_x, z_f, z_ask = (layer.input_layernorm(v) for v in (x, f, asks))
    k_x, v_x = heads(attention.k_proj(z_x), width), heads(attention.v_proj(z_x), width)
    k_f, v_f = heads(attention.k_proj(z_f), width), heads(attention.v_proj(z_f), width)
    q_x = turned(host, heads(attention.q_proj(z_x), width), list(range(tokens)), start)
    q_f = turned(host, heads(attention.q_proj(z_ask), width), list(range(tokens - number, tokens)), start)
    turned_x = turned(host, k_x, list(range(tokens)), start)
    turned_f = turned(host, k_f, list(range(-number, 0)), start)
    turned_past = turned(host, past[0], list(range(-old, 0)), start)
    rows = []
    for i in range(tokens):
        keys = torch.cat([turned_past, turned_f, turned_x[:, : i + 1]], dim=1)
        rows.append(attend(q_x[:, i], keys, torch.cat([past[1], v_f, v_x[:, : i + 1]], dim=1)))
    for i in range(number if write else 0):
        rows.append(attend(q_f[:, i], torch.cat([turned_f, turned_x], 1), torch.cat([v_f, v_x], 1)))
    both = torch.cat([x, residual[: len(rows) - tokens]]) + attention.o_proj(torch.stack(rows))
    both = both + layer.mlp(layer.post_attention_layernorm(both))
    return both[:tokens], both[tokens:], (k_x, v_x)


def first_vectors(host: Any, embeddings: Tensor, start: int) -> list[Tensor]:
    """The inputs of every layer as the learned embeddings go up and see each other."""
    number = len(embeddings)
    everyone, places = torch.ones(1, 1, number, number, dtype=torch.bool), torch.arange(start - number, start)[None]
    given = {"inputs_embeds": embeddings[None], "attention_mask": everyone, "position_ids": places}
    hidden = host.model(**given, use_cache=False, output_hidden_states=True).hidden_states
    return [h[0] for h in hidden[:-1]]


def naive(host: Any, memory: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of one row and its state."""
    config, layers, width = memory.config, host.model.layers, host.config.head_dim
    start = max(config.past, config.num_tokens)
    fam = first_vectors(host, memory.first_tokens, start)
    none = torch.zeros(host.config.num_key_value_heads, 0, width, dtype=memory.first_tokens.dtype)
    past, logits = [(none, none) for _ in layers], []
    for number, part in enumerate(ids.split(SEGMENT)):
        x, written, ended = host.get_input_embeddings()(part), [], len(part) == SEGMENT
        for i, layer in enumerate(layers):
            asks = fam[i] if memory.queries is None else memory.queries[i]
            residual = torch.zeros_like(asks) if number == 0 and memory.queries is None else asks
            x, after, new = one_layer(host, layer, x, fam[i], asks, residual, past[i], start, ended)
            if config.normalise:
                eps = torch.finfo(after.dtype).eps
                after = after * (after.square().mean(-1, keepdim=True) + eps).rsqrt()
            written.append(after)
            if ended:
                keys, values = (torch.cat([p, n], dim=1) for p, n in zip(past[i], new, strict=True))
                start_kept = max(0, keys.shape[1] - config.past)
                past[i] = keys[:, start_kept:], values[:, start_kept:]
        fam = written if ended else fam
        logits.append(host.lm_head(host.model.norm(x)))
    state = {f"{i}/fam": f for i, f in enumerate(fam)}
    for i, (keys, values) in enumerate(past):
        state |= {f"{i}/keys": keys.transpose(0, 1), f"{i}/values": values.transpose(0, 1)}
    return torch.cat(logits), state


@pytest.mark.parametrize("tokens", [SEGMENT, 3 * SEGMENT, 2 * SEGMENT + 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"past": 8}, {"past": 2, "query": "static"}, {"normalise": True}, {"past": 12, "num_tokens": 7}],
    ids=["feedback", "past", "static", "normalise", "more-than-a-block"],
)
def test_equals_the_card(options, tokens):
    model, ids = attached(exact_host(), **options), random_ids(2, tokens)
    host, grads = exact_host(), []
    output = model(ids, use_cache=False)
    rows = [naive(host, model.memory, row) for row in ids]
    expected = torch.stack([logits for logits, _ in rows])
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-10)
    state = output.memory_state
    after = {n: torch.stack([s[n] for _, s in rows]) for n in rows[0][1] if rows[0][1][n].numel()}
    assert {n for n, t in state.items() if t.is_floating_point()} == set(after)
    stored = {n: t[:, t.shape[1] - after[n].shape[1] :] for n, t in state.items() if n in after}
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    own = list(model.memory.parameters())
    for model_of, logits, kept in ((model, output.logits, stored), (host, expected, after)):
        weights = [p for n, p in model_of.named_parameters() if not n.startswith("memory.")]
        loss = logits.square().mean() + sum(kept[n].square().mean() for n in sorted(kept))
        grads.append(torch.autograd.grad(loss, [*own, *weights], retain_graph=True))
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)
        assert bool(fast.any())


def test_without_vectors_and_room_for_all_it_is_one_long_pass():
    plain, model, ids = tiny_host(), attached(num_tokens=0, past=40), random_ids(2, 40)
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(ids, use_cache=True).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("blocks", [1, 2])
def test_without_vectors_it_is_a_window_of_blocks(blocks):
    """Every token sees its block, up to itself, and as many blocks before: one long pass under that mask."""
    plain, model, ids = tiny_host(), attached(num_tokens=0, past=blocks * SEGMENT), random_ids(2, 27)
    at = torch.arange(27)
    near = at[:, None] // SEGMENT - at // SEGMENT <= blocks
    seen = (near & (at <= at[:, None]))[None, None].expand(2, -1, -1, -1)
    with torch.no_grad():
        expected = plain(ids, attention_mask=seen, use_cache=False).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_with_nothing_to_remember_it_is_the_host_segment_by_segment(host):
    model, plain, ids = attached(host, num_tokens=0), tiny_host(host), random_ids(2, 3 * SEGMENT + 2)
    assert model.memory.identity_at_attach
    with torch.no_grad():
        expected = torch.cat([plain(part, use_cache=False).logits for part in ids.split(SEGMENT, dim=1)], dim=1)
        assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("place", [0, 3, SEGMENT - 1, SEGMENT + 2])
def test_tokens_of_a_block_read_the_last_vectors_only(place):
    model, ids = attached(), random_ids(1, 3 * SEGMENT)
    other = ids.clone()
    other[0, place] = (ids[0, place] + 1) % 58 + 3
    with torch.no_grad():
        difference = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    assert torch.equal(difference[:place], torch.zeros(place))
    assert float(difference[place]) > 1e-4
    assert float(difference[(place // SEGMENT + 1) * SEGMENT :].min()) > 1e-6


def test_an_open_block_writes_nothing():
    model, ids = attached(past=4), random_ids(1, 2 * SEGMENT + 5)
    with torch.no_grad():
        assert model(ids).memory_state.equal(model(ids[:, : 2 * SEGMENT]).memory_state)


@pytest.mark.parametrize("normalise, blocks", [(False, 200), (True, 20)], ids=["as-it-is", "normalised"])
def test_size_is_constant_and_the_vectors_stay_finite_over_many_blocks(normalise, blocks):
    model = attached(tiny_host(num_hidden_layers=1), past=4, normalise=normalise)
    sizes, norms, state = set(), [], model.memory.initial_state(1)
    with torch.no_grad():
        for part in random_ids(1, blocks * SEGMENT).split(SEGMENT, dim=1):
            state = model(part, memory_state=state, use_cache=False, logits_to_keep=1).memory_state
            sizes.add(state.nbytes)
            norms.append(float(state["0/fam"].square().mean().sqrt()))
    assert len(sizes) == 1
    assert all(t.isfinite().all() for t in state.values())
    if normalise:
        assert max(norms) == pytest.approx(1, abs=1e-4)
    else:
        # Each block adds about as much: linear growth.
        assert norms[0] < norms[99] < norms[199] < 400 * norms[0]


@pytest.mark.parametrize("depth", [None, 3, 2, 0])
def test_gradients_reach_the_first_embeddings_through_every_block_unless_cut(depth):
    model = attached()
    truncation = None if depth is None else Truncation("tail", depth)
    logits = model(random_ids(1, 4 * SEGMENT), truncation=truncation).logits
    logits[:, -SEGMENT:].square().sum().backward()
    grad = model.memory.first_tokens.grad
    if depth in (None, 3):
        assert bool(grad.abs().amax(-1).gt(0).all())
    else:
        assert grad is None or not bool(grad.any())


def test_diagnostics_are_the_size_of_the_vectors():
    model, ids = attached(), random_ids(2, SEGMENT)
    output = model(ids, memory_diagnostics=True)
    assert set(output.memory_diagnostics) == {"block0/fam_norm", "block1/fam_norm"}
    for i in (0, 1):
        expected = output.memory_state[f"{i}/fam"].square().mean(-1).sqrt().mean()
        torch.testing.assert_close(output.memory_diagnostics[f"block{i}/fam_norm"], expected)
    upwards = attached(feedback="stack")(ids, memory_diagnostics=True)
    assert set(upwards.memory_diagnostics) == {"fam_norm"}


@pytest.mark.parametrize(
    "options",
    [{"num_tokens": -1}, {"past": 1.5}, {"feedback": "up"}, {"query": "static", "feedback": "stack"}, {"blocks": 3}],
)
def test_unusable_configurations_are_refused(options):
    host = tiny_host()
    with pytest.raises(ConfigError, match="transformer-fam"):
        mnemic.attach(host, "transformer-fam", segment=SEGMENT, **options)
    assert not mnemic.is_attached(host)


def test_past_and_vectors_must_fit_the_hosts_positions():
    with pytest.raises(ConfigError, match="needs 131 positions"):
        mnemic.attach(tiny_host(), "transformer-fam", segment=8, num_tokens=3, past=120)


def test_vectors_that_flow_upwards_are_a_concatenation_under_a_mask():
    """feedback="stack": [f ; block ; f], the last f sees the first and the block, at the block's last positions."""
    model, host, ids = attached(exact_host(), feedback="stack"), exact_host(), random_ids(2, 3 * SEGMENT)
    fam, logits = model.memory.first_tokens.expand(2, -1, -1), []
    places = torch.tensor([*range(NUMBER + SEGMENT), *range(SEGMENT, NUMBER + SEGMENT)])[None]
    size = 2 * NUMBER + SEGMENT
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    seen[:NUMBER, :NUMBER] = True
    seen[-NUMBER:] = torch.arange(size) < NUMBER + SEGMENT
    for part in ids.split(SEGMENT, dim=1):
        embeds = torch.cat([fam, host.get_input_embeddings()(part), fam], dim=1)
        hidden = host.model(
            inputs_embeds=embeds, attention_mask=seen[None, None].expand(2, 1, -1, -1), position_ids=places,
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        logits.append(host.lm_head(hidden[:, NUMBER:-NUMBER]))
        fam = hidden[:, -NUMBER:]
    output, expected = model(ids, use_cache=False), torch.cat(logits, dim=1)
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.memory_state["fam"], fam, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(x.square().mean(), model.memory.first_tokens)[0] for x in (output.logits, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_recall_at_the_trained_length_and_beyond():
    """The toy of RMT's card, 2 to 4 segments of 8 tokens, F = 4."""
    model = trained("transformer-fam", num_tokens=4, past=0)
    assert accuracy(model, 3) > 0.95
    assert accuracy(model, 12) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, 0])
def test_passkey(number):
    """The key in block 0, asked in block 5, blocks of 16 tokens; without vectors and past it is a guess among 8."""
    model = trained("transformer-fam", num_tokens=number, past=0, segment=16, width=64, law=(2, 6), steps=300)
    found = accuracy(model, 6)
    assert found > 0.9 if number else abs(found - 0.125) < 0.05
