"""GRC against loops in float64; torch's GRU cell; the layer as printed and its leak; what crosses segments."""

import math

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError
from mnemic.core.memory import HostSpec, Segment
from mnemic.core.step import AttentionCall, Step
from mnemic.memories.recurrent.cached_transformers import CachedTransformers, CachedTransformersConfig
from mnemic.ops.attention import attend
from mnemic.ops.gated_cache import GatedCache, GatedCacheAttention, resample
from tests.tiny import random_ids, tiny_host

WIDTH, HEADS, HEAD = 12, 3, 4
SEGMENT = 8
HOST = HostSpec(
    WIDTH, 1, 0.02, torch.float64, torch.device("cpu"), num_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD
)


def memory_alone(**options) -> CachedTransformers:
    torch.manual_seed(0)
    memory = CachedTransformers(CachedTransformersConfig(**options), HOST)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_(std=0.5)
    return memory


def loop_attention(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """(T, e) for one head, one score at a time."""
    rows = []
    for t, q in enumerate(query):
        seen = range(t + 1) if causal else range(len(keys))
        scores = torch.stack([torch.dot(q, keys[j]) / math.sqrt(HEAD) for j in seen])
        rows.append(sum(p * values[j] for p, j in zip(torch.softmax(scores, 0), seen, strict=True)))
    return torch.stack(rows)


def heads(x: Tensor, linear: torch.nn.Linear) -> Tensor:
    return (x @ linear.weight.T + linear.bias).view(len(x), HEADS, HEAD)


def averages(x: Tensor, length: int) -> Tensor:
    tokens = len(x)
    spans = [(i * tokens // length, math.ceil((i + 1) * tokens / length)) for i in range(length)]
    return torch.stack([x[a:b].sum(0) / (b - a) for a, b in spans])


def loop_update(cache: GatedCache, old: Tensor, new: Tensor) -> Tensor:
    """(M, D), token by token."""
    size, rows = cache.channels, []
    for c, x in zip(old, new, strict=True):
        gates = torch.sigmoid(cache.gates.weight @ torch.cat([x, c]) + cache.gates.bias)
        u, r = gates[:size], gates[size:]
        candidate = cache.candidate.weight @ torch.cat([x, r * c]) + cache.candidate.bias
        if cache.norm is not None:
            g = candidate * 0.5 * (1 + torch.erf(candidate / math.sqrt(2)))
            g = (g - g.mean()) / torch.sqrt(g.var(unbiased=False) + 1e-5)
            candidate = g * cache.norm.weight + cache.norm.bias
        rows.append((1 - u) * c + u * candidate)
    return torch.stack(rows)


def by_loops(memory: CachedTransformers, xs: list[Tensor], qkv: list[tuple]) -> tuple[list[Tensor], Tensor]:
    """Results of one layer's attention (B, T, H, e) for each segment, and the last cache (B, M, D)."""
    cache, size = memory._layer(0), memory.channels
    weight = (torch.tanh if memory.config.gate == "tanh" else torch.sigmoid)(memory.gate[0])
    batch = len(xs[0])
    states = [xs[0].new_zeros(memory.config.cache_length, size) for _ in range(batch)]
    results = []
    for s, (x, (q, k, v)) in enumerate(zip(xs, qkv, strict=True)):
        rows = []
        for b in range(batch):
            query, keys, values = (
                heads(x[b, :, :size], cache.query),
                *(heads(states[b], w) for w in (cache.key, cache.value)),
            )
            out = []
            for h in range(HEADS):
                own = loop_attention(q[b, h], k[b, h], v[b, h], causal=True)
                read = loop_attention(query[:, h], keys[:, h], values[:, h], causal=False)
                out.append(weight[h] * read + (1 - weight[h]) * own if s else own)
            rows.append(torch.stack(out, dim=1))
            states[b] = loop_update(cache, states[b], averages(x[b, :, :size], memory.config.cache_length))
        results.append(torch.stack(rows))
    return results, torch.stack(states)


def by_memory(memory: CachedTransformers, xs: list[Tensor], qkv: list[tuple]) -> tuple[list[Tensor], Tensor]:
    state, results = memory.initial_state(len(xs[0])), []
    for x, (q, k, v) in zip(xs, qkv, strict=True):
        step = Step.alone(memory, state=state, reads=memory.prepare(state))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        call = AttentionCall(
            q, k, v, None, HEAD**-0.5, k, v, None, torch.arange(x.shape[1])[None],
            lambda q, k, v, mask: attend(q, k, v, seen, HEAD**-0.5)[0].transpose(1, 2),  # noqa: B023 - called at once
        )  # fmt: skip
        results.append(memory.attention(call, step) if memory.before_attention(x, step) is x else x)
        state = memory.commit(state, Segment(step.frame.trace))
    return results, state["cache"][:, 0]


@pytest.mark.parametrize(
    "options",
    [{"cache_length": 3}, {"cache_length": 7, "gate": "tanh", "candidate": "normed", "ratio": 0.75}],
    ids=["printed", "released"],
)
def test_equals_loops_forward_and_backward(options):
    memory = memory_alone(**options)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)  # noqa: E731
    xs = [draw(2, 5, WIDTH) for _ in range(3)]
    qkv = [tuple(draw(2, HEADS, 5, HEAD) for _ in range(3)) for _ in range(3)]
    leaves = [*memory.parameters(), *xs, *(t for three in qkv for t in three)]
    grads = []
    for way in (by_memory, by_loops):
        results, cache = way(memory, xs, qkv)
        outcome = torch.cat([torch.stack(results).flatten(), cache.flatten()])
        loss = (outcome * torch.linspace(-1, 1, len(outcome), dtype=torch.float64)).sum()
        grads.append((outcome.detach(), torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=0, atol=1e-10)
    for mine, theirs in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)


def test_the_update_is_torchs_gru_cell_where_the_two_agree():
    """torch resets after the matrix, the paper before it: equal if that matrix is diagonal. u = 1 - z; torch's tanh is
    undone."""
    torch.manual_seed(0)
    size, diagonal = 6, torch.rand(6, dtype=torch.float64)
    cell, cache = torch.nn.GRUCell(size, size).double(), GatedCache(size, 1, size, dtype=torch.float64)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(0.5)
        cell.weight_hh[2 * size :] = diagonal.diag()
        cell.bias_hh[2 * size :] = 0
        (w_r, w_z, w_n), (v_r, v_z, v_n) = cell.weight_ih.split(size), cell.weight_hh.split(size)
        bias = (cell.bias_ih + cell.bias_hh).split(size)
        cache.gates.weight.copy_(torch.cat([torch.cat([-w_z, -v_z], 1), torch.cat([w_r, v_r], 1)]))
        cache.gates.bias.copy_(torch.cat([-bias[1], bias[0]]))
        cache.candidate.weight.copy_(torch.cat([w_n, v_n], 1))
        cache.candidate.bias.copy_(bias[2])
        x, h = torch.randn(2, 4, size, dtype=torch.float64) * 0.5
        kept = torch.sigmoid(x @ w_z.T + h @ v_z.T + bias[1])
        theirs = (cell(x, h) - kept * h) / (1 - kept)
        mine = (cache.update(h[None], x[None])[0] - kept * h) / (1 - kept)
    torch.testing.assert_close(mine, torch.atanh(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [3, 8, 11])
def test_padding_is_left_out_of_the_averages(length):
    torch.manual_seed(0)
    x = torch.randn(3, 9, 4, dtype=torch.float64)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1, 0, 1, 1, 0, 0, 1, 0, 0]]).bool()
    got = resample(x, length, mask)
    for row in range(3):
        torch.testing.assert_close(got[row], averages(x[row, mask[row]], length), rtol=0, atol=1e-12)
    torch.testing.assert_close(resample(x, length)[0], got[0], rtol=0, atol=1e-12)


