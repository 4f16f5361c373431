"""Product keys: the fast operations against dense references and loops, values and gradients, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mnemic.ops import product_keys
from mnemic.ops.masked_batch_norm import MaskedBatchNorm

few = settings(max_examples=15, deadline=None, derandomize=True)
shapes = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 5),
        "heads": st.integers(1, 3),
        "n": st.integers(1, 6),
        "e": st.integers(1, 4),
        "width": st.integers(1, 5),
        "top_k": st.integers(1, 6),
        "seed": st.integers(0, 10_000),
    }
)


def tensors(shape: dict, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query (T, h, 2, e), x (T, width), subkeys, and two tables of n^2 rows; all leaves."""
    make = torch.Generator().manual_seed(shape["seed"])
    t, h, n, e, d = (shape[name] for name in ("tokens", "heads", "n", "e", "width"))
    sizes = [(t, h, 2, e), (t, d), (h, 2, n, e), (n * n, d), (n * n, d)]
    return [torch.randn(s, generator=make, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]


def sample(top_k: int = 3, dtype: torch.dtype = torch.float64, **sizes: int) -> tuple[list[Tensor], int]:
    shape = {"tokens": 9, "heads": 2, "n": 6, "e": 4, "width": 5, "seed": 0} | sizes
    return tensors(shape, dtype), top_k


def assert_same(fast: Tensor, slow: Tensor, leaves: list[Tensor]) -> None:
    """Values, and gradients of a random projection of them."""
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    weights = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=fast.dtype)
    grads = torch.autograd.grad((fast * weights).sum(), leaves)
    wants = torch.autograd.grad((slow * weights).sum(), leaves)
    for grad, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_selection_is_the_flat_top_k(dtype, tolerance):
    (query, _, subkeys, _, _), top_k = sample(top_k=8, dtype=dtype, tokens=100, heads=1, n=32, e=16)
    scores, rows = product_keys.select(query, subkeys, top_k)
    want, want_rows = product_keys.naive_select(query, subkeys, top_k)
    assert rows.shape == (100, 1, 8)
    assert rows.dtype == torch.int64
    assert torch.equal(rows.sort(-1).values, want_rows.sort(-1).values)
    # Both come best first.
    torch.testing.assert_close(scores, want, rtol=0, atol=tolerance)


