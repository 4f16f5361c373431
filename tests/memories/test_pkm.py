"""PKM: its equations against loops, the peer package, padding and replay under batch normalisation, its gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mnemic
from mnemic.core.memory import HostSpec, Segment
from mnemic.core.registry import memory_class, memory_config
from mnemic.core.state import State
from mnemic.core.step import Step
from tests.contract.cases import checkpointing
from tests.tiny import random_ids, tiny_host

SIZES: dict[str, Any] = {"num_keys": 6, "num_heads": 2, "top_k": 3, "key_dim": 8}


def build(width: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A PKM on its own, with noise on what starts at 0 or 1."""
    spec = HostSpec(hidden_size=width, num_layers=2, embedding_std=0.02, dtype=dtype, device=torch.device("cpu"))
    torch.manual_seed(seed)
    memory = memory_class("pkm")(memory_config("pkm", **{**SIZES, **options}), spec)
    with torch.no_grad():
        for parameter in memory.parameters():
            if parameter.dim() < 2:
                parameter += 0.3 * torch.randn(parameter.shape, dtype=parameter.dtype)
    return memory


def double(x: Tensor) -> Tensor:
    return 2 * x


def loop(memory: Any, x: Tensor) -> Tensor:
    """One token, head and row at a time; x (N, d)."""
    own, values, n = memory.queries[0], memory.values[0], memory.config.num_keys
    heads, half = memory.config.num_heads, memory.config.key_dim // 2
    raw = torch.stack([own.project.weight @ token for token in x])
    if own.project.bias is not None:
        raw = raw + own.project.bias
    if memory.config.query_norm == "batch":
        mean, var = raw.mean(0), (raw - raw.mean(0)).square().mean(0)
        raw = (raw - mean) / (var + own.norm.eps).sqrt() * own.norm.weight + own.norm.bias
    out = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for h in range(heads):
            query = raw[t].view(heads, 2, half)[h]
            if memory.config.query_norm == "layer":
                mean = query.mean(-1, keepdim=True)
                scale = ((query - mean).square().mean(-1, keepdim=True) + own.norm.eps).sqrt()
                query = (query - mean) / scale * own.norm.weight + own.norm.bias
            scores = torch.stack([query[0] @ own.subkeys[h, 0, i] + query[1] @ own.subkeys[h, 1, j]
                                  for i in range(n) for j in range(n)])  # fmt: skip
            best = scores.argsort(descending=True)[: memory.config.top_k]
            exps = (scores[best] - scores[best].max()).exp()
            for w, row in zip(exps / exps.sum(), best.tolist(), strict=True):
                total = total + w * values[row]
        out.append(total)
    read = torch.stack(out)
    return read if memory.gate is None else double(x) + memory.gate[0] * read


@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("place", ["replace", "beside"])
def test_equals_loops(query_norm, place):
    memory = build(query_norm=query_norm, place=place).train()
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    fast = memory.feed_forward(x, double, Step.alone(memory, 1, training=True))
    slow = loop(memory, x.view(8, 5)).view_as(x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    weights = torch.randn_like(fast)
    leaves = [x, *memory.parameters()]
    grads, wants = (torch.autograd.grad((y * weights).sum(), leaves) for y in (fast, slow))
    for grad, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-8)
        assert grad.any()


def test_equals_the_peer():
    """Weights of product-key-memory's PKM: (half, head, e) queries without bias, one LayerNorm for all half-queries."""
    peer = pytest.importorskip("product_key_memory")
    torch.manual_seed(0)
    theirs = peer.PKM(12, heads=2, num_keys=6, topk=3, dim_head=8).eval()
    torch.nn.init.normal_(theirs.norm.weight)
    torch.nn.init.normal_(theirs.norm.bias)
    memory = build(12, dtype=torch.float32, key_dim=16, query_norm="layer")
    own = memory.queries[0]
    with torch.no_grad():
        weight = theirs.to_queries.weight.view(2, 2, 8, 12).transpose(0, 1)
        own.project.weight.copy_(weight.reshape(32, 12))
        own.project.bias.zero_()
        own.subkeys.copy_(theirs.keys.transpose(1, 2))
        own.norm.load_state_dict(theirs.norm.state_dict())
        memory.values[0].copy_(theirs.values.weight)
    x = torch.randn(2, 7, 12, requires_grad=True)
    got, want = memory.feed_forward(x, double, Step.alone(memory, 1)), theirs(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    weights = torch.randn_like(want)
    (grad,), (expected,) = (torch.autograd.grad((y * weights).sum(), [x]) for y in (got, want))
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5)


