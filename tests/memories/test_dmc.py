"""DMC: reading and training against loops over tokens and slots, the cache's counts, and the stages of retrofitting."""

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic.core.step import AttentionCall, Step
from mnemic.memories.cache.dmc import DMC
from mnemic.ops import cache_merging
from mnemic.ops.rotary import rotate
from mnemic.training.retrofit import Retrofit
from tests.contract.cases import checkpointing, chunked, parallel
from tests.tiny import random_ids, tiny_host


def model(host: str = "llama", **options: Any) -> Any:
    """In float64; with an offset of 0 about half of the tokens merge, with a negative one nearly all."""
    options = {"preset": "default", "offset": 0.0, "noise": False, "compression": 2.0, **options}
    return mnemic.attach(tiny_host(host), "dmc", segment=8, **options).double().eval()


def turned(x: Tensor, cos: Tensor, sin: Tensor, place: int, fade: float) -> Tensor:
    """One vector at one place, its last dimension faded before and behind the rotation."""
    last = torch.ones_like(x)
    last[-1] = fade
    return rotate((x * last)[None, None, None], cos[:, place : place + 1], sin[:, place : place + 1])[0, 0, 0] * last


def loops(built: Any, ids: Tensor, relaxed: bool = False, fade: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    """Logits of a Llama or Mistral, row by row, head by head, token by token; and the logits of merging per layer."""
    config, memory = built.config, built.memory.config
    window, stack = getattr(config, "sliding_window", None), built.model
    x, found = stack.embed_tokens(ids), []
    cos, sin = stack.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for block in stack.layers:
        attention = block.self_attn
        source = block.input_layernorm(x)
        split = lambda t: t.unflatten(-1, (-1, 8)).transpose(1, 2)  # noqa: E731
        q, k, v = (split(getattr(attention, f"{n}_proj")(source)) for n in "qkv")
        groups = q.shape[1] // k.shape[1]
        logits = k[..., -1] - memory.offset
        found.append(logits)
        rows = []
        for b in range(ids.shape[0]):
            heads = []
            for g in range(k.shape[1]):
                importance = q[b, g * groups : (g + 1) * groups, :, -1].mean(0)
                weights = torch.sigmoid(importance + 5) + torch.finfo(torch.bfloat16).eps
                given = (k[b, g], v[b, g], weights)
                if relaxed:
                    columns = cache_merging.naive_relaxed(*given, torch.sigmoid(logits[b, g] / memory.tau))
                    slots = None
                else:
                    columns = None
                    slots = cache_merging.naive(*given, logits[b, g], split_long_runs=memory.split_long_runs)
                for h in range(g * groups, (g + 1) * groups):
                    out = []
                    for t in range(ids.shape[1]):
                        query = turned(q[b, h, t], cos, sin, t, fade)
                        if columns is None:
                            assert slots is not None
                            seen = [(key, value, p, 0.0) for key, value, p in slots[t]]
                        else:
                            seen = [
                                (columns.keys[j], columns.values[j], j, columns.hidden[j] if j < t else 0.0)
                                for j in range(t + 1)
                            ]
                        seen = [one for one in seen if window is None or t - one[2] < window]
                        scores = [
                            query @ turned(key, cos, sin, p, fade) / math.sqrt(8) + added for key, _, p, added in seen
                        ]
                        shares = torch.stack(scores).softmax(0)
                        out.append(sum(s * value for s, (_, value, _, _) in zip(shares, seen, strict=True)))
                    heads.append(torch.stack(out))
            rows.append(torch.cat(heads, -1))
        x = x + attention.o_proj(torch.stack(rows))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return built.lm_head(stack.norm(x)), found


def runs(logits: Tensor) -> list[int]:
    """Tokens merged in a row after each one that opens a slot, of logits (..., T) of whole streams."""
    heads = (logits[..., 1:] > 0).flatten(0, -2).int().tolist()
    return [len(run) for head in heads for run in "".join(map(str, head)).split("0")]


CASES = {
    "half": {"offset": 0.0},
    "long-runs": {"offset": -1.5},
    "split": {"offset": -1.5, "split_long_runs": True},
    "none": {"offset": 5.0},
}


@pytest.mark.parametrize("host", ["llama", "mistral"])
@pytest.mark.parametrize("case", CASES)
def test_reading_equals_loops(case, host):
    built = model(host, **CASES[case])
    ids = random_ids(1, 18)
    got, (expected, found) = built(ids, use_cache=False).logits, loops(built, ids)
    longest = max(runs(torch.stack(found)))
    assert {"half": longest >= 1, "none": longest == 0}.get(case, longest > 12)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    pick = torch.randn(got.shape, dtype=torch.float64)
    weights = [p for n, p in built.named_parameters() if "proj" in n]
    grads = [torch.autograd.grad((r * pick).sum(), weights) for r in (got, expected)]
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-8)
    for chunks in ([1] * 18, [7, 1, 8, 1, 1]):
        torch.testing.assert_close(chunked(built, ids, chunks)[0], expected.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("host", ["llama", "mistral"])
def test_training_equals_loops(host):
    built = model(host, tau=1.0).train()
    ids = random_ids(2, 9)
    output, (expected, found) = built(ids, labels=ids, use_cache=False), loops(built, ids, relaxed=True)
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-10)
    decided = cache_merging.straight_through(torch.stack(found, 1))
    decided = torch.cat([torch.zeros_like(decided[..., :1]), decided[..., 1:]], -1)
    loss = cache_merging.auxiliary_loss(decided, 2.0)
    assert 0 < float(loss.detach()) < 0.5
    torch.testing.assert_close(output.memory_loss, loss, rtol=0, atol=1e-12)
    pick = torch.randn(expected.shape, dtype=torch.float64)
    weights = [p for n, p in built.named_parameters() if "proj" in n]
    totals = [(output.logits * pick).sum() + output.memory_loss, (expected * pick).sum() + loss]
    for fast, slow in zip(*(torch.autograd.grad(t, weights) for t in totals), strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-8)


