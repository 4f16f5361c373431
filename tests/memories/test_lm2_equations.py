"""LM2: its equations against a literal transcription of the paper and against loops, values and gradients.

The loops say section by section what the module's docstring says, one row, head, token and slot at a time.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemic.core.memory import HostSpec, Segment
from mnemic.core.registry import memory_class, memory_config
from mnemic.core.state import State
from mnemic.core.step import Step


def build(width: int = 8, layers: int = 2, seed: int = 0, spread: float = 0.4, **options: Any):
    """An LM2 in float64 with weights large enough that every term shows."""
    spec = HostSpec(
        hidden_size=width, num_layers=layers, embedding_std=0.02, dtype=torch.float64, device=torch.device("cpu")
    )
    torch.manual_seed(seed)
    memory = memory_class("lm2")(memory_config("lm2", **options), spec)
    with torch.no_grad():
        for p in memory.parameters():
            p += spread * torch.randn(p.shape, dtype=p.dtype)
    return memory


def inputs(memory, batch: int, tokens: int, seed: int = 1) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Attention outputs and inputs per block, (B, T, d), and a bank (B, banks, N, d); all leaves."""
    make = torch.Generator().manual_seed(seed)
    blocks, width = len(memory.layers), memory.host.hidden_size
    leaf = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64, requires_grad=True)  # noqa: E731
    bank = leaf(batch, memory.num_banks, memory.config.num_slots, width)
    xs, sources = ([leaf(batch, tokens, width) for _ in range(blocks)] for _ in range(2))
    return xs, sources, bank


def run(memory, xs: list[Tensor], sources: list[Tensor], bank: Tensor, mask: Tensor | None = None):
    """What the blocks put on the residual stream, and the next bank, from the module."""
    state = State({"bank": bank})
    reads, outputs, trace = memory.prepare(state), [], {}
    for i, layer in enumerate(memory.layers):
        step = Step.alone(memory, layer, reads=reads)
        x = memory.residual(xs[i], sources[i], step)
        trace[layer] = step.frame.trace[layer]
        outputs.append(x)
    return outputs, memory.commit(state, Segment(trace=trace, mask=mask))["bank"]


# The paper's equations


def literal(E_attn, E, M, W_Q, W_K, W_V, W_out, W_in, W_forget):
    Q = E @ W_Q
    K = M @ W_K
    V = M @ W_V
    A = torch.softmax(Q @ K.mT / math.sqrt(E.shape[-1]), dim=-1)
    E_mem = A @ V
    g_out = torch.sigmoid(E_mem @ W_out)
    E_gated = g_out * E_mem
    E_next = E_attn + E_gated
    g_in = torch.sigmoid(E @ W_in)
    g_forget = torch.sigmoid(E_mem @ W_forget)
    M_next = g_in * torch.tanh(E_mem) + g_forget * M
    return E_next, M_next


@pytest.mark.parametrize("query_source", ["attention", "residual"])
def test_identity_route_is_the_paper_to_the_letter(query_source):
    memory = build(
        layers=1, num_heads=1, num_slots=6, route="identity", query_source=query_source, spread=0.0, preset="paper"
    )
    names = ("query", "key", "value", "gate_out", "gate_in", "gate_forget")
    with torch.no_grad():
        for name in names:
            getattr(memory, name).weight[0].normal_()
    assert all(not bool(getattr(memory, f"bias_{name}").any()) for name in ("out", "in", "forget"))
    (x,), (source,), bank = inputs(memory, 2, 6)
    for m in (bank, memory.initial_state(2)["bank"]):
        (got,), after = run(memory, [x], [source], m)
        entering = x if query_source == "attention" else source
        expected, next_bank = literal(x, entering, m[:, 0], *(getattr(memory, n).weight[0] for n in names))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(after[:, 0], next_bank, rtol=0, atol=1e-12)


# The module against loops


def rms(vector: Tensor) -> Tensor:
    return vector / (vector.pow(2).mean() + torch.finfo(vector.dtype).eps).sqrt()


def softmax(scores: list[Tensor]) -> list[Tensor]:
    highest = max(float(s.detach()) for s in scores)
    powers = [(s - highest).exp() for s in scores]
    return [p / sum(powers) for p in powers]