def test_padding_changes_neither_outputs_nor_statistics():
    memory, twin = build().train(), build().train()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    x[1, 4:] = float("nan")
    out = memory.feed_forward(x, double, Step.alone(memory, 1, training=True, real=real))
    alone = twin.feed_forward(x[real][None], double, Step.alone(twin, 1, training=True))
    torch.testing.assert_close(out[real], alone[0], rtol=0, atol=1e-12)
    other, filled = build().train(), x.clone()
    filled[1, 4:] = 7.0
    other.feed_forward(filled, double, Step.alone(other, 1, training=True, real=real))
    for name, buffer in memory.named_buffers():
        assert torch.equal(buffer, dict(other.named_buffers())[name])
        # A bit of float64: the queries of 12 rows and of 10 come from products of two shapes.
        torch.testing.assert_close(buffer, dict(twin.named_buffers())[name], rtol=0, atol=1e-15)


def test_memory_tokens_are_normalised_as_in_eval_mode():
    """Tokens of another memory count: only padding is left out."""
    memory = build().train()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    real = torch.tensor([[False, *[True] * 4, False], [False, *[True] * 3, False, False]])
    out = memory.feed_forward(x, double, Step.alone(memory, 1, training=True, real=real, num_read=1, num_write=1))
    twin = build().train()
    counted = torch.tensor([[True] * 6, [True, True, True, True, False, True]])
    expected = twin.feed_forward(x[counted][None], double, Step.alone(twin, 1, training=True))
    torch.testing.assert_close(out[counted], expected[0], rtol=0, atol=1e-12)


def test_a_replayed_batch_is_counted_once():
    found = []
    for replay in (False, True):
        torch.manual_seed(0)
        model = mnemic.attach(tiny_host(), "pkm", segment=8, preset="default", **SIZES).train()
        if replay:
            checkpointing(model)
        ids = random_ids(3, 21)
        model(ids, labels=ids).loss.backward()
        found.append({n: b.clone() for n, b in model.memory.named_buffers()})
    assert found[0]["queries.0.norm.num_batches_tracked"] == 3
    assert found[0]["queries.0.norm.running_mean"].any()
    for name, buffer in found[0].items():
        torch.testing.assert_close(found[1][name], buffer, rtol=1e-5, atol=1e-6)


def test_sparse_and_dense_gradients_take_the_same_step():
    x, tables = torch.randn(3, 7, 5, dtype=torch.float64), []
    for sparse in (False, True):
        memory = build(query_norm="layer", sparse_gradients=sparse)
        optimizer = torch.optim.SGD(memory.parameters(), lr=0.1)
        memory.feed_forward(x, double, Step.alone(memory, 1)).square().sum().backward()
        assert memory.values[0].grad.is_sparse == sparse
        before = memory.values[0].detach().clone()
        optimizer.step()
        tables.append(memory.values[0].detach())
        assert float((tables[-1] - before).abs().max()) > 1e-2
    torch.testing.assert_close(*tables, rtol=0, atol=1e-12)


def test_usage_is_kept_only_when_somebody_asks():
    model = mnemic.attach(tiny_host(), "pkm", segment=8, **SIZES)
    ids = random_ids(2, 19)
    with torch.no_grad():
        plain = model(ids, use_cache=True)
        assert not plain.past_key_values.trace
        asked = model(ids, use_cache=False, memory_diagnostics=True)
        assert set(asked.memory_diagnostics) == {f"block1/{n}" for n in ("hit", "kl", "entropy", "top1")}
        assert 0 < asked.memory_diagnostics["block1/hit"] <= 1
        # Asked in the middle of a segment, only of the tokens since.
        later = model(ids[:, :5], past_key_values=plain.past_key_values, memory_diagnostics=True)
    assert 0.3 < later.memory_diagnostics["block1/top1"] <= 1


def test_usage_of_a_segment_by_hand():
    memory = build(query_norm="none")
    trace = {"rows": torch.tensor([[[[0, 7]], [[0, 3]]]]), "weights": torch.tensor([[[[0.75, 0.25]], [[0.5, 0.5]]]])}
    found = memory.diagnostics(State(), Segment({1: trace}))
    assert float(found["block1/hit"]) == pytest.approx(3 / 36)
    assert float(found["block1/top1"]) == pytest.approx(0.625)