def test_padded_rows_count_their_own_tokens_in_the_loss():
    built = model(compression=8.0).train()
    ids, mask = random_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    both = built(ids, attention_mask=mask, use_cache=False).memory_loss
    alone = [built(row[None], use_cache=False).memory_loss for row in (ids[0], ids[1, :9])]
    torch.testing.assert_close(both, torch.stack(alone).mean(), rtol=0, atol=1e-12)


# Stages


def test_a_faded_dimension():
    built = model(intact=True)
    ids = random_ids(1, 12)
    with torch.no_grad():
        host = tiny_host().double()(ids, use_cache=False).logits
        for training in (False, True):
            built.train(training)
            torch.testing.assert_close(parallel(built, ids).logits, host, rtol=0, atol=1e-12)
        built.memory.config = built.memory.config.replace(offset=1e9)
        for fade in (0.5, 0.0):
            built.memory.schedule(fade, False, 0.0)
            expected = loops(built, ids, fade=fade)[0]
            for training in (False, True):
                built.train(training)
                torch.testing.assert_close(parallel(built, ids).logits, expected, rtol=0, atol=1e-10)


def test_nothing_merges_before_its_stage():
    built = model(intact=True, offset=-100.0)
    stream = built.stream().feed(random_ids(1, 20))
    assert built.memory.report(stream.cache.buffers).ratio == 1
    built.memory.schedule(0.0, True, 0.0)
    assert built.memory.report(built.stream().feed(random_ids(1, 20)).cache.buffers).ratio == 20


def test_where_nothing_merges_gpt2_is_itself_without_the_dimension():
    host: Any = tiny_host("gpt2").double()
    with torch.no_grad():
        for block in host.transformer.h:
            for part in range(2):
                block.attn.c_attn.weight[:, part * 32 + 7 : part * 32 + 32 : 8] = 0
                block.attn.c_attn.bias[part * 32 + 7 : part * 32 + 32 : 8] = 0
        ids = random_ids(2, 20)
        expected = host(ids, use_cache=False).logits
    built = model("gpt2", offset=1e9)
    torch.testing.assert_close(parallel(built, ids).logits, expected, rtol=0, atol=1e-12)
    logits, cache = chunked(built, ids, [1, 12, 7])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    report = built.memory.report(cache.buffers)
    assert (report.tokens, report.slots, report.ratio, report.longest_run) == (320, 320, 1, 1)


def test_retrofit_moves_the_stages():
    memory = model(intact=True, compression=3.0).memory
    stages = Retrofit(ramp=10, freeing=5)
    seen = []
    for step in (0, 2, 4, 5, 10, 15, 99):
        stages.apply(memory, step)
        seen.append((float(memory.fade), float(memory.merging), float(memory.progress)))
    assert seen == [(1, 0, 0), (0.5, 0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 0.5), (0, 1, 1), (0, 1, 1)]
    with pytest.raises(mnemic.ConfigError, match="dmc"):
        stages.on_step_begin(None, SimpleNamespace(global_step=0), None, model=tiny_host())
    with pytest.raises(mnemic.ConfigError, match="ramp"):
        Retrofit(ramp=0)