def loops(memory, xs: list[Tensor], sources: list[Tensor], bank: Tensor, mask: Tensor | None = None):
    """`run`, written with loops over rows, blocks, heads, tokens and slots."""
    c, d = memory.config, memory.host.hidden_size
    h, e, slots, tokens = c.num_heads, d // c.num_heads, c.num_slots, xs[0].shape[1]
    w = {n: getattr(memory, n).full() for n in ("query", "key", "value", "gate_out", "gate_in", "gate_forget")}
    outputs = [torch.zeros_like(x) for x in xs]
    banks = []
    for b in range(xs[0].shape[0]):
        real = [t for t in range(tokens) if mask is None or bool(mask[b, t])]
        entered = [[bank[b, k, n] for n in range(slots)] for k in range(memory.num_banks)]
        current = [list(one) for one in entered]
        queries, reads, seen = {}, {}, {}

        def scores(i, one, queries=queries):
            """(h, T, N) scores of block i's queries against the slots of one bank."""
            keys = [(rms(m) * memory.slot_norm[i] if c.norm else m) @ w["key"][i] for m in one]
            heads = [slice(a * e, (a + 1) * e) for a in range(h)]
            return [[[q[part] @ k[part] / math.sqrt(e) for k in keys] for q in queries[i]] for part in heads]

        def over_slots(row):
            """Softmax over the slots of one token, zero outside its top k."""
            kept = sorted(range(slots), key=lambda n: -float(row[n].detach()))[: c.top_k or slots]
            weights = dict(zip(kept, softmax([row[n] for n in kept]), strict=True))
            return [weights.get(n, torch.zeros((), dtype=torch.float64)) for n in range(slots)]

        for i in range(len(memory.layers)):
            one = entered[i if c.memory_scope == "per_layer" else 0]
            seen[i] = [x for x in (xs if c.query_source == "attention" else sources)[i][b]]
            queries[i] = [(rms(x) * memory.query_norm[i] if c.norm else x) @ w["query"][i] for x in seen[i]]
            s, values, reads[i] = scores(i, one), [m @ w["value"][i] for m in one], []
            for t in range(tokens):
                heads = []
                for a in range(h):
                    weights = over_slots(s[a][t])
                    heads.append(sum(weights[n] * values[n][a * e : (a + 1) * e] for n in range(slots)))
                reads[i].append(torch.cat(heads))
                gate = torch.sigmoid(reads[i][t] @ w["gate_out"][i] + memory.bias_out[i])
                alpha = 1.0 if memory.alpha is None else memory.alpha[i]
                outputs[i][b, t] = xs[i][b, t] + alpha * gate * reads[i][t]

        for i in range(len(memory.layers)):
            k = i if c.memory_scope == "per_layer" else 0
            s = scores(i, entered[k] if c.write_scores == "read" else current[k])
            written = []
            for n in range(slots):
                x_slot, c_mem, mass = [], [], 0.0
                for a in range(h):
                    part = slice(a * e, (a + 1) * e)
                    if c.route == "softmax":
                        weights = softmax([s[a][t][n] for t in real])
                    elif c.route == "competitive":
                        shares = [over_slots(s[a][t])[n] for t in real]
                        total = sum(shares)
                        mass = mass + total / h
                        weights = [share / total if float(total.detach()) > 0 else share for share in shares]
                    else:
                        weights = [1.0 if t == n else 0.0 for t in real]
                    x_slot.append(sum(v * seen[i][t][part] for v, t in zip(weights, real, strict=True)))
                    c_mem.append(sum(v * reads[i][t][part] for v, t in zip(weights, real, strict=True)))
                x_slot, c_mem = torch.cat(x_slot), torch.cat(c_mem)
                g_in = torch.sigmoid(x_slot @ w["gate_in"][i] + memory.bias_in[i])
                if c.route == "competitive":
                    g_in = g_in * mass.clamp(max=1.0)
                g_forget = torch.sigmoid(c_mem @ w["gate_forget"][i] + memory.bias_forget[i])
                content = c_mem + x_slot @ memory.content.full()[i] if c.content_write else c_mem
                written.append(g_in * torch.tanh(content) + g_forget * current[k][n])
            current[k] = written
        banks.append(torch.stack([torch.stack(one) for one in current]))
    return outputs, torch.stack(banks)


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"preset": "paper"},
    "attach": {"preset": "attach"},
    "one-head": {"num_heads": 1},
    "more-slots-than-tokens": {"num_slots": 7, "num_heads": 4},
    "learned-many-slots": {"num_slots": 10, "init": "learned"},
    "top-k": {"top_k": 2},
    "top-k-beyond-slots": {"top_k": 9},
    "competitive": {"route": "competitive"},
    "competitive-top-k": {"route": "competitive", "top_k": 2},
    "competitive-per-layer": {"route": "competitive", "memory_scope": "per_layer", "norm": False},
    "competitive-scores-of-read": {"route": "competitive", "write_scores": "read", "content_write": False},
    "identity": {"route": "identity", "num_slots": 5},
    "identity-per-layer": {"route": "identity", "num_slots": 5, "memory_scope": "per_layer"},
    "per-layer": {"memory_scope": "per_layer"},
    "per-layer-scores-of-read": {"memory_scope": "per_layer", "write_scores": "read"},
    "scores-of-read": {"write_scores": "read"},
    "residual-queries": {"query_source": "residual"},
    "attention-queries": {"query_source": "attention"},
    "no-content-write": {"content_write": False},
    "no-norm": {"norm": False},
    "low-rank": {"rank": 3},
    "code-biases": {"retention": "code", "input_bias": 0.0},
    "second-of-three-blocks": {"memory_layers": [1]},
}  # fmt: skip


