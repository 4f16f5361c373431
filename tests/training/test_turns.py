"""Training over turns: weights, stretches, gradients against a loop, and what is refused."""

from typing import Any

import pytest
import torch

from mnemic import ConfigError, InputError
from mnemic.training.turns import backward_turns, turn_weights
from tests.contract.encoder_decoders import SEGMENT, build
from tests.tiny import random_ids


def turns(count: int, labelled: tuple[int, ...] | None = None):
    found = [
        {"input_ids": random_ids(2, SEGMENT, seed=i), "labels": random_ids(2, 3, seed=50 + i)} for i in range(count)
    ]
    for i in range(count):
        if labelled is not None and i not in labelled:
            found[i]["labels"] = torch.full((2, 3), -100)
    return found


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_weights_double_and_sum_to_one():
    torch.testing.assert_close(turn_weights(3), torch.tensor([1.0, 2.0, 4.0]) / 7)
    torch.testing.assert_close(turn_weights(4, 1.0), torch.full((4,), 0.25))
    many = turn_weights(3000)
    assert float(many.sum()) == pytest.approx(1)
    assert float(many[-1]) == pytest.approx(0.5)


@pytest.mark.parametrize("horizon", [5, 2, 1])
def test_gradients_are_those_of_the_weighted_losses(horizon):
    model, given = build().double(), turns(5)
    got = backward_turns(model, given, horizon=horizon)
    found = gradients(model)
    state: Any = None
    total: Any = 0.0
    losses = []
    for start in range(0, 5, horizon):
        stretch = given[start : start + horizon]
        weights = [2.0**i for i in range(len(stretch))]
        for turn, weight in zip(stretch, weights, strict=True):
            output = model(**turn, memory_state=state)
            state = output.memory_state
            losses.append(output.loss)
            total = total + output.loss * weight / sum(weights) / -(-5 // horizon)
        state = state.detach()
    total.backward()
    torch.testing.assert_close(got.loss.double(), total.detach())
    torch.testing.assert_close(got.turns.double(), torch.stack(losses).detach(), atol=1e-6, rtol=1e-6)
    assert got.state.equal(state)
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def test_turns_without_labels_are_read_and_weigh_nothing():
    model, given = build(), turns(3, labelled=(1,))
    del given[2]["labels"]
    got = backward_turns(model, given)
    with torch.no_grad():
        first = model.read(given[0]["input_ids"]).memory_state
        second = model(**given[1], memory_state=first)
        third = model.read(given[2]["input_ids"], memory_state=second.memory_state)
    assert got.turns.isnan().tolist() == [True, False, True]
    torch.testing.assert_close(got.loss, second.loss)
    assert got.state.equal(third.memory_state)
    # What the first turn wrote is trained by the loss of the second.
    assert bool(model.memory.blocks[0].fc1.weight.grad.any())


def test_the_state_goes_on_from_dialogue_to_dialogue():
    model, given = build(), turns(4)
    whole = backward_turns(model, given, horizon=2)
    first = backward_turns(model, given[:2], horizon=2)
    second = backward_turns(model, given[2:], horizon=2, memory_state=first.state)
    assert second.state.equal(whole.state)
    torch.testing.assert_close((first.loss + second.loss) / 2, whole.loss)


@pytest.mark.parametrize(
    "given, options, error, message",
    [
        (turns(2, labelled=()), {}, InputError, "None of 2 turns has labels"),
        ([], {}, InputError, "None of 0 turns"),
        (turns(2), {"horizon": 0}, ConfigError, "horizon = 0"),
        (turns(2), {"growth": 0.0}, ConfigError, "growth above 0"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(given, options, error, message):
    with pytest.raises(error, match=message):
        backward_turns(build(), given, **options)
