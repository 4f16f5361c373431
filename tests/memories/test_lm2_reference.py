"""The released code's variant of LM2 against a literal transcription of its facts, its leak, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError, InputError
from mnemic.core.memory import HostSpec, Segment
from mnemic.core.registry import memory_class, memory_config
from mnemic.core.state import State
from mnemic.core.step import Frame, Step
from tests.tiny import random_ids, tiny_host

WIDTH = 32


def build(width: int = 8, layers: int = 3, seed: int = 0, **options):
    spec = HostSpec(width, layers, 0.02, torch.float64, torch.device("cpu"))
    torch.manual_seed(seed)
    memory = memory_class("lm2-reference")(memory_config("lm2-reference", **{"num_heads": 2, **options}), spec)
    with torch.no_grad():
        for p in memory.parameters():
            p += 0.3 * torch.randn(p.shape, dtype=p.dtype)
    return memory.eval()


def run(memory, xs: list[Tensor], bank: Tensor) -> tuple[list[Tensor], Tensor]:
    """The blocks of one forward in order, as the host calls them, and the commit."""
    state = State({"bank": bank})
    frame = Frame(memory, state, memory.prepare(state))
    outputs = [memory.residual(x, x, frame.at(layer)) for layer, x in enumerate(xs)]
    return outputs, memory.commit(state, Segment(trace=frame.trace))["bank"]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def transcription(w: dict[str, Tensor], x: Tensor, M: Tensor, heads: int, top_k: int | None, pooling: str):
    """One block for one row: x (T, d), M (N, d) with N = T = d. w holds torch-style (out, in) matrices."""
    d = x.shape[-1]
    e = d // heads
    Q, K, V = (t @ w[f"{n}.weight"].T + w[f"{n}.bias"] for t, n in ((x, "query"), (M, "key"), (M, "value")))
    attended = torch.zeros_like(M)
    for a in range(heads):
        part = slice(a * e, (a + 1) * e)
        for i in range(d):
            scores = torch.stack([Q[i, part] @ K[j, part] / math.sqrt(e) for j in range(i + 1)])
            p = scores.exp() / scores.exp().sum()
            if top_k is not None and top_k < len(p):
                p = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, torch.zeros_like(p))
            attended[i, part] = sum(p[j] * V[j, part] for j in range(i + 1))
    first = layer_norm(M + attended, w["norm_attended.weight"], w["norm_attended.bias"])
    last = "mlp.1" if "mlp.1.weight" in w else "mlp.0"
    hidden = torch.relu(first @ w["mlp.0.weight"].T + w["mlp.0.bias"])
    hidden = torch.relu(hidden @ w[f"{last}.weight"].T + w[f"{last}.bias"])
    candidate = layer_norm(first + hidden, w["norm_mlp.weight"], w["norm_mlp.bias"])
    active = torch.relu(w["gate_weight"] * x)
    M_next = torch.zeros_like(M)
    for i in range(d):
        pooled = active.mean(0) if pooling == "mean" else active[: i + 1].mean(0)
        logits = pooled @ w["gate_tokens.weight"].T + w["gate_tokens.bias"]
        logits = logits + torch.tanh(M[i]) @ w["gate_bank.weight"].T + w["gate_bank.bias"]
        g_in, g_forget = torch.sigmoid(logits[:d] + w["bias_in"]), torch.sigmoid(logits[d:] + w["bias_forget"])
        M_next[i] = g_in * torch.tanh(candidate[i]) + g_forget * M[i]
    return x + M_next, M_next


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate_pooling": "mean"},
        {"num_heads": 8},
        {"top_k": 3},
        {"share_mlp": False},
        {"num_heads": 1, "top_k": 2, "gate_pooling": "mean", "share_mlp": False},
    ],
    ids=str,
)
def test_blocks_equal_the_transcription(options):
    memory = build(**options)
    config = memory.config
    make = torch.Generator().manual_seed(1)
    xs = [torch.randn(2, 8, 8, generator=make, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    parameters = list(memory.parameters())
    for bank in (memory.initial_state(2)["bank"], torch.randn(2, 8, 8, generator=make, dtype=torch.float64)):
        expected, last = [[], [], []], []
        for b in range(2):
            M = bank[b]
            for layer in range(3):
                w = dict(memory.blocks[layer].named_parameters())
                out, M = transcription(w, xs[layer][b], M, config.num_heads, config.top_k, config.gate_pooling)
                expected[layer].append(out)
            last.append(M)
        slow = [*(torch.stack(rows) for rows in expected), torch.stack(last)]
        outputs, after = run(memory, xs, bank)
        fast = [*outputs, after]
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        weights = [torch.randn(t.shape, generator=make, dtype=torch.float64) for t in fast]
        grads = [
            torch.autograd.grad(sum((t * v).sum() for t, v in zip(side, weights, strict=True)), [*xs, *parameters])
            for side in (fast, slow)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_parameters_are_as_many_as_in_the_released_module():
    for width in (8, 16):
        memory = build(width=width, layers=1)
        assert sum(p.numel() for p in memory.parameters()) == 8 * width**2 + 13 * width + 2
    assert 8 * 2048**2 + 13 * 2048 + 2 == 33_581_058
    unshared = build(layers=1, share_mlp=False)
    assert sum(p.numel() for p in unshared.parameters()) == 9 * 8**2 + 14 * 8 + 2


def test_starting_values():
    memory = memory_class("lm2-reference")(memory_config("lm2-reference"), HostSpec(8, 1, 0.02, torch.float32, "cpu"))
    assert torch.equal(memory.initial_state(3)["bank"], torch.eye(8).expand(3, 8, 8))
    assert float(memory.blocks[0].bias_in.detach()) == 0
    assert float(memory.blocks[0].bias_forget.detach()) == 1


def test_dropout_acts_in_training_only():
    memory = build(dropout=0.5)
    xs, bank = [torch.randn(1, 8, 8, dtype=torch.float64)] * 3, memory.initial_state(1)["bank"]
    quiet = run(memory, xs, bank)[1]
    assert torch.equal(quiet, run(memory, xs, bank)[1])
    assert not torch.equal(quiet, run(memory.train(), xs, bank)[1])


def first_changed(pooling: str, changed: int) -> int:
    """The first position whose logits move when token `changed` does, over two segments on a host."""
    torch.manual_seed(0)
    model = mnemic.attach(tiny_host(), "lm2:reference_compat", segment=WIDTH, gate_pooling=pooling)
    ids = random_ids(1, 2 * WIDTH)
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % 58 + 3
    with torch.no_grad():
        difference = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    return int((difference > 0).nonzero()[0])


@pytest.mark.parametrize("changed", [WIDTH - 1, WIDTH + 9])
def test_cumulative_gate_pooling_is_causal_and_mean_leaks(changed):
    assert first_changed("cumulative", changed) == changed
    assert first_changed("mean", changed) < changed


def test_the_bank_passes_through_blocks_and_segments():
    torch.manual_seed(0)
    model = mnemic.attach(tiny_host(), "lm2:reference_compat", segment=WIDTH)
    ids = random_ids(2, 2 * WIDTH)
    entered, left = [], []

    def record(block, args, out):
        entered.append(args[1])
        left.append(out)

    for block in model.memory.blocks:
        block.register_forward_hook(record)
    with torch.no_grad():
        output = model(ids)
        resumed = model(ids[:, WIDTH:], memory_state=model(ids[:, :WIDTH]).memory_state)
    assert torch.equal(entered[0], model.memory.initial_state(2)["bank"])
    assert all(torch.equal(entered[i + 1], left[i]) for i in range(3))
    assert torch.equal(output.memory_state["bank"], left[3])
    assert torch.equal(resumed.logits, output.logits[:, WIDTH:])


def test_every_parameter_learns():
    model = mnemic.attach(tiny_host(), "lm2:reference_compat", segment=WIDTH)
    ids = random_ids(2, 2 * WIDTH)
    model(ids, labels=ids).loss.backward()
    assert all(bool(p.grad.any()) for p in model.memory.parameters())


def test_rows_of_different_whole_segments_are_as_alone():
    model = mnemic.attach(tiny_host(), "lm2:reference_compat", segment=WIDTH, gate_pooling="mean")
    ids = random_ids(2, 2 * WIDTH)
    mask = torch.ones_like(ids)
    mask[1, :WIDTH] = 0
    with torch.no_grad():
        together = model(ids, attention_mask=mask)
        alone = model(ids[1:, WIDTH:])
    torch.testing.assert_close(together.logits[1:, WIDTH:], alone.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.memory_state["bank"][1:], alone.memory_state["bank"], rtol=0, atol=1e-5)


def test_anything_but_whole_segments_is_refused():
    model = mnemic.attach(tiny_host(), "lm2:reference_compat", segment=WIDTH)
    ragged = torch.ones(2, WIDTH, dtype=torch.long)
    ragged[1, :3] = 0
    for ids, mask in (
        (random_ids(1, WIDTH - 1), None),
        (random_ids(1, WIDTH + 1), None),
        (random_ids(2, WIDTH), ragged),
    ):
        with pytest.raises(InputError, match="whole segments of 32 tokens"):
            model(ids, attention_mask=mask)
    with pytest.raises(InputError, match="token by token"):
        model.generate(random_ids(1, WIDTH), max_new_tokens=2)
    memory = build()
    step = Step.alone(memory, reads=memory.prepare(memory.initial_state(1)))
    with pytest.raises(InputError, match="whole segments of 8 tokens; got 5"):
        memory.residual(torch.zeros(1, 5, 8), torch.zeros(1, 5, 8), step)


@pytest.mark.parametrize(
    "segment, options, message",
    [
        (16, {}, "segment must be 32; got 16"),
        (None, {}, "segment must be 32"),
        (32, {"num_heads": 5}, "does not divide the host's width 32"),
        (32, {"dropout": 1.5}, "between 0 and 1"),
        (32, {"gate_pooling": "max"}, "'cumulative'"),
        (32, {"num_slots": 4}, "num_slots"),
    ],
)
def test_unusable_configurations_are_refused(segment, options, message):
    host = tiny_host()
    with pytest.raises(ConfigError, match=message):
        mnemic.attach(host, "lm2-reference", segment=segment, **options)
    assert not mnemic.is_attached(host)
