"""Capacity curves: answers counted against a loop, guessing taken off, intervals."""

import pytest
import torch

import mnemic
from mnemic.analysis import CapacityPoint, capacity_curve
from mnemic.core.errors import InputError
from mnemic.training.data import IGNORED
from tests.tiny import VOCABULARY, random_ids, tiny_host


@pytest.fixture(scope="module")
def model():
    return mnemic.attach(tiny_host(), "lm2", segment=8, num_slots=4, identity_start=False).eval()


def _draws(model, right, lengths=(12,), run=1):
    """Samples that are right in turn as `right` says, since the model's own answers are their labels, or not."""
    made = iter(range(10**6))

    def draw():
        n = next(made)
        ids = random_ids(1, lengths[n % len(lengths)], seed=n)
        for place in range(ids.shape[1] - run, ids.shape[1]):
            with torch.no_grad():
                ids[0, place] = model(ids[:, :place]).logits[0, -1].argmax()
        if not right[n % len(right)]:
            ids[0, -1] = (ids[0, -1] + 1) % VOCABULARY
        labels = [IGNORED] * (ids.shape[1] - run) + ids[0, -run:].tolist()
        return {"input_ids": ids[0].tolist(), "labels": labels}

    return draw


def test_answers_are_counted(model):
    draws = {4: _draws(model, [True, False]), 2: _draws(model, [True], lengths=(9, 14), run=3)}
    two, four = capacity_curve(model, draws, samples=8, batch_size=3)
    assert (two.facts, two.answers, two.accuracy) == (2, 8, 1.0)
    assert (four.facts, four.answers, four.accuracy) == (4, 8, 0.5)


def test_one_wrong_token_makes_an_answer_wrong_and_no_other(model):
    def draw():
        one = _draws(model, [False], run=2)()
        middle = one["input_ids"]
        # Another answer in front, right, apart from the wrong one.
        with torch.no_grad():
            said = model(torch.tensor([middle])).logits[0, 3].argmax()
        if int(said) != middle[4]:
            middle = [*middle[:4], int(said), *middle[5:]]
        return {"input_ids": middle, "labels": [*[IGNORED] * 4, middle[4], *[IGNORED] * 5, *middle[-2:]]}

    (point,) = capacity_curve(model, {1: draw}, samples=2)
    assert point.answers == 4
    assert point.accuracy == 0.5


def test_guessing_is_taken_off():
    point = CapacityPoint(facts=8, answers=100, accuracy=0.25, low=0.1, high=0.5, chance=0.125)
    # Known: k of 8; the others are guessed right with chance.
    k = point.recalled
    assert k / 8 + (1 - k / 8) * 0.125 == pytest.approx(0.25)
    assert point.bounds == (0.0, pytest.approx(8 * 0.375 / 0.875))


def test_the_interval_holds_the_accuracy(model):
    (point,) = capacity_curve(model, {1: _draws(model, [True])}, samples=4)
    # Wilson's interval for 4 of 4.
    assert point.high == 1.0
    assert point.low == pytest.approx(4 / (4 + 1.96**2))


def test_what_cannot_be_measured(model):
    with pytest.raises(InputError, match="no label"):
        capacity_curve(model, {1: lambda: {"input_ids": [3, 4], "labels": [IGNORED] * 2}}, samples=1)
    for bad in ({"draws": {}}, {"draws": {0: None}}, {"samples": 0}, {"chance": 1.0}):
        options = {"draws": {1: _draws(model, [True])}, **bad}
        with pytest.raises(InputError, match="capacity curve"):
            capacity_curve(model, options.pop("draws"), **options)
