"""Relative shift: against the gather, values and gradients; the table of distances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemic.ops.relative_shift import distances, naive_relative_shift, relative_shift

few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 100))
def test_shift_equals_gather(queries, memory, seed):
    keys = memory + queries
    make = torch.Generator().manual_seed(seed)
    b = torch.randn(2, 3, queries, keys, generator=make, dtype=torch.float64, requires_grad=True)
    known = torch.arange(keys) <= torch.arange(queries)[:, None] + memory
    fast, slow = relative_shift(b).masked_fill(~known, 0.0), naive_relative_shift(b)
    assert torch.equal(fast, slow)
    weight = torch.randn(fast.shape, generator=make, dtype=torch.float64)
    assert torch.equal(*(torch.autograd.grad((x * weight).sum(), b)[0] for x in (fast, slow)))


def test_entry_is_the_product_with_its_distance():
    queries, memory, width = 3, 4, 6
    keys = queries + memory
    q = torch.randn(queries, width, dtype=torch.float64)
    table = distances(keys, width, dtype=torch.float64)
    shifted = relative_shift(q @ table.T)
    for i in range(queries):
        for j in range(i + memory + 1):
            # R of distance d is row K - 1 - d.
            expected = q[i] @ table[keys - 1 - (i + memory - j)]
            assert shifted[i, j].item() == pytest.approx(expected.item(), abs=1e-12)


def test_second_derivatives_and_views_without_a_copy():
    b = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
    assert torch.autograd.gradgradcheck(lambda x: relative_shift(x).masked_fill(~mask, 0.0).square(), b)
    plain = b.detach()
    assert relative_shift(plain).untyped_storage().data_ptr() == plain.untyped_storage().data_ptr()


def test_distances_are_sines_and_cosines_of_each_distance_up_to_the_clamp():
    table = distances(5, 4, clamp=3, dtype=torch.float64)
    for row, distance in enumerate((3, 3, 2, 1, 0)):
        expected = [math.sin(distance), math.sin(distance / 100), math.cos(distance), math.cos(distance / 100)]
        assert table[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_odd_widths_and_missing_keys_are_refused():
    with pytest.raises(ValueError, match="must be even, not 3"):
        distances(4, 3)
    with pytest.raises(ValueError, match="4 queries, 3 distances"):
        relative_shift(torch.randn(4, 3))