def test_the_ramp_sets_what_the_loss_asks_for():
    built = model(offset=1e9, compression=4.0).train()
    for progress, missing in ((0.0, 0.0), (1 / 3, 0.5), (1.0, 0.75)):
        built.memory.schedule(0.0, True, progress)
        loss = float(built(random_ids(1, 9), use_cache=False).memory_loss.detach())
        assert loss == pytest.approx(missing, abs=1e-6)


def test_stages_are_saved(tmp_path):
    built = mnemic.attach(tiny_host(), "dmc", segment=8)
    built.memory.schedule(0.25, True, 0.5)
    mnemic.save(built, tmp_path / "model")
    memory = mnemic.load(tmp_path / "model", host=tiny_host()).memory
    assert (float(memory.fade), float(memory.merging), float(memory.progress)) == (0.25, 1, 0.5)


# The cache


def test_counts_are_exact():
    built = model()
    rows = [random_ids(1, n, seed=n) for n in (70, 21)]
    stream = built.stream(2).feed([r[0].tolist() for r in rows])
    with torch.no_grad():
        logits = [torch.stack(loops(built, r[:, :24])[1]) for r in rows]
    short = built.stream(2).feed([r[0, :24].tolist() for r in rows])
    report = built.memory.report(short.cache.buffers)
    pairs = 2 * 2 * (24 + 21)
    assert report.tokens == pairs
    assert report.slots == pairs - sum(int((one[..., 1:] > 0).sum()) for one in logits)
    assert report.ratio == Fraction(report.tokens, report.slots)
    assert report.used_bytes == report.slots * (8 + 8 + 1) * 8
    # Two layers of 2 rows, 2 heads and 64 slots at first.
    assert report.capacity_bytes == 2 * 2 * 2 * 64 * (8 + 8 + 1) * 8
    assert report.recent_bytes == 2 * 2 * 2 * 11 * (8 + 8 + 1) * 8
    assert report.longest_run == 1 + max(n for one in logits for n in runs(one))
    assert built.memory.report(stream.cache.buffers).tokens == 2 * 2 * 91
    assert built.memory.report({}).ratio == 1


def test_streams_of_different_capacity_are_joined():
    built = model(offset=0.7)
    parts, after = [random_ids(1, n, seed=n) for n in (110, 5)], random_ids(2, 9, seed=1)
    joined = mnemic.Stream.cat([built.stream().feed(p) for p in parts])
    assert joined.cache.buffers["0/keys"].shape[2] > 64
    logits = joined.feed(after, return_logits=True)
    for i, part in enumerate(parts):
        whole = parallel(built, torch.cat([part, after[i : i + 1]], 1)).logits[:, -9:]
        torch.testing.assert_close(logits[i : i + 1], whole, rtol=0, atol=1e-10)


def test_gradients_within_a_call_of_a_stream():
    """A call under autograd gives the gradients of its own tokens; what was kept before is constant."""
    built, ids = model(), random_ids(1, 14)
    cache = chunked(built, ids[:, :9], [9])[1]
    embeds = built.get_input_embeddings()(ids[:, 9:]).detach().requires_grad_()
    logits = built(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits
    whole = built.get_input_embeddings()(ids).detach().requires_grad_()
    expected = built(inputs_embeds=whole, use_cache=False).logits[:, 9:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    got, full = torch.autograd.grad(logits.sum(), embeds)[0], torch.autograd.grad(expected.sum(), whole)[0][:, 9:]
    torch.testing.assert_close(got, full, rtol=0, atol=1e-8)


def test_noise_is_replayed_by_checkpointing():
    built, ids = model(noise=True).train(), random_ids(2, 12)
    results = []
    for replayed in (False, True):
        checkpointing(built, replayed)
        built.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        loss = built(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in built.parameters()]))
    (loss, grads), (again, same) = results
    assert torch.equal(loss, again)
    for mine, theirs in zip(grads, same, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    torch.manual_seed(6)
    assert not torch.equal(built(ids, labels=ids).loss.detach(), loss)


def test_chunked_attention_is_refused():
    memory = model().memory
    assert isinstance(memory, DMC)
    host = SimpleNamespace(span=lambda layer: ("chunked_attention", 4))
    x = torch.zeros(1, 2, 3, 8, dtype=torch.float64)
    call = AttentionCall(x, x, x, None, 1.0, x, x, None, torch.arange(3)[None], lambda q, *_: q)
    with pytest.raises(mnemic.HostError, match="chunked_attention"):
        memory.attention(call, Step.alone(memory, host=host, places=torch.arange(3)[None]))
