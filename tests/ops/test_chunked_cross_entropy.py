"""Chunked cross-entropy against the whole one: values, gradients, and what is kept for the backward pass."""

import pytest
import torch
import torch.nn.functional as F

from mnemic.ops.chunked_cross_entropy import chunked_cross_entropy, cross_entropy
from mnemic.training.budget import saved_bytes

WIDTH, VOCABULARY = 6, 11


def case(seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 7, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (3, 7), generator=generator)
    # Rows with 0, 1 and all labels: means of chunks would differ from the mean.
    labels[0] = -100
    labels[1, :-1] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 100])
def test_equals_the_whole(chunk):
    hidden, weight, labels = case()
    expected = cross_entropy(hidden, lambda x: F.linear(x, weight), labels)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    got = chunked_cross_entropy(hidden, lambda x: F.linear(x, weight), labels, chunk)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    for mine, theirs in zip(torch.autograd.grad(got, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_a_count_of_its_own_and_half_precision():
    hidden, weight, labels = case(dtype=torch.bfloat16)
    whole = chunked_cross_entropy(hidden, lambda x: F.linear(x, weight), labels, 4)
    assert whole.dtype == torch.float32
    divided = chunked_cross_entropy(hidden, lambda x: F.linear(x, weight), labels, 4, count=torch.tensor(16))
    torch.testing.assert_close(divided * 16, whole * 8)


def test_no_label_is_nan_as_it_is_for_torch():
    hidden, weight, labels = case()
    assert chunked_cross_entropy(hidden, lambda x: F.linear(x, weight), labels.fill_(-100), 4).isnan()


def test_no_logits_are_kept():
    hidden, weight, labels = case()
    with saved_bytes() as plain:
        cross_entropy(hidden, lambda x: F.linear(x, weight), labels)
    with saved_bytes() as chunked:
        chunked_cross_entropy(hidden, lambda x: F.linear(x, weight), labels, 4)
    logits = 21 * VOCABULARY * 8
    # The log-probabilities of all tokens, against the hidden states that are there anyway.
    assert plain.total >= logits
    assert chunked.total <= hidden.numel() * 8 + 21 * 8 + 16


@pytest.mark.parametrize(
    "change, said", [({"chunk": 0}, "chunk"), ({"labels": torch.zeros(2, 7, dtype=torch.long)}, "shape")]
)
def test_refuses(change, said):
    hidden, weight, labels = case()
    given = {"labels": labels, "chunk": 4, **change}
    with pytest.raises(ValueError, match=said):
        chunked_cross_entropy(hidden, lambda x: F.linear(x, weight), **given)
