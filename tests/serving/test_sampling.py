"""Sampling against a plain reference, row by row."""

import random

import pytest
import torch

from mnemic.serving.errors import InvalidRequest
from mnemic.serving.requests import SamplingParams
from mnemic.serving.sampling import Sampler, choose, log_probabilities

SIZE = 12


def logits(rows=1, seed=0):
    return 2 * torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed))


def reference(row, params, made=()):
    """The distribution, by the book."""
    scores = {i: float(x) + params.logit_bias.get(i, 0.0) for i, x in enumerate(row)}
    for token in set(made):
        scores[token] -= params.presence_penalty + params.frequency_penalty * list(made).count(token)
    weights = {i: torch.tensor(s / params.temperature, dtype=torch.float64).exp().item() for i, s in scores.items()}
    order = sorted(weights, key=lambda i: -weights[i])[: params.top_k or SIZE]
    whole, kept, total = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if total < params.top_p:
            kept.append(i)
        total += weights[i] / whole
    whole = sum(weights[i] for i in kept)
    return torch.tensor([weights[i] / whole if i in kept else 0.0 for i in range(SIZE)], dtype=torch.float64)


CASES = [
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.6},
    {"top_p": 0.01},
    {"top_k": 5, "top_p": 0.7, "temperature": 1.7},
    {"logit_bias": {3: 4.0, 5: -100.0}},
    {"presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"top_k": 100},
]


def test_frequencies_are_those_of_the_reference():
    rows, made, draws = logits(len(CASES)), [1, 1, 4], 3000
    samplers = [Sampler(SamplingParams(seed=i, **case)) for i, case in enumerate(CASES)]
    for sampler in samplers:
        sampler.made.update(made)
    shares = [sampler.uniform() for sampler in samplers for _ in range(draws)]
    many = [sampler for sampler in samplers for _ in range(draws)]
    tokens = torch.tensor(choose(rows.repeat_interleave(draws, 0), many, shares)).view(-1, draws)
    counts = torch.stack([row.bincount(minlength=SIZE) for row in tokens]).double()
    for row, found, sampler in zip(rows, counts, samplers, strict=True):
        expected = reference(row, sampler.params, made)
        assert not found[expected == 0].any()
        # Five standard deviations of a binomial share.
        bound = 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9
        assert bool(((found / draws - expected).abs() <= bound).all())


def test_every_share_falls_where_the_reference_has_it():
    """The cumulative distribution, not just its frequencies: exact numbers, no chance."""
    row, sampler = logits(), Sampler(SamplingParams())
    sums = reference(row[0], sampler.params).cumsum(0)
    for token in range(SIZE):
        low = float(sums[token - 1]) if token else 0.0
        assert choose(row, [sampler], [low + 1e-6]) == [token]
        assert choose(row, [sampler], [float(sums[token]) - 1e-6]) == [token]


@pytest.mark.parametrize("share", [0.0, 1 - 2**-53])
def test_impossible_tokens_are_never_drawn(share):
    row = torch.full((1, SIZE), -torch.inf)
    row[0, 5] = 0.0
    for options in ({}, {"top_k": 4}, {"top_p": 0.9}):
        assert choose(row, [Sampler(SamplingParams(**options))], [share]) == [5]


def test_greedy_takes_the_likeliest_with_bias_and_penalties():
    row = logits()
    best, second = row[0].topk(2).indices.tolist()
    assert choose(row, [Sampler(SamplingParams(temperature=0))], [0.5]) == [best]
    assert choose(row, [Sampler(SamplingParams(temperature=0, logit_bias={best: -50}))], [0.5]) == [second]
    tired = Sampler(SamplingParams(temperature=0, frequency_penalty=2.0))
    tired.made.update({best: 20})
    assert choose(row, [tired], [0.5]) == [second]


def test_small_temperatures_do_not_overflow():
    row = 1e4 * logits()
    assert choose(row, [Sampler(SamplingParams(temperature=1e-6))], [0.99]) == [int(row.argmax())]


def test_neighbours_do_not_change_what_a_row_draws():
    rows, order = logits(len(CASES)), list(range(len(CASES)))
    alone = [
        choose(rows[i : i + 1], [Sampler(SamplingParams(**CASES[i]))], [0.37 + i / 20])[0] for i in range(len(CASES))
    ]
    random.Random(1).shuffle(order)
    mixed = choose(rows[order], [Sampler(SamplingParams(**CASES[i])) for i in order], [0.37 + i / 20 for i in order])
    assert mixed == [alone[i] for i in order]


def test_log_probabilities_of_the_rows_that_ask():
    rows = logits(3)
    found = log_probabilities(rows, [4, 5, 6], [None, 0, 2])
    logs = rows.log_softmax(-1)
    assert found[0] is None
    assert found[1] == (pytest.approx(float(logs[1, 5])), ())
    assert found[2][0] == pytest.approx(float(logs[2, 6]))
    assert [i for i, _ in found[2][1]] == logs[2].topk(2).indices.tolist()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": "hot"}, {"temperature": True},
        {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"top_k": 1.5}, {"seed": 2**63}, {"seed": "x"},
        {"max_tokens": -1}, {"logprobs": 21}, {"stop": ""}, {"stop": ["a", 3]}, {"stop": ["a"] * 17},
        {"stop": "a" * 600},
        {"stop": 5}, {"logit_bias": {"a": 1}}, {"logit_bias": {1: 101}}, {"logit_bias": {-1: 1}}, {"logit_bias": [1]},
        {"presence_penalty": 3}, {"frequency_penalty": float("inf")},
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_field(bad):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**bad)
    assert caught.value.param == next(iter(bad))
    assert caught.value.body()["error"]["param"] == next(iter(bad))