@few
@given(shapes, st.sampled_from([torch.float32, torch.float64]))
def test_selection_of_any_shape(shape, dtype):
    query, _, subkeys, _, _ = tensors(shape, dtype)
    top_k = min(shape["top_k"], shape["n"])
    scores, rows = product_keys.select(query, subkeys, top_k)
    want, want_rows = product_keys.naive_select(query, subkeys, top_k)
    assert torch.equal(rows, want_rows)
    torch.testing.assert_close(scores, want, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("k", [1, 2, 7, 32])
def test_pairs_hold_every_sum_that_can_win(k):
    pairs = product_keys._pairs(k, torch.device("cpu")).T.tolist()
    assert sorted(pairs) == [[a, b] for a in range(k) for b in range(k) if (a + 1) * (b + 1) <= k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_largest_orders_every_kind_of_number(dtype):
    numbers = torch.tensor(
        [0.5, -3.0, float("inf"), 1e-40, -1e-40, float("-inf"), 2.0, -0.25, 3e38, -3e38], dtype=dtype
    )
    numbers = torch.stack([numbers, numbers.flip(0)])
    kept = product_keys._largest(numbers, 7)
    assert torch.equal(numbers.gather(-1, kept), numbers.sort(-1, descending=True).values[:, :7])


@few
@given(shapes, st.booleans())
def test_lookup_equals_the_dense_reference(shape, sparse):
    query, _, subkeys, values, _ = tensors(shape)
    top_k = min(shape["top_k"], shape["n"])
    fast = product_keys.lookup(query, subkeys, values, top_k, sparse)
    slow = product_keys.naive_lookup(query, subkeys, values, top_k)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    if not sparse:
        assert_same(fast, slow, [query, subkeys, values])


@few
@given(shapes)
def test_expert_lookup_equals_loops(shape):
    query, x, subkeys, down, up = tensors(shape)
    top_k = min(shape["top_k"], shape["n"])
    fast = product_keys.expert_lookup(query, x, subkeys, down, up, top_k)
    slow = product_keys.naive_expert_lookup(query, x, subkeys, down, up, top_k)
    assert_same(fast, slow, [query, x, subkeys, down, up])


def test_token_dimensions_are_free():
    (query, x, subkeys, down, up), top_k = sample(tokens=12)
    flat = product_keys.lookup(query, subkeys, up, top_k)
    assert torch.equal(product_keys.lookup(query.view(2, 2, 3, 2, 2, 4), subkeys, up, top_k), flat.view(2, 2, 3, 5))
    assert product_keys.lookup(query[0], subkeys, up, top_k).shape == (5,)
    assert product_keys.lookup(query[:0], subkeys, up, top_k).shape == (0, 5)
    assert product_keys.expert_lookup(query[0], x[0], subkeys, down, up, top_k).shape == (5,)
    experts = product_keys.expert_lookup(query, x, subkeys, down, up, top_k)
    folded = product_keys.expert_lookup(query.view(3, 4, 2, 2, 4), x.view(3, 4, 5), subkeys, down, up, top_k)
    assert torch.equal(folded, experts.view(3, 4, 5))


def test_tokens_do_not_depend_on_their_batch():
    (query, _, subkeys, values, _), top_k = sample(tokens=9)
    _, rows = product_keys.select(query, subkeys, top_k)
    out = product_keys.lookup(query, subkeys, values, top_k)
    padded = torch.cat([query, torch.full_like(query[:4], 1e3)])
    for some in (slice(0, 1), slice(3, 7)):
        assert torch.equal(product_keys.select(query[some], subkeys, top_k)[1], rows[some])
        torch.testing.assert_close(
            product_keys.lookup(query[some], subkeys, values, top_k), out[some], rtol=0, atol=1e-12
        )
    assert torch.equal(product_keys.select(padded, subkeys, top_k)[1][:9], rows)
    torch.testing.assert_close(product_keys.lookup(padded, subkeys, values, top_k)[:9], out, rtol=0, atol=1e-12)


def test_gradcheck():
    (query, x, subkeys, down, up), top_k = sample(tokens=3, n=4, e=3, width=2)
    assert torch.autograd.gradcheck(lambda q, c, v: product_keys.lookup(q, c, v, top_k), (query, subkeys, up))
    assert torch.autograd.gradcheck(
        lambda q, x, c, u, v: product_keys.expert_lookup(q, x, c, u, v, top_k), (query, x, subkeys, down, up)
    )


@pytest.mark.parametrize("frozen", ["x", "down"])
def test_experts_with_a_frozen_input(frozen):
    (query, x, subkeys, down, up), top_k = sample()
    (x if frozen == "x" else down).requires_grad_(False)
    fast = product_keys.expert_lookup(query, x, subkeys, down, up, top_k)
    slow = product_keys.naive_expert_lookup(query, x, subkeys, down, up, top_k)
    assert_same(fast, slow, [query, down if frozen == "x" else x, up])


def test_refuses_more_rows_than_half_keys_and_other_shapes():
    (query, _, subkeys, values, _), _ = sample(n=6)
    for top_k in (0, 7):
        with pytest.raises(ValueError, match=f"1 to n = 6.*{top_k}"):
            product_keys.lookup(query, subkeys, values, top_k)
    with pytest.raises(ValueError, match=r"\(2, 2, 4\)"):
        product_keys.select(query[:, :1], subkeys, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sparse_and_dense_gradients_take_the_same_step(dtype):
    (query, x, subkeys, down, up), top_k = sample(tokens=40)
    steps = []
    for sparse in (False, True):
        tables = [nn.Parameter(table.detach().clone().to(dtype)) for table in (down, up)]
        optimizer = torch.optim.SGD(tables, lr=1e-3)
        out = product_keys.lookup(query, subkeys, tables[1], top_k, sparse)
        out = out + product_keys.expert_lookup(query, x, subkeys, tables[0], tables[1], top_k, sparse)
        out.square().sum().backward()
        for table in tables:
            assert table.grad is not None
            assert table.grad.is_sparse == sparse
        optimizer.step()
        steps.append(tables)
    exact = dtype == torch.float64
    for before, dense, sparse in zip((down, up), *steps, strict=True):
        torch.testing.assert_close(dense, sparse, rtol=0 if exact else 2**-7, atol=1e-12 if exact else 1e-3)
        assert float((dense - before).detach().abs().max()) > 1e-2


def test_a_sparse_gradient_holds_each_row_once():
    rows = torch.tensor([[[3, 1], [3, 3]]])
    values = torch.zeros(9, 2, dtype=torch.float64, requires_grad=True)
    product_keys.gather(rows, torch.ones(1, 2, 2, dtype=torch.float64), values, sparse=True).sum().backward()
    assert values.grad is not None
    assert values.grad._indices().tolist() == [[1, 3]]
    assert values.grad._values().tolist() == [[1.0, 1.0], [3.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparse", [False, True])
def test_half_precision_tables_sum_in_float32(dtype, sparse):
    make = torch.Generator().manual_seed(0)
    # 4096 reads of 4 rows: a sum in bfloat16 stops growing after a few hundred.
    rows = torch.randint(0, 4, (512, 2, 4), generator=make)
    weights = torch.rand(512, 2, 4, generator=make).requires_grad_()
    values = torch.randn(4, 8, generator=make).to(dtype).requires_grad_()
    exact = values.detach().double().requires_grad_()
    out, want = (
        product_keys.gather(rows, weights.to(v.dtype) if v is exact else weights, v, sparse) for v in (values, exact)
    )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    (grad,) = torch.autograd.grad(out.sum(), values)
    (grad_want,) = torch.autograd.grad(want.sum(), exact)
    # One rounding, to the dtype of the table.
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.to_dense().double(), grad_want.to_dense(), rtol=torch.finfo(dtype).eps, atol=0)
    half = product_keys.gather(rows, weights.to(dtype), values, sparse)
    assert half.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 7, 16])
def test_slices_of_the_table_give_slices_of_the_result(dtype, cut):
    make = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 81, (6, 2, 8), generator=make)
    weights = torch.rand(6, 2, 8, generator=make).to(dtype)
    values = torch.randn(81, 33, generator=make).to(dtype).requires_grad_()
    whole = product_keys.gather(rows, weights, values)
    shards = [part.detach().contiguous().requires_grad_() for part in values.split([cut, 33 - cut], dim=1)]
    parts = [product_keys.gather(rows, weights, shard) for shard in shards]
    assert torch.equal(torch.cat(parts, -1), whole)
    grad = torch.randn(whole.shape, generator=make).to(dtype)
    (to_values,) = torch.autograd.grad(whole, values, grad)
    pieces = grad.split([cut, 33 - cut], dim=-1)
    to_shards = [torch.autograd.grad(*each)[0] for each in zip(parts, shards, pieces, strict=True)]
    assert torch.equal(torch.cat(to_shards, -1), to_values)


def test_usage_by_hand():
    rows = torch.tensor([[[0, 1]], [[0, 2]]])
    weights = torch.tensor([[[0.75, 0.25]], [[1.0, 0.0]]])
    found = product_keys.usage(rows, weights, 4)
    assert found["hit"] == pytest.approx(2 / 4)
    share = [1.75 / 2, 0.25 / 2]
    assert float(found["kl"]) == pytest.approx(sum(p * math.log(p * 4) for p in share))
    assert float(found["entropy"]) == pytest.approx(-sum(p * math.log(p) for p in (2 / 3, 1 / 3)))
    assert float(found["top1"]) == pytest.approx((0.75 + 1.0) / 2)


def test_usage_extremes_and_batches():
    even = product_keys.usage(torch.arange(16).view(2, 2, 4), torch.full((2, 2, 4), 0.25), 16)
    assert {name: float(value) for name, value in even.items()} == pytest.approx(
        {"hit": 1.0, "kl": 0.0, "entropy": math.log(16), "top1": 0.25}, abs=1e-6
    )
    (query, _, subkeys, _, _), top_k = sample(tokens=10)
    weights, rows = product_keys.address(query, subkeys, top_k)
    whole = product_keys.usage(rows, weights, 36)
    streamed = product_keys.Usage(36).update(rows[:3], weights[:3]).update(rows[3:], weights[3:]).result()
    for name, value in whole.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(streamed[name], value)
    with pytest.raises(ValueError, match="at least one read"):
        product_keys.Usage(36).result()


def test_initial_values():
    torch.manual_seed(0)
    pkm = product_keys.init_subkeys_(torch.empty(4, 2, 64, 16), 16)
    plus = product_keys.init_subkeys_(torch.empty(4, 2, 64, 16), 32)
    for keys, width in ((pkm, 16), (plus, 32)):
        assert float(keys.abs().max()) == pytest.approx(width**-0.5, rel=1e-2)
        assert float(keys.std()) == pytest.approx((width * 3) ** -0.5, rel=0.05)
    assert float(product_keys.init_values_(torch.empty(1024, 64)).std()) == pytest.approx(64**-0.5, rel=0.02)


class Lookup(nn.Module):
    """A PKM as the card has it for this toy: d 32, n 64, h 4, k 8, k_dim 32, batch norm over the query's features."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.norm = nn.Linear(32, 4 * 32), MaskedBatchNorm(4 * 32)
        self.subkeys = nn.Parameter(product_keys.init_subkeys_(torch.empty(4, 2, 64, 16), 16))
        self.values = nn.Parameter(product_keys.init_values_(torch.empty(64 * 64, 32)))

    def address(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return product_keys.address(self.norm(self.query(x)).unflatten(-1, (4, 2, 16)), self.subkeys, 8)

    def forward(self, x: Tensor) -> Tensor:
        weights, rows = self.address(x)
        return product_keys.gather(rows, weights, self.values)


def recall(layer: nn.Module, groups: list[dict]) -> tuple[float, Tensor]:
    """Accuracy on 4000 random facts (a, b) -> label after 500 steps of Adam on x + layer(x), and the inputs."""
    make = torch.Generator().manual_seed(0)
    pairs = torch.randint(0, 100, (4000, 2), generator=make)
    labels = torch.randint(0, 64, (4000,), generator=make)
    codes = torch.randn(2, 100, 16, generator=make)
    x = torch.cat([codes[0][pairs[:, 0]], codes[1][pairs[:, 1]]], dim=-1)
    head = nn.Linear(32, 64)
    optimizer = torch.optim.Adam([*groups, {"params": list(head.parameters())}], lr=groups[0]["lr"])
    for _ in range(500):
        batch = torch.randint(0, 4000, (512,), generator=make)
        loss = F.cross_entropy(head(x[batch] + layer(x[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        return float((head(x + layer(x)).argmax(-1) == labels).float().mean()), x


@pytest.mark.slow
def test_a_table_memorises_facts_that_a_feed_forward_layer_does_not():
    torch.manual_seed(0)
    table = Lookup()
    rest = [p for p in table.parameters() if p is not table.values]
    recalled, x = recall(table, [{"params": rest, "lr": 1e-3}, {"params": [table.values], "lr": 1e-2}])
    weights, rows = table.address(x)
    hit = float(product_keys.usage(rows, weights, 64 * 64)["hit"])
    dense = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    dense_recalled, _ = recall(dense, [{"params": list(dense.parameters()), "lr": 3e-3}])
    print(f"table {recalled:.3f}, usage {hit:.3f}; feed-forward {dense_recalled:.3f}")
    assert recalled > 0.75
    assert hit > 0.95
    assert dense_recalled < 0.5
