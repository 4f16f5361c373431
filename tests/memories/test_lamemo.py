"""LaMemo: against a plain model that follows the card token by token, exactness, causality, cost, Transformer-XL."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import mnemic
from mnemic import ConfigError
from mnemic.ops.relative_shift import distances
from mnemic.ops.rotary import rotate
from tests.memories.bracket_text import VOCABULARY, bracket_text
from tests.memories.exact_host import exact_host
from tests.tiny import random_ids, tiny_host

SEGMENT = 5


def attached(host: Any = None, segment: int = SEGMENT, **options: Any) -> Any:
    """LaMemo on a tiny host, its own weights (those of relative positions) moved."""
    model = mnemic.attach(tiny_host() if host is None else host, "lamemo", segment=segment, **options)
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=make, dtype=parameter.dtype))
    return model


# The card on llama's own modules: one row, one query at a time


def heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(0, 1)


def attend(
    host: Any, memory: Any, i: int, query: Tensor, place: int, keys: Tensor, values: Tensor, places: list[int]
) -> tuple[Tensor, Tensor]:
    """One query (H, e) over keys and values (Hkv, n, e): the result (H, e) and the logs of the denominators (H,)."""
    groups, width = query.shape[0] // keys.shape[0], query.shape[1]
    cos, sin = host.model.rotary_emb(query, torch.tensor([[place, *places]]))
    # R of the distances 0, 1, ...
    table = distances(32, host.config.hidden_size, dtype=query.dtype).flip(0)
    rows, totals = [], []
    for h in range(query.shape[0]):
        q, k, v = query[h], keys[h // groups], values[h // groups]
        if memory.relative:
            apart = table[[abs(place - j) for j in places]] @ memory.position_weight[i, :, h]
            sides = torch.stack([memory.left_bias[i, h] if j <= place else memory.right_bias[i, h] for j in places])
            scores = k @ (q + memory.content_bias[i, h]) + ((q + sides) * apart).sum(-1)
        else:
            turned = rotate(torch.cat([q[None], k])[None, None], cos, sin)[0, 0]
            scores = turned[1:] @ turned[0]
        scores = scores / width**0.5
        rows.append(torch.softmax(scores, dim=0) @ v)
        totals.append(scores.exp().sum().log())
    return torch.stack(rows), torch.stack(totals)


def naive(host: Any, memory: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    length, width, layers, logits = memory.config.memory_length, host.config.head_dim, host.model.layers, []
    stored: list[Tensor] = []
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    for part in ids.split(SEGMENT):
        x, n = host.get_input_embeddings()(part), len(stored)
        m = torch.stack(stored).detach() if n else x[:0]
        below, after = x, []
        for i, layer in enumerate(layers):
            z, attention = layer.input_layernorm(torch.cat([m, x])), layer.self_attn
            q, k, v = (heads(p(z), width) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            places = list(range(length - n, length + len(x)))
            ask = lambda at, of, i=i, q=q, k=k, v=v, places=places: attend(  # noqa: E731
                host, memory, i, q[:, at], places[at], k[:, of], v[:, of], [places[j] for j in of]
            )
            found = []
            for at in range(n):
                old, old_total = (t.detach() for t in seen[i][at])
                # The first of the last N - 1 remembered tokens, and the first token of the segment behind them.
                right = [j for j in range(max(at + 1, n - SEGMENT + 1), n)] + [n]
                if memory.config.look_ahead:
                    new, total = ask(at, right)
                    total = torch.logaddexp(old_total, total.detach())
                    share = (old_total - total).exp()[:, None]
                    found.append((share * old + (1 - share) * new, total))
                else:
                    found.append((old, old_total))
            found += [ask(n + t, list(range(n + t + 1))) for t in range(len(x))]
            both = torch.cat([m, x]) + attention.o_proj(torch.stack([c.flatten() for c, _ in found]))
            both = both + layer.mlp(layer.post_attention_layernorm(both))
            m, x = both[:n], both[n:]
            after.append(found[-length:])
        logits.append(host.lm_head(host.model.norm(x)))
        if len(part) == SEGMENT:
            stored, seen = [*stored, *below][-length:], after
    state = {"hidden": torch.stack(stored)}
    for i, found in enumerate(seen):
        state[f"{i}/context"] = torch.stack([c for c, _ in found])
        state[f"{i}/lse"] = torch.stack([s for _, s in found])
    return torch.cat(logits), state


@pytest.mark.parametrize("tokens", [SEGMENT, 3 * SEGMENT + 2])
@pytest.mark.parametrize("positions", ["host", "relative"])
@pytest.mark.parametrize("length", [3, 12], ids=["shorter", "longer"])
def test_equals_the_card(length, positions, tokens):
    model = attached(exact_host(), memory_length=length, positions=positions)
    host, ids, grads = exact_host(), random_ids(2, tokens), []
    output = model(ids, use_cache=False)
    rows = [naive(host, model.memory, row) for row in ids]
    expected = torch.stack([logits for logits, _ in rows])
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-10)
    for name in rows[0][1]:
        after = torch.stack([state[name] for _, state in rows])
        torch.testing.assert_close(output.memory_state[name][:, -after.shape[1] :], after, rtol=0, atol=1e-10)
    names, own = zip(*model.memory.named_parameters(), strict=True) if positions == "relative" else ((), ())
    for one, logits in ((model, output.logits), (host, expected)):
        weights = [p for n, p in one.named_parameters() if not n.startswith("memory.")]
        grads.append(
            torch.autograd.grad(logits.square().mean(), [*own, *weights], allow_unused=True, materialize_grads=True)
        )
    for i, (fast, slow) in enumerate(zip(*grads, strict=True)):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)
        # In a first segment there is nothing to look ahead from.
        assert bool(fast.any()) or (tokens == SEGMENT and names[i] == "right_bias")


def test_a_refreshed_result_is_attention_over_both_sides():
    """One layer, weights at rest: tokens of earlier segments have seen all up to the last segment's first token, in
    two refreshes or one."""
    host = tiny_host(num_hidden_layers=1).double()
    ids, count = random_ids(2, 3 * SEGMENT), 3 * SEGMENT
    layer, width = host.model.layers[0], host.config.head_dim
    with torch.no_grad():
        z = layer.input_layernorm(host.get_input_embeddings()(ids))
        q, k, v = (p(z).unflatten(-1, (-1, width)).transpose(1, 2) for p in (
            layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
        ))  # fmt: skip
        turned = host.model.rotary_emb(z, torch.arange(count)[None])
        q, k = rotate(q, *turned), rotate(k, *turned).repeat_interleave(2, 1)
        at = torch.arange(count)
        reach = torch.where(at < 2 * SEGMENT, torch.tensor(2 * SEGMENT), at)
        scores = (q @ k.mT / width**0.5).masked_fill(at > reach[:, None], float("-inf"))
        expected, total = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2), scores.logsumexp(-1)
        state = attached(host, memory_length=count)(ids).memory_state
    torch.testing.assert_close(state["0/context"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(state["0/lse"], total.transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["host", "relative"])
def test_without_looking_ahead_it_is_transformer_xl(positions):
    ids, options = random_ids(2, 4 * SEGMENT + 2), {"memory_length": 12, "positions": positions}
    model = attached(look_ahead=False, **options)
    other = mnemic.attach(tiny_host(), "transformer-xl", segment=SEGMENT, memory_lengths=12, positions=positions)
    with torch.no_grad():
        if positions == "relative":
            other.memory.position_weight.copy_(model.memory.position_weight)
            other.memory.content_bias.copy_(model.memory.content_bias)
            other.memory.position_bias.copy_(model.memory.left_bias)
        got = model(ids).logits
        torch.testing.assert_close(got, other(ids).logits, rtol=0, atol=1e-5)
        ahead = attached(**options)(ids).logits
    assert float((got - ahead)[:, SEGMENT:].abs().max()) > 1e-3


@pytest.mark.parametrize("positions", ["host", "relative"])
def test_a_token_changes_nothing_before_it(positions):
    """Every token of three segments; the first of a segment is what the memory looks at."""
    model, ids = attached(memory_length=12, positions=positions), random_ids(1, 3 * SEGMENT)
    others = ids.repeat(3 * SEGMENT, 1)
    others.diagonal().copy_((ids[0] + 1) % 58 + 3)
    with torch.no_grad():
        difference = (model(others).logits - model(ids.expand_as(others)).logits).abs().amax(-1)
    for place, row in enumerate(difference):
        assert not bool(row[:place].any())
        assert float(row[place]) > 1e-4


@pytest.mark.parametrize("positions", ["host", "relative"])
def test_cost_is_linear_in_the_memory(positions):
    """Counted operations of a segment: what 1024 more tokens of memory cost is twice what 512 do."""

    def operations(length: int) -> int:
        host = tiny_host(num_hidden_layers=1, max_position_embeddings=4096)
        model, ids = attached(host, segment=64, memory_length=length, positions=positions), random_ids(1, 64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)
        return counter.get_total_flops()

    small, middle, large = operations(512), operations(1024), operations(2048)
    assert (large - middle) / (middle - small) == pytest.approx(2, abs=0.05)


def test_nothing_is_carried_but_numbers():
    model, ids = attached(memory_length=8), random_ids(2, 2 * SEGMENT)
    output = model(ids)
    assert not any(t.requires_grad for t in output.memory_state.values())
    assert output.memory_state["count"].tolist() == [2 * SEGMENT] * 2


def test_an_open_segment_is_forgotten_where_only_the_state_is_kept():
    model, ids = attached(memory_length=12), random_ids(2, 4 * SEGMENT)
    with torch.no_grad():
        expected = model(ids).logits[:, 2 * SEGMENT :]
        opened = model(torch.cat([ids[:, : 2 * SEGMENT], ids[:, :3]], dim=1)).memory_state
        torch.testing.assert_close(
            model(ids[:, 2 * SEGMENT :], memory_state=opened).logits, expected, rtol=0, atol=1e-5
        )


def test_diagnostics_are_what_the_refresh_has_brought():
    model, ids = attached(memory_length=8), random_ids(2, 3 * SEGMENT)
    found = model(ids, memory_diagnostics=True).memory_diagnostics
    assert set(found) == {"block0/refreshed", "block1/refreshed"}
    assert all(0 < float(value) < 1 for value in found.values())
    assert attached(memory_length=8, look_ahead=False)(ids, memory_diagnostics=True).memory_diagnostics == {}


@pytest.mark.parametrize("options", [{"memory_length": 0}, {"look_ahead": 1}, {"positions": "shaw"}, {"alpha": 0.5}])
def test_unusable_configurations_are_refused(options):
    host = tiny_host()
    with pytest.raises(ConfigError, match="lamemo"):
        mnemic.attach(host, "lamemo", segment=SEGMENT, **options)
    assert not mnemic.is_attached(host)


def test_memory_and_segment_must_fit_the_hosts_positions():
    with pytest.raises(ConfigError, match="needs 132 positions"):
        mnemic.attach(tiny_host(), "lamemo", segment=12, memory_length=120)


def bits(memory: str, steps: int = 200, **options: Any) -> float:
    """Bits a token over test text, after training 4 layers of width 64 on segments of 32 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=256, initializer_range=0.05,
    )  # fmt: skip
    model = mnemic.attach(config, memory, segment=32, **options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    make = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * max(0.1, 1 - step / steps)
        ids = bracket_text(8, 160, make)
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    test = bracket_text(128, 160, 77)
    with torch.no_grad():
        return float(model.eval()(test, labels=test, use_cache=False).loss) / math.log(2)


@pytest.mark.slow
def test_text_with_brackets_is_read_as_well_as_by_transformer_xl():
    """Brackets that close more than a segment later."""
    found = bits("lamemo", memory_length=32)
    older = bits("transformer-xl", memory_lengths=32)
    assert found < older + 0.01
    assert max(found, older) < bits("none") - 0.01