def layer(**options) -> GatedCacheAttention:
    torch.manual_seed(0)
    return GatedCacheAttention(WIDTH, HEADS, 4, dtype=torch.float64, **options)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "as_printed"])
def test_the_layer_equals_loops(causal):
    own, x = layer(causal=causal), torch.randn(2, 2, 5, WIDTH, dtype=torch.float64)
    first, cache = own(x[0])
    second, after = own(x[1], cache)
    size, weight = own.cache.channels, torch.sigmoid(own.gate)
    for b in range(2):
        state = x.new_zeros(4, size)
        for s, got in enumerate((first, second)):
            q, k, v = (heads(x[s, b], _part(own.inputs, i)) for i in range(3))
            new = loop_update(own.cache, state, averages(x[s, b, :, :size], 4))
            read_from = state if causal else new
            asked, keys, values = (
                heads(t, w)
                for t, w in (
                    (x[s, b, :, :size], own.cache.query),
                    (read_from, own.cache.key),
                    (read_from, own.cache.value),
                )
            )
            out = []
            for h in range(HEADS):
                local = loop_attention(q[:, h], k[:, h], v[:, h], causal)
                read = loop_attention(asked[:, h], keys[:, h], values[:, h], causal=False)
                out.append(local if causal and not s else weight[h] * read + (1 - weight[h]) * local)
            expected = own.out(torch.stack(out, dim=1).flatten(1))
            torch.testing.assert_close(got[b], expected, rtol=0, atol=1e-10)
            state = new
        torch.testing.assert_close(after[b], state, rtol=0, atol=1e-10)