# Identity routing takes no padding.
CASES = [(v, p) for v, o in VARIANTS.items() for p in (False, True) if not (p and o.get("route") == "identity")]


@pytest.mark.parametrize("variant, padded", CASES, ids=lambda v: ("padded" if v else "full") if v in (0, 1) else v)
def test_module_equals_loops(variant, padded):
    options = {"num_slots": 3, "num_heads": 2, **VARIANTS[variant]}
    memory = build(layers=3 if "memory_layers" in options else 2, seed=5, **options)
    xs, sources, bank = inputs(memory, 2, 5)
    mask = torch.tensor([[True] * 5, [False, True, True, False, False]]) if padded else None
    make = torch.Generator().manual_seed(9)
    results = [run(memory, xs, sources, bank, mask), loops(memory, xs, sources, bank, mask)]
    weights = [torch.randn(t.shape, generator=make, dtype=torch.float64) for t in (*results[0][0], results[0][1])]
    names, parameters = zip(*memory.named_parameters(), strict=True)
    leaves, grads = [*xs, *sources, bank, *parameters], []
    for outputs, after in results:
        loss = sum((o * w).sum() for o, w in zip((*outputs, after), weights, strict=True))
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for fast, slow in zip((*results[0][0], results[0][1]), (*results[1][0], results[1][1]), strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    for name, fast, slow in zip([*("input",) * (len(xs) * 2 + 1), *names], *grads, strict=True):
        assert (fast is None) == (slow is None), name
        if fast is not None:
            torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_padding_tokens_leave_the_bank_alone():
    memory = build(num_slots=3, num_heads=2)
    xs, sources, bank = inputs(memory, 1, 5)
    mask = torch.tensor([[True, True, True, False, False]])
    _, padded = run(memory, xs, sources, bank, mask)
    _, alone = run(memory, [x[:, :3] for x in xs], [s[:, :3] for s in sources], bank)
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-12)


# Starting values


@pytest.mark.parametrize(
    "options, blocks, expected",
    [
        ({}, 16, math.log(0.95 ** (1 / 16) / (1 - 0.95 ** (1 / 16)))),
        ({"memory_layers": 4}, 16, math.log(0.95**0.25 / (1 - 0.95**0.25))),
        ({"memory_scope": "per_layer"}, 16, math.log(0.95 / 0.05)),
        ({"retention": "paper"}, 16, 0.0),
        ({"retention": "code"}, 16, 1.0),
    ],
)
def test_forget_bias_keeps_the_share_asked_for(options, blocks, expected):
    memory = build(layers=blocks, spread=0.0, num_slots=4, **options)
    assert memory.bias_forget.detach().unique().tolist() == pytest.approx([expected])


def test_sixteen_blocks_start_with_forget_bias_5_7():
    assert float(build(layers=16, spread=0.0, num_slots=4).bias_forget.detach()[0, 0]) == pytest.approx(5.7, abs=0.05)


def test_first_banks():
    identity = build(num_slots=5, spread=0.0).initial_state(3)["bank"]
    assert torch.equal(identity, torch.eye(5, 8, dtype=torch.float64).expand(3, 1, 5, 8))
    orthogonal = build(num_slots=5, spread=0.0, init="orthogonal", memory_scope="per_layer").initial_state(1)["bank"]
    assert orthogonal.shape == (1, 2, 5, 8)
    products = orthogonal[0, 0] @ orthogonal[0, 0].mT
    torch.testing.assert_close(products, torch.eye(5, dtype=torch.float64), atol=1e-6, rtol=0)
    many = build(num_slots=12, spread=0.0, init="orthogonal").initial_state(1)["bank"]
    torch.testing.assert_close(many.norm(dim=-1), torch.ones(1, 1, 12, dtype=torch.float64), atol=1e-6, rtol=0)
    learned = build(num_slots=12, init="learned")
    assert isinstance(learned.first_slots, torch.nn.Parameter)


def test_number_of_parameters_is_the_cards():
    width, blocks = 8, 2
    paper = build(num_slots=4, preset="paper")
    biases = 3 * width
    assert sum(p.numel() for p in paper.parameters()) == blocks * (6 * width**2 + biases)
    full = build(num_slots=4, identity_start=True)
    assert sum(p.numel() for p in full.parameters()) == blocks * (7 * width**2 + biases + 2 * width + 1)
