"""MemoryLLM: reading and injecting against a layer-wise concatenation, the dropping against its law, and a toy."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic.memories.retrieval.memoryllm import survivors
from mnemic.ops.rotary import rotate
from tests.tiny import random_ids, tiny_host

OPTIONS: dict[str, Any] = {"new_states": 3, "blocks": 3, "min_chunk": 8, "rank": 2, "dropout": 0.0, "alpha": 2.0}


def model(segment: int = 8, host: str = "llama", noise: float = 0.3, **options: Any) -> Any:
    """In float64, with weights large enough that every term shows."""
    torch.manual_seed(1)
    built = mnemic.attach(
        tiny_host(host), "memoryllm", preset="default", segment=segment, **{**OPTIONS, **options}
    ).double()
    with torch.no_grad():
        for p in built.memory.parameters():
            p += noise * torch.randn(p.shape, dtype=p.dtype)
    return built


def merged(built: Any, role: str) -> Any:
    """The host alone, with the adapters of one role added to its weights."""
    memory = built.memory
    weights = {n: t.clone() for n, t in built.state_dict().items() if not n.startswith("memory.")}
    plain = tiny_host("llama").double()
    for layer in range(len(plain.model.layers)):
        for name in memory.host.linears:
            adapters, key = getattr(memory, role), name.replace(".", "-")
            if adapters is not None:
                added = adapters.scale * adapters.down[key][layer] @ adapters.up[key][layer]
                weights[f"model.layers.{layer}.{name}.weight"] += added.T
    plain.load_state_dict({n: t.detach() for n, t in weights.items()})
    return plain


def concatenated(block: Any, rotary: Any, prefix: Tensor, x: Tensor, hidden: Tensor | None = None) -> Tensor:
    """One layer of Llama on [prefix ; text] (B, P + T, d): all of it is projected, only the text is kept."""
    joined = torch.cat([prefix, x], dim=1)
    batch, length, _ = joined.shape
    ahead, attention = prefix.shape[1], block.self_attn
    normed = block.input_layernorm(joined)
    split = lambda t: t.view(batch, length, -1, attention.head_dim).transpose(1, 2)  # noqa: E731
    q, k, v = (split(getattr(attention, f"{n}_proj")(normed)) for n in "qkv")
    cos, sin = rotary(joined, torch.arange(length)[None])
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    groups = q.shape[1] // k.shape[1]
    rows = []
    for t in range(ahead, length):
        heads = []
        for h in range(q.shape[1]):
            scores = (k[:, h // groups] @ q[:, h, t, :, None]).squeeze(-1) / math.sqrt(attention.head_dim)
            seen = torch.arange(length) <= t
            if hidden is not None:
                seen = seen & ~hidden
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            heads.append((weights[:, None] @ v[:, h // groups]).squeeze(1))
        rows.append(torch.cat(heads, dim=-1))
    x = x + attention.o_proj(torch.stack(rows, dim=1))
    return x + block.mlp(block.post_attention_layernorm(x))


def prefix_of(memory: Any, states: Tensor, layer: int) -> Tensor:
    """[bos ; states]; without a bos its place is held by a column that the caller hides."""
    first = states.new_zeros(1, states.shape[2]) if memory.bos is None else memory.bos[layer]
    return torch.cat([first.expand(len(states), -1, -1), states], dim=1)


def naive_logits(built: Any, pool: Tensor, ids: Tensor) -> Tensor:
    plain, memory = merged(built, "decoder"), built.memory
    x = plain.model.embed_tokens(ids)
    for layer, block in enumerate(plain.model.layers):
        prefix = prefix_of(memory, pool[:, layer], layer)
        hidden = torch.arange(prefix.shape[1] + ids.shape[1]) < (memory.bos is None)
        x = concatenated(block, plain.model.rotary_emb, prefix, x, hidden)
    return plain.lm_head(plain.model.norm(x))


def naive_deltas(built: Any, pool: Tensor, ids: Tensor, empty: bool = False) -> Tensor:
    plain, memory, new = merged(built, "encoder"), built.memory, built.memory.config.new_states
    x, found = plain.model.embed_tokens(ids), []
    for layer, block in enumerate(plain.model.layers):
        x = torch.cat([x[:, :-new], x[:, -new:] + memory.new_position], dim=1)
        prefix = prefix_of(memory, pool[:, layer, -new:], layer)
        column = torch.arange(prefix.shape[1] + ids.shape[1])
        hidden = column < (memory.bos is None)
        if empty:
            hidden = hidden | (column > 0) & (column <= new)
        x = concatenated(block, plain.model.rotary_emb, prefix, x, hidden)
        found.append(x[:, -new:])
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("options", [{}, {"bos": False}, {"rank": 0}], ids=["bos", "no-bos", "no-adapters"])
def test_reading_equals_concatenation(options):
    built = model(**options)
    ids, state = random_ids(2, 8), built.memory.initial_state(2)
    pool = torch.randn(state["pool"].shape, dtype=torch.float64, requires_grad=True)
    state = mnemic.State({**state, "pool": pool, "count": torch.ones(2, dtype=torch.int64)})
    leaves = [pool] + ([] if built.memory.bos is None else [built.memory.bos])
    results = [built(ids, memory_state=state, use_cache=False).logits, naive_logits(built, pool, ids)]
    weight = torch.randn(results[0].shape, dtype=torch.float64)
    grads = [torch.autograd.grad((r * weight).sum(), leaves) for r in results]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-8)


@pytest.mark.parametrize("new", [1, 3, 8])
@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty"])
def test_injecting_equals_concatenation(new, empty):
    built = model(new_states=new)
    memory, ids = built.memory, random_ids(2, 8)
    pool = torch.randn(memory.initial_state(2)["pool"].shape, dtype=torch.float64, requires_grad=True)
    state = mnemic.State({**memory.initial_state(2), "pool": pool, "count": torch.full((2,), 0 if empty else 4)})
    after = built(ids, memory_state=state, use_cache=False).memory_state
    delta, expected = after["pool"][:, :, -new:], naive_deltas(built, pool, ids, empty)
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-10)
    leaves = [memory.new_position, memory.bos] + ([] if empty else [pool])
    weight = torch.randn(delta.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((d * weight).sum(), leaves) for d in (delta, expected)]
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-8)


def test_the_pool_after_injections():
    built = model()
    ids, size, new = random_ids(1, 40), 9, 3
    before = built.memory.initial_state(1)
    with torch.no_grad():
        for t in range(5):
            part = ids[:, 8 * t : 8 * t + 8]
            after = built(part, memory_state=before, use_cache=False).memory_state
            delta = naive_deltas(built, before["pool"], part, empty=t == 0)
            pool = after["pool"]
            assert pool.shape == (1, 2, size, 32)
            assert after["count"].tolist() == [t + 1]
            torch.testing.assert_close(pool[:, :, -new:], delta, rtol=0, atol=1e-10)
            if t == 0:
                assert torch.equal(pool, pool[:, :, -new:].repeat(1, 1, 3, 1))
            else:
                kept = survivors(before["count"], 2, size, new)[0]
                for layer in range(2):
                    assert torch.equal(pool[0, layer, : size - new], before["pool"][0, layer, kept[layer]])
            before = after


@pytest.mark.parametrize("per_layer", [True, False])
def test_survival_follows_its_law(per_layer):
    size, new, seeds = 40, 4, 200
    tags = torch.arange(size).expand(seeds, 2, -1)
    for t in range(1, 21):
        kept = survivors(torch.full((seeds,), t), 2, size, new, torch.arange(seeds), per_layer)
        assert kept.shape == (seeds, 2, size - new)
        assert bool((kept.diff(dim=-1) > 0).all())
        tags = torch.cat([tags.gather(2, kept), torch.full((seeds, 2, new), -1)], dim=2)
        alive = (tags[..., None] == torch.arange(size)).any(2).double()
        for layer in range(2):
            law, share = (1 - new / size) ** t, alive[:, layer]
            error = float(share.mean(1).std()) / seeds**0.5
            assert abs(float(share.mean()) - law) < 3 * error + 1e-9
            # No place in the pool is safer than another: each alone within 4 sigma.
            assert (share.mean(0) - law).abs().max() < 4 * (law * (1 - law) / seeds) ** 0.5


def test_dropping_depends_on_seed_count_and_layer_alone():
    counts = torch.tensor([3, 1, 3, 70000])
    kept = survivors(counts, 3, 50, 10, seed=5)
    assert torch.equal(kept[0], kept[2])
    assert torch.equal(kept[3], survivors(counts[3:], 3, 50, 10, seed=torch.tensor([5]))[0])
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0, 0], kept[0, 1])
    assert not torch.equal(kept, survivors(counts, 3, 50, 10, seed=6))
    shared = survivors(counts, 3, 50, 10, seed=5, per_layer=False)
    assert torch.equal(shared[:, 0], shared[:, 2])


def test_rows_draw_their_own_dropping_in_training():
    memory = model(seed=7).memory
    assert memory.eval().initial_state(2)["seed"].tolist() == [7, 7]
    torch.manual_seed(0)
    first, second = memory.train().initial_state(2)["seed"].tolist()
    assert first != second
    torch.manual_seed(0)
    assert memory.initial_state(2)["seed"].tolist() == [first, second]
    assert model(redraw=False).train().memory.initial_state(2)["seed"].tolist() == [0, 0]


def test_injecting_leaves_no_graph_and_the_weights_alone():
    built = model().eval()
    weights = {n: t.clone() for n, t in built.state_dict().items()}
    stream = built.stream().feed(random_ids(1, 20))
    assert not stream.state["pool"].requires_grad
    assert all(torch.equal(t, weights[n]) for n, t in built.state_dict().items())
    built.train()
    state = built(random_ids(1, 8), use_cache=False).memory_state
    state["pool"].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in built.memory.encoder.parameters())
    assert all(p.grad is None for p in built.memory.decoder.parameters())


def test_without_bos_the_first_segment_is_the_host():
    plain = tiny_host("llama")
    built = mnemic.attach(copy.deepcopy(plain), "memoryllm", segment=8, **{**OPTIONS, "bos": False})
    ids = random_ids(1, 16)
    with torch.no_grad():
        got, expected = built(ids, use_cache=False).logits, plain(ids[:, :8], use_cache=False).logits
        later = plain(ids[:, 8:], use_cache=False).logits
    torch.testing.assert_close(got[:, :8], expected, rtol=0, atol=1e-5)
    assert (got[:, 8:] - later).abs().max() > 1e-2


def test_dropout_acts_in_training_only():
    built = model(dropout=0.5)
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(built(ids, use_cache=False).logits, built(ids, use_cache=False).logits)
        built.train()
        assert not torch.equal(built(ids, use_cache=False).logits, built(ids, use_cache=False).logits)


def test_segments_that_cannot_be_injected_are_refused():
    with pytest.raises(mnemic.ConfigError, match="min_chunk = 16"):
        mnemic.attach(tiny_host(), "memoryllm", segment=8, new_states=4, blocks=2)
    with pytest.raises(mnemic.ConfigError, match="new_states"):
        mnemic.attach(tiny_host(), "memoryllm", segment=16, new_states=17, blocks=2)
    with pytest.raises(mnemic.ConfigError, match="positions"):
        mnemic.attach(tiny_host(), "memoryllm", segment=16, new_states=16, blocks=16)