def _part(linear: torch.nn.Linear, i: int) -> torch.nn.Linear:
    part = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    part.weight, part.bias = (torch.nn.Parameter(t.detach().chunk(3)[i]) for t in (linear.weight, linear.bias))
    return part


def test_as_printed_tokens_see_their_future_and_causal_ones_do_not():
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    other = x.clone()
    other[:, 4] += 1
    for causal in (False, True):
        own = layer(causal=causal)
        cache = own(torch.randn(1, 6, WIDTH, dtype=torch.float64))[1]
        moved = (own(x, cache)[0] - own(other, cache)[0]).detach().abs().amax(-1)[0]
        assert (float(moved[:4].max()) == 0) is causal
        assert float(moved[4]) > 1e-4


def test_the_stored_cache_may_be_the_mean_of_a_batch():
    x = torch.randn(3, 6, WIDTH, dtype=torch.float64)
    _, mean = layer(batch_mean=True)(x)
    torch.testing.assert_close(mean, layer()(x)[1].mean(0, keepdim=True))
    assert not mean.requires_grad
    again, _ = layer(batch_mean=True)(x, mean)
    alone, _ = layer(batch_mean=True)(x[:1], mean)
    torch.testing.assert_close(again[:1], alone)


def test_padding_reaches_no_token_of_the_layer():
    own, x = layer(), torch.randn(2, 6, WIDTH, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    y, cache = own(x, mask=mask)
    for row in range(2):
        alone, own_cache = own(x[row : row + 1, mask[row]])
        torch.testing.assert_close(y[row, mask[row]], alone[0])
        torch.testing.assert_close(cache[row], own_cache[0])


def attached(host: str = "llama", **options):
    model = tiny_host(host)
    torch.manual_seed(1)
    return mnemic.attach(model, "cached-transformers", segment=SEGMENT, **{"cache_length": 4, **options})


def test_at_gate_zero_it_is_the_host():
    """Not only when new: whatever the cache holds, the closed gate keeps it out."""
    model, plain, ids = attached(preset="attach"), tiny_host(), random_ids(2, 3 * SEGMENT)
    with torch.no_grad():
        for parameter in model.memory.caches.parameters():
            parameter.normal_()
        expected = torch.cat([plain(part, use_cache=False).logits for part in ids.split(SEGMENT, dim=1)], dim=1)
        assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_the_state_has_one_size_and_rows_are_alone():
    model, ids = attached(preset="default"), random_ids(2, 5 * SEGMENT)
    with torch.no_grad():
        states = [model(ids[:, : n * SEGMENT]).memory_state for n in (1, 5)]
        both, alone = model(ids).logits, [model(row[None]).logits for row in ids]
    assert states[0]["cache"].shape == states[1]["cache"].shape == (2, 2, 4, 16)
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset, reached", [("default", True), ("paper", False)])
def test_the_papers_gradient_goes_back_one_segment_for_each_layer(preset, reached):
    model = attached(preset=preset)
    embeds = torch.randn(1, 4 * SEGMENT, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model(inputs_embeds=embeds).logits[:, -1].square().sum().backward()
    assert embeds.grad is not None
    felt = [bool(part.any()) for part in embeds.grad[0].split(SEGMENT)]
    assert felt == [reached, True, True, True]


@pytest.mark.parametrize(
    "options, message",
    [({"ratio": 0.3}, "no whole number"), ({"ratio": 0.0}, "no whole number"), ({"cache_length": 0}, "cache_length"),
     ({"gate": "relu"}, "gate"), ({"candidate": 1}, "candidate")],
)  # fmt: skip
def test_unusable_configurations_are_refused(options, message):
    host = tiny_host()
    with pytest.raises(ConfigError, match=message):
        mnemic.attach(host, "cached-transformers", segment=SEGMENT, **options)
    assert not mnemic.is_attached(host)


def test_unusable_layers_are_refused():
    with pytest.raises(ValueError, match="heads"):
        GatedCacheAttention(10, 3, 4)
    with pytest.raises(ValueError, match="whole number"):
        GatedCacheAttention(10, 2, 4, ratio=0.33)
