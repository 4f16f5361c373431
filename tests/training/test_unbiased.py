"""The incremental estimator: exact where everything is kept, right on average where it is not."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mnemic
from mnemic import State
from mnemic.training import unbiased
from mnemic.training.unbiased import incremental_backward

WIDTH, TOKENS, SEGMENTS = 6, 5, 8


class Compressor(nn.Module):
    """A frozen linear host with a low-rank encoder: a segment (T, d) -> one key and value, read by every later one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weights(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator) / shape[0] ** 0.5

        self.base = weights(WIDTH, WIDTH)
        self.down, self.up = nn.Parameter(weights(WIDTH, 2)), nn.Parameter(weights(2, WIDTH))
        self.read = nn.Parameter(weights(WIDTH, WIDTH))
        self.encoded_with_graph = 0

    def encode(self, x: Tensor) -> State:
        pooled = torch.tanh(x @ (self.base + self.down @ self.up)).mean(0, keepdim=True)
        self.encoded_with_graph += pooled.requires_grad
        return State({"key": pooled, "value": pooled @ self.base.T, "length": torch.tensor([len(x)])})

    def loss(self, x: Tensor, memories: Any) -> Tensor:
        queries = x @ self.read
        keys = torch.cat([x, *(m["key"] for m in memories)])
        values = torch.cat([x, *(m["value"] for m in memories)])
        return (torch.softmax(queries @ keys.T, dim=-1) @ values - x.roll(1, 0)).square().sum()


@pytest.fixture(scope="module")
def segments() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator) for _ in range(SEGMENTS)]


def _gradient(model: Compressor) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _whole(model: Compressor, segments: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    memories = [model.encode(x) for x in segments]
    total = torch.stack([model.loss(x, memories[:t]) for t, x in enumerate(segments)]).sum()
    total.backward()
    return total.detach(), _gradient(model)


@pytest.mark.parametrize("live", [SEGMENTS - 1, SEGMENTS, 50])
def test_exact_where_everything_is_kept(segments: list[Tensor], live: int):
    model = Compressor()
    total, expected = _whole(model, segments)
    found = incremental_backward(segments, model.encode, model.loss, live=live, seed=0)
    torch.testing.assert_close(found, total, rtol=1e-12, atol=0)
    for name, gradient in _gradient(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-12)


def test_the_loss_is_exact_and_few_graphs_are_made(segments: list[Tensor]):
    model = Compressor()
    total, _ = _whole(model, segments)
    counts = []
    for seed in range(100):
        model.encoded_with_graph = 0
        found = incremental_backward(segments, model.encode, model.loss, live=1, seed=seed)
        torch.testing.assert_close(found, total, rtol=1e-12, atol=0)
        counts.append(model.encoded_with_graph)
        expected = _gradient(model)
        incremental_backward(segments, model.encode, model.loss, live=1, seed=seed)
        assert all(torch.equal(g, expected[n]) for n, g in _gradient(model).items())
    # The n-th encoding is kept with the chance 1 / n: 1 + 1/2 + ... + 1/7.
    assert sum(counts) / len(counts) == pytest.approx(sum(1 / n for n in range(1, SEGMENTS)), abs=0.25)


def _estimates(model: Compressor, segments: list[Tensor], live: int, seeds: Any, weighted: bool) -> Tensor:
    """The gradient of the encoder by one seed after another, (seeds, coordinates)."""
    drawn = []
    for seed in seeds:
        incremental_backward(segments, model.encode, model.loss, live=live, seed=seed, weighted=weighted)
        found = _gradient(model)
        drawn.append(torch.cat([found["down"].flatten(), found["up"].flatten()]))
    return torch.stack(drawn)


class Scripted:
    """Stands for `random.Random`: its draws are given, one script after another."""

    def __init__(self, scripts: list[tuple[int, ...]]):
        self.scripts = iter(scripts)

    def __call__(self, seed: Any) -> "Scripted":
        self.draws = iter(next(self.scripts))
        return self

    def randrange(self, stop: int) -> int:
        draw = next(self.draws)
        assert draw < stop
        return draw


@pytest.mark.parametrize("live", [1, 2, 3])
def test_the_mean_over_all_draws_is_the_gradient(segments: list[Tensor], live: int, monkeypatch: pytest.MonkeyPatch):
    """Every sequence of draws is as likely as any other, so this mean is the expectation itself."""
    model, few = Compressor(), segments[:6]
    _, expected = _whole(model, few)
    truth = torch.cat([expected["down"].flatten(), expected["up"].flatten()])
    scripts = list(itertools.product(*(range(n) for n in range(live + 1, len(few)))))
    means = []
    for weighted in (True, False):
        monkeypatch.setattr(unbiased.random, "Random", Scripted(scripts))
        means.append(_estimates(model, few, live, range(len(scripts)), weighted).mean(0))
    torch.testing.assert_close(means[0], truth, rtol=1e-10, atol=1e-12)
    assert (means[1] - truth).norm() > 0.1 * truth.norm()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_unbiased_over_seeds(segments: list[Tensor]):
    """Two of eight kept, 4,000 seeds: every coordinate within 3 standard errors, and without the weights not."""
    model = Compressor()
    _, expected = _whole(model, segments)
    truth = torch.cat([expected["down"].flatten(), expected["up"].flatten()])
    for weighted, seeds in ((True, 4000), (False, 500)):
        drawn = _estimates(model, segments, 2, range(seeds), weighted)
        scores = (drawn.mean(0) - truth).abs() / (drawn.std(0) / seeds**0.5)
        assert bool((scores < 3).all()) == weighted, scores


def test_refuses_what_has_no_meaning(segments: list[Tensor]):
    model = Compressor()
    with pytest.raises(mnemic.ConfigError, match="live = 0, expected at least 1"):
        incremental_backward(segments, model.encode, model.loss, live=0, seed=0)
    with pytest.raises(mnemic.InputError, match="no segments"):
        incremental_backward([], model.encode, model.loss, live=1, seed=0)
