"""The estimator on an attached host: exact with all encodings kept, right on average with one."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mnemic
from mnemic.training import unbiased
from mnemic.training.unbiased_segments import unbiased_backward
from tests.memories.exact_host import exact_host
from tests.tiny import random_ids, tiny_host
from tests.training.test_unbiased import Scripted

SEGMENT = 6


def attached(**options: Any) -> Any:
    torch.manual_seed(1)
    options = {"num_tokens": 2, "capacity": 8, "rank": 2, "alpha": 2.0, **options}
    model = mnemic.freeze_host(mnemic.attach(exact_host(), "uio-llms", segment=SEGMENT, **options))
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.normal_(std=0.3)
    return model


def gradient(model: Any) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.memory.parameters()])
    model.zero_grad(set_to_none=True)
    return found


def whole(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One forward pass through all segments and one backward pass; a segment's first token is not predicted."""
    kept = torch.ones(ids.shape[1], dtype=torch.bool)
    kept[::SEGMENT] = False
    logits = model(ids).logits[:, :-1][:, kept[1:]]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:][:, kept[1:]].flatten())
    loss.backward()
    return loss.detach(), gradient(model)


@pytest.mark.parametrize("live, capacity, tail", [(7, 8, 1), (20, 8, 4), (7, 2, 0)])
def test_exact_where_every_encoding_is_kept(live: int, capacity: int, tail: int):
    model, ids = attached(capacity=capacity), random_ids(2, 7 * SEGMENT + tail)
    labels = ids.clone()
    labels[0, 3:9] = -100
    loss, expected = whole(model, ids, labels)
    found = unbiased_backward(model, ids, labels, live=live, seed=0)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(model), expected, rtol=1e-8, atol=1e-13)


def test_the_mean_over_all_draws_is_the_gradient(monkeypatch: pytest.MonkeyPatch):
    model, ids = attached(), random_ids(2, 4 * SEGMENT)
    _, expected = whole(model, ids, ids)
    scripts = list(itertools.product(range(2), range(3)))
    means = []
    for weighted in (True, False):
        monkeypatch.setattr(unbiased.random, "Random", Scripted(scripts))
        drawn = []
        for seed in range(len(scripts)):
            unbiased_backward(model, ids, live=1, seed=seed, weighted=weighted)
            drawn.append(gradient(model))
        means.append(torch.stack(drawn).mean(0))
    torch.testing.assert_close(means[0], expected, rtol=1e-8, atol=1e-13)
    assert (means[1] - expected).norm() > 0.1 * expected.norm()


def test_refuses_what_it_cannot_train():
    model = attached()
    with pytest.raises(mnemic.ConfigError, match="uio-llms"):
        unbiased_backward(tiny_host(), random_ids(1, 8), live=1, seed=0)
    with pytest.raises(mnemic.ConfigError, match="live = 0"):
        unbiased_backward(model, random_ids(1, 8), live=0, seed=0)
    with pytest.raises(mnemic.InputError, match="expected ids"):
        unbiased_backward(model, random_ids(8), live=1, seed=0)
    with pytest.raises(mnemic.InputError, match="No token"):
        unbiased_backward(model, random_ids(1, 8), torch.full((1, 8), -100), live=1, seed=0)
