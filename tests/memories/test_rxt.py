"""RxT against loops over heads, slots and tokens in float64, forward and backward; its gates; a toy dialogue."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError
from mnemic.core.memory import Segment
from mnemic.core.state import State
from mnemic.core.step import Step
from mnemic.hosts.anatomy import host_spec
from mnemic.memories.recurrent.rxt import RxT, RxTConfig
from tests.tiny import random_ids, tiny_host

HEADS, SLOTS, TOKENS, LAYERS, WIDTH = 4, 3, 4, 2, 32


def memory(**options) -> RxT:
    """In float64, with every parameter at random."""
    host = host_spec(tiny_host().double())
    torch.manual_seed(0)
    made = RxT(RxTConfig(num_slots=SLOTS, num_heads=HEADS, **options), host)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()


def turn(x: Tensor, place: int) -> Tensor:
    """A vector of even width e turned pair by pair, i and i + e / 2."""
    e, out = len(x), x.clone()
    for i in range(e // 2):
        angle = place * 10000.0 ** (-2 * i / e)
        a, b = x[i], x[i + e // 2]
        out[i], out[i + e // 2] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def loop_attention(
    queries: Tensor, rows: Tensor, w: list[Tensor], query_places=None, key_places=None, mask: Tensor | None = None
) -> Tensor:
    """(n, d) attends to (m, d) with W_q, W_k, W_v, W_o, one score at a time."""
    q, k, v = queries @ w[0], rows @ w[1], rows @ w[2]
    e, found = WIDTH // HEADS, torch.zeros_like(q)
    for h in range(HEADS):
        part = slice(h * e, (h + 1) * e)
        for i in range(len(q)):
            query = q[i, part] if query_places is None else turn(q[i, part], query_places[i])
            scores = []
            for j in range(len(k)):
                key = k[j, part] if key_places is None else turn(k[j, part], key_places[j])
                hidden = mask is not None and not bool(mask[j])
                scores.append(query.new_tensor(float("-inf")) if hidden else query @ key / math.sqrt(e))
            found[i, part] = torch.stack(scores).softmax(0) @ v[:, part]
    return found @ w[3]


def weights(attention, layer: int) -> list[Tensor]:
    return [getattr(attention, n).weight[layer] for n in ("query", "key", "value", "out")]


def loop_gate(gate, layer: int, old: Tensor, new: Tensor) -> Tensor:
    out, status = [], (old + new).mean(-1)
    for s in range(len(old)):
        if gate.bias is None:
            out.append(old[s] + new[s])
            continue
        score = gate.bias[layer, s]
        if gate.kind == "elementwise":
            score = score * status[s]
        if gate.kind == "linear":
            score = score + (gate.weight[layer, s] * status).sum()
        if gate.residual == "sigmoid":
            g = 1 / (1 + torch.exp(-score))
            out.append((1 - g) * old[s] + g * new[s])
        else:
            g = torch.tanh(score)
            out.append((1 - g) * old[s] + (1 + g) * new[s])
    return torch.stack(out)


def loop_update(m: RxT, slots: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
    rows = []
    for b in range(len(slots)):
        blocks = []
        for layer in range(LAYERS):
            s = slots[b, layer]
            if m.mix is not None:
                mean = (slots[b, 0] + slots[b, 1]) / LAYERS
                source = s if m.config.mixing == "self" else mean
                if m.share is not None:
                    g = torch.sigmoid(m.share[layer])
                    source = g * s + (1 - g) * mean
                read = loop_attention(
                    torch.stack([unit(x) for x in s]), torch.stack([unit(x) for x in source]), weights(m.mix, layer)
                )
                s = loop_gate(m.mix_gate, layer, s, read)
            update = loop_attention(
                torch.stack([unit(x) for x in s]),
                torch.stack([unit(x) for x in hidden[b, layer]]),
                weights(m.update, layer),
                key_places=range(TOKENS),
                mask=None if mask is None else mask[b],
            )
            blocks.append(loop_gate(m.update_gate, layer, s, update))
        rows.append(torch.stack(blocks))
    return torch.stack(rows)


WAYS = {
    "default": {},
    "apart": {"mixing": "none"},
    "self": {"mixing": "self", "residual": "tanh"},
    "gated": {"mixing": "gated", "gate": "linear"},
    "elementwise": {"gate": "elementwise", "residual": "tanh"},
    "linear": {"gate": "linear", "residual": "tanh", "mixing": "self"},
    "no_gate": {"residual": "none"},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_writes_as_the_equations_say(options):
    m = memory(**options)
    slots = torch.randn(2, LAYERS, SLOTS, WIDTH, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, LAYERS, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, True, False, False]]) if "gate" in options else None
    trace = {layer: {"hidden": hidden[:, layer]} for layer in range(LAYERS)}
    mine = m.commit(State({"slots": slots}), Segment(trace, mask=mask))["slots"]
    theirs = loop_update(m, slots, hidden, mask)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    given = [slots, hidden, *(p for n, p in m.named_parameters() if not n.startswith(("read.", "scale")))]
    grads = [torch.autograd.grad(out.square().mean(), given) for out in (mine, theirs)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


def test_reads_as_the_equations_say():
    m = memory()
    slots = torch.randn(2, LAYERS, SLOTS, WIDTH, dtype=torch.float64, requires_grad=True)
    x, source = torch.randn(2, 2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([[8, 9, 10, 11], [13, 14, 15, 16]])
    for layer in range(LAYERS):
        reads = m.prepare(State({"slots": slots}))
        mine = m.residual(x, source, Step.alone(m, layer, reads=reads, places=places, segment=8))
        rows = []
        for b in range(2):
            stm = torch.stack([unit(s) for s in slots[b, layer]])
            at = [int(p) % 8 for p in places[b]]
            read = loop_attention(source[b], stm, weights(m.read, layer), query_places=at)
            rows.append(x[b] + torch.tanh(m.scale[layer]) * read)
        theirs = torch.stack(rows)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        given = [slots, x, source, m.scale, *weights(m.read, layer)]
        grads = [torch.autograd.grad(out.square().mean(), given) for out in (mine, theirs)]
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


def test_a_gate_between_0_and_1_keeps_slots_between_old_and_new():
    m = memory(mixing="none")
    old, new = torch.randn(2, 3, LAYERS, SLOTS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        after = m.update_gate(old, new)
        assert bool((after >= torch.minimum(old, new)).all() and (after <= torch.maximum(old, new)).all())
        assert m.update_gate.bias is not None
        m.update_gate.bias.fill_(-1e9)
        hidden = torch.randn(3, LAYERS, TOKENS, WIDTH, dtype=torch.float64)
        assert torch.equal(m.updated(old, hidden), old)


@pytest.mark.parametrize("init", ["normal", "uniform", "zeros"])
def test_first_slots_are_seeded_and_equal_in_all_rows(init):
    first = memory(init=init).initial_state(3)["slots"]
    again = memory(init=init, seed=0).initial_state(1)["slots"]
    assert torch.equal(first, again.expand(3, -1, -1, -1))
    spread = float(again.std())
    assert {"normal": 0.8 < spread < 1.2, "uniform": 0.009 < spread < 0.014, "zeros": spread == 0}[init]
    if init != "zeros":
        assert not torch.equal(again, memory(init=init, seed=1).initial_state(1)["slots"])


def test_the_cached_reads_are_those_of_the_slots_and_the_state_stays_as_large():
    model = mnemic.attach(tiny_host(), "rxt", segment=8, num_slots=SLOTS)
    with torch.no_grad():
        model.memory.scale.fill_(0.7)
        ids = random_ids(2, 30)
        whole = model(ids, use_cache=False)
        stream = model.stream(2)
        sizes, logits = [], []
        for i in range(30):
            logits.append(stream.feed(ids[:, i : i + 1], return_logits=True))
            sizes.append(stream.state.nbytes)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=0, atol=1e-4)
    assert len(set(sizes)) == 1


def test_unusable_settings_are_refused():
    unusable: list[tuple[dict[str, Any], str]] = [
        ({"num_heads": 3}, "heads of even width"),
        ({"num_heads": 32}, "heads of even width"),
        ({"num_slots": 0}, "num_slots"),
        ({"mixing": "grouped"}, "mixing"),
        ({"gate": "dynamic"}, "gate"),
    ]
    for options, message in unusable:
        host = tiny_host()
        with pytest.raises(ConfigError, match=message):
            mnemic.attach(host, "rxt", segment=8, **options)
        assert not mnemic.is_attached(host)