def test_the_table_is_float32_on_a_half_precision_host():
    host: Any = tiny_host()
    model = mnemic.attach(host.to(torch.bfloat16), "pkm", segment=8, **SIZES)
    assert model.memory.values[0].dtype == torch.float32
    assert model.memory.queries[0].subkeys.dtype == torch.bfloat16
    ids = random_ids(2, 12)
    torch.nn.init.ones_(model.memory.gate)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert model.memory.values[0].grad.any()


def test_defaults_are_the_papers():
    spec = HostSpec(hidden_size=8, num_layers=12, embedding_std=0.02, dtype=torch.float32, device=torch.device("cpu"))
    memory: Any = memory_class("pkm")(memory_config("pkm"), spec)
    assert memory.layers == (6,)
    assert memory.claims == {("feed_forward", 6)}
    assert not memory.identity_at_attach
    assert memory.values[0].shape == (512**2, 8)
    assert memory.queries[0].subkeys.shape == (4, 2, 512, 128)
    assert float(memory.queries[0].subkeys.detach().abs().max()) <= 128**-0.5
    assert float(memory.values[0].detach().std()) == pytest.approx(8**-0.5, rel=0.01)


@pytest.mark.parametrize(
    "options, said",
    [({"top_k": 7}, "top_k = 7"), ({"key_dim": 7}, "even"), ({"memory_layers": (2,)}, "below 2"),
     ({"memory_layers": (1, 0)}, "increasing")],
)  # fmt: skip
def test_refuses(options, said):
    with pytest.raises(mnemic.ConfigError, match=said):
        build(**options)


def test_two_tables_cannot_replace_one_feed_forward_part():
    with pytest.raises(mnemic.ConfigError, match="feed_forward"):
        mnemic.attach(tiny_host(), [mnemic.memory_config("pkm", **SIZES), mnemic.memory_config("pkm", **SIZES)])


def test_hosts_without_one_feed_forward_module_are_refused():
    with pytest.raises(mnemic.HostError, match="feed-forward"):
        mnemic.attach(tiny_host("opt"), "pkm", segment=8, **SIZES)


@pytest.mark.slow
def test_a_table_memorises_facts_that_a_feed_forward_layer_does_not():
    """4000 random pairs of 100 x 100 -> one of 64, 500 steps of batch 512, x + layer(x) and a linear head."""
    recalled = {}
    for kind in ("pkm", "feed-forward"):
        torch.manual_seed(0)
        make = torch.Generator().manual_seed(0)
        pairs, labels = torch.randint(0, 100, (4000, 2), generator=make), torch.randint(0, 64, (4000,), generator=make)
        codes = torch.randn(2, 100, 16, generator=make)
        x = torch.cat([codes[0][pairs[:, 0]], codes[1][pairs[:, 1]]], dim=-1)
        head = torch.nn.Linear(32, 64)
        memory = build(32, dtype=torch.float32, num_keys=64, num_heads=4, top_k=8, key_dim=32)
        dense = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 32))
        table = list(memory.values)
        others = [p for p in memory.parameters() if p is not table[0]]
        groups = [{"params": others, "lr": 1e-3}, {"params": table, "lr": 1e-2}]
        rate = 1e-3 if kind == "pkm" else 3e-3
        optimizer = torch.optim.Adam([*groups, {"params": [*dense.parameters(), *head.parameters()], "lr": rate}])

        def layer(x: Tensor, training: bool, kind: str = kind, memory: Any = memory, dense: Any = dense) -> Tensor:
            if kind == "feed-forward":
                return dense(x)
            return memory.feed_forward(x[None], double, Step.alone(memory, 1, training=training))[0]

        for _ in range(500):
            batch = torch.randint(0, 4000, (512,), generator=make)
            loss = F.cross_entropy(head(x[batch] + layer(x[batch], True)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        memory.eval()
        with torch.no_grad():
            recalled[kind] = float((head(x + layer(x, False)).argmax(-1) == labels).float().mean())
    print(recalled)
    assert recalled["pkm"] > 0.75
    assert recalled["feed-forward"] < 0.5
