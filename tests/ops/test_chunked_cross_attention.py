"""Chunked cross-attention: the fast forms against their loops, values and gradients, in float64."""

import cmath
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnemic.ops import chunked_cross_attention as cca

few = settings(max_examples=25, deadline=None, derandomize=True)


Leaves = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tensors(batch, tokens, sets, heads, length, width, seed=0, dtype=torch.float64) -> Leaves:
    """query, keys, values, null key, null value, all leaves."""
    make = torch.Generator().manual_seed(seed)
    entry = (batch, sets, heads, length, width)
    sizes = [(batch, tokens, heads, width), entry, entry, (heads, width), (heads, width)]
    q, k, v, a, b = (torch.randn(s, generator=make, dtype=dtype, requires_grad=True) for s in sizes)
    return q, k, v, a, b


def some_mask(batch, sets, length, seed=1) -> Tensor:
    """Random, with one set that is masked as a whole."""
    mask = torch.rand(batch, sets, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[-1, -1] = False
    return mask


def assert_same(fast: Tensor, slow: Tensor, leaves: Sequence[Tensor]) -> None:
    """Values, and gradients of a random projection of them."""
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    weights = torch.randn(fast.shape, generator=torch.Generator().manual_seed(2), dtype=fast.dtype)
    grads = []
    for out in (fast, slow):
        if not out.requires_grad:
            grads.append((None,) * len(leaves))
            continue
        grads.append(torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True))
    for leaf, a, b in zip(leaves, *grads, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=0, atol=1e-8)


def test_positions_read_the_set_of_the_last_full_chunk():
    sets, places = cca.chunk_read(torch.arange(9), 3)
    assert sets.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1, 2]
    assert places.tolist() == [1, 2, 0, 1, 2, 0, 1, 2, 0]


@few
@given(
    st.integers(1, 2), st.integers(1, 9), st.integers(1, 4), st.integers(1, 2), st.booleans(), st.booleans(),
    st.sampled_from([None, 0.3]),
)  # fmt: skip
def test_sequence_equals_loops(batch, tokens, chunk_length, heads, masked, with_null, scale):
    sets = max(1, tokens // chunk_length)
    leaves = tensors(batch, tokens, sets, heads, 5, 2)
    mask = some_mask(batch, sets, 5) if masked else None
    null = cca.Null(*leaves[3:]) if with_null else None
    fast = cca.attend_sequence(*leaves[:3], chunk_length, mask, scale, null)
    slow = cca.naive_sequence(*leaves[:3], chunk_length, mask=mask, scale=scale, null=null)
    assert_same(fast, slow, leaves)
    assert torch.equal(fast[:, : chunk_length - 1], torch.zeros_like(fast[:, : chunk_length - 1]))


@few
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 99))
def test_piece_of_ragged_rows_equals_loops(batch, tokens, chunk_length, masked, with_null, seed):
    """Rows start anywhere, with padding (-1) before and between their tokens."""
    make = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 7, (batch, 1), generator=make)
    real = torch.rand(batch, tokens, generator=make) < 0.7
    chunk = cca.chunk_read(start + real.cumsum(1) - 1, chunk_length)[0].masked_fill(~real, -1)
    sets = max(1, int(chunk.max()) + 1)
    leaves = tensors(batch, tokens, sets, 2, 4, 2, seed)
    mask = some_mask(batch, sets, 4) if masked else None
    null = cca.Null(*leaves[3:]) if with_null else None
    fast = cca.attend(*leaves[:3], chunk, mask, null=null)
    assert_same(fast, cca.naive(*leaves[:3], chunk, mask, null=null), leaves)
    assert not bool(fast[chunk < 0].any())


def test_tokens_may_read_sets_in_any_order():
    leaves = tensors(2, 6, 3, 2, 4, 2)
    chunk = torch.tensor([[2, 0, 2, -1, 0, 2], [1, 1, 0, 1, -1, 1]])
    assert_same(cca.attend(*leaves[:3], chunk), cca.naive(*leaves[:3], chunk), leaves)


def test_a_piece_of_a_sequence_equals_the_sequence_in_float32():
    query, keys, values, null_key, null_value = tensors(2, 37, 4, 2, 6, 8, dtype=torch.float32)
    null = cca.Null(null_key, null_value)
    mask = some_mask(2, 4, 6)
    whole = cca.attend_sequence(query, keys, values, 8, mask, null=null)
    torch.testing.assert_close(
        whole, cca.naive_sequence(query, keys, values, 8, mask=mask, null=null), rtol=0, atol=1e-5
    )
    for start, stop in [(0, 37), (5, 6), (7, 24), (30, 37)]:
        chunk = cca.chunk_read(torch.arange(start, stop), 8)[0].expand(2, -1)
        part = cca.attend(query[:, start:stop], keys, values, chunk, mask, null=null)
        torch.testing.assert_close(part, whole[:, start:stop], rtol=0, atol=1e-6)


def test_one_layout_serves_every_layer():
    chunk = torch.tensor([[-1, 0, 0, 1], [1, 1, -1, -1]])
    layout = cca.lay_out(chunk, 3)
    for seed in (0, 1):
        leaves = tensors(2, 4, 3, 2, 5, 2, seed)[:3]
        assert_same(cca.attend(*leaves, layout), cca.naive(*leaves, chunk), leaves)


def test_keys_are_not_gathered_where_every_set_is_read():
    every = cca.lay_out(cca.chunk_read(torch.arange(2, 9), 3)[0].expand(2, -1), 3)
    assert every.cells is None
    some = cca.lay_out(torch.tensor([[5]]), 1000)
    assert some.cells is not None
    assert some.cells.tolist() == [5]
    assert some.source.shape == (1, 1)


def test_a_set_without_keys_gives_zero_and_finite_gradients():
    leaves = tensors(1, 3, 2, 2, 4, 2)
    chunk = torch.tensor([[0, 0, 1]])
    mask = torch.tensor([[[False] * 4, [True] * 4]])
    out = cca.attend(*leaves[:3], chunk, mask)
    assert not bool(out[:, :2].any())
    grads = torch.autograd.grad(out.sum(), leaves[:3])
    assert all(bool(g.isfinite().all()) for g in grads)
    assert not bool(grads[1][:, 0].any())
    # With a null entry only that is left to attend to.
    out = cca.attend(*leaves[:3], chunk, mask, null=cca.Null(*leaves[3:]))
    torch.testing.assert_close(out[0, 0], leaves[4])


def test_queries_of_tokens_that_read_nothing_do_not_matter():
    query, keys, values, *_ = tensors(1, 4, 1, 2, 4, 2)
    chunk = torch.tensor([[-1, 0, 0, -1]])
    spoiled = query.detach().clone()
    spoiled[0, [0, 3]] = float("nan")
    spoiled.requires_grad_()
    out = cca.attend(spoiled, keys, values, chunk)
    assert torch.equal(out, cca.attend(query, keys, values, chunk))
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), [spoiled, keys, values]))


def test_a_piece_that_reads_nothing_is_zero():
    query, keys, values, null_key, null_value = tensors(2, 3, 2, 2, 4, 2)
    null = cca.Null(null_key, null_value)
    out = cca.attend(query, keys, values, torch.full((2, 3), -1), null=null)
    assert torch.equal(out, torch.zeros_like(query))
    assert torch.equal(cca.attend_sequence(query, keys, values, 4), torch.zeros_like(query))


def test_a_null_entry_added_once_is_the_same():
    leaves = tensors(2, 3, 2, 2, 4, 2)
    null, mask, chunk = cca.Null(*leaves[3:]), some_mask(2, 2, 4), torch.tensor([[0, 0, 1], [-1, 1, 1]])
    keys, values, wider = cca.add_null(*leaves[1:3], mask, null)
    assert_same(
        cca.attend(leaves[0], keys, values, chunk, wider), cca.attend(*leaves[:3], chunk, mask, null=null), leaves
    )


def test_scores_see_the_relative_position():
    """Against complex numbers: pair j of query place i and key token i' meets at angle (i - i' + m - 1) f_j."""
    m, r, k, width, e = 3, 4, 2, 4, 6
    make = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, e, generator=make, dtype=torch.float64) for n in (m, k * r))
    places, tokens = cca.rotary(m, r, k, width)
    assert (places.shape, tokens.shape) == ((m, width // 2), (k * r, width // 2))
    scores = cca.rotate(query, places.double()) @ cca.rotate(key, tokens.double()).T
    for i in range(m):
        for s in range(k * r):
            d = i - s % r + m - 1
            expected = float((query[i, width:] * key[s, width:]).sum())
            for j in range(width // 2):
                q = complex(query[i, j], query[i, j + width // 2])
                c = complex(key[s, j], key[s, j + width // 2])
                expected += (q * c.conjugate() * cmath.exp(1j * d * 10000 ** (-2 * j / width))).real
            assert float(scores[i, s]) == pytest.approx(expected, abs=1e-6)


def test_what_does_not_fit_is_refused():
    query, keys, values, *_ = tensors(2, 4, 2, 2, 4, 2)
    chunk = torch.zeros(2, 4, dtype=torch.int64)
    for call, message in [
        (lambda: cca.attend(query, keys, values, chunk + 2), "names sets 2 to 2; there are 2"),
        (lambda: cca.attend(query, keys, values, chunk - 2), "names sets -2 to -2"),
        (lambda: cca.attend(query, keys, values, chunk[:, :3]), r"B, T, U = \(2, 3, 2\)"),
        (lambda: cca.attend(query, keys, values, chunk.int()), "int64"),
        (lambda: cca.attend(query, keys[:1], values, chunk), "do not fit queries"),
        (lambda: cca.attend(query, keys, values, chunk, torch.ones(2, 2, 3, dtype=torch.bool)), "must be bool"),
        (lambda: cca.attend(query[0], keys, values, chunk), "Expected query"),
        (lambda: cca.attend_sequence(query, keys, values, 1), "read 4 neighbour sets; there are 2"),
        (lambda: cca.rotary(4, 8, 2, 3), "even and positive"),
        (lambda: cca.rotate(query, torch.zeros(4, 1, 2)), "2 angles rotate 4 coordinates"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
