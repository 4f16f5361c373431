"""Turns: training an encoder-decoder with memory over dialogues, later turns counting more (MemBART, arXiv 2209.07634).

The loss of turn t of a stretch weighs w_t = 2^t / (2^0 + ... + 2^(n - 1)): what early turns say shows in later replies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.state import State


@dataclass(frozen=True)
class TurnLosses:
    """What a dialogue gave. loss: mean over stretches of their weighted losses, detached. turns: (N,) the host's own
    loss of each turn, detached, NaN for turns without labels. state: after the last turn, detached."""

    loss: Tensor
    turns: Tensor
    state: State


def turn_weights(count: int, growth: float = 2.0) -> Tensor:
    """Weights of a stretch's turns, (count,), sum 1: each `growth` times the one before.

    Raises:
        ConfigError: no turn, or a growth that is not above 0.
    """
    if count < 1 or not 0 < growth < float("inf"):
        raise ConfigError(
            f"Weights of {count} turns growing by {growth}: expected at least 1 turn and a growth above 0."
        )
    # From the last turn back, so that nothing overflows.
    weights = growth ** torch.arange(1 - count, 1, dtype=torch.float64)
    return (weights / weights.sum()).float()


def backward_turns(
    model: Any,
    turns: Sequence[Mapping[str, Any]],
    *,
    horizon: int = 6,
    growth: float = 2.0,
    memory_state: State | None = None,
) -> TurnLosses:
    """Read a dialogue and leave the gradients of its loss in the parameters.

    Args:
        model: an encoder-decoder with memory. turns: what `model(...)` takes for each: input_ids (B, T),
            attention_mask, labels (B, n) with -100 to ignore; a turn without any label is read only.
        horizon: turns of a stretch: gradients reach back through the state so far, and activations are kept as long.
            The paper has 5 to 7.
        growth: see `turn_weights`; they are of the turns of a stretch that have labels. memory_state: to start from.

    Raises:
        ConfigError: a horizon below 1. InputError: no turns, or none with labels.
    """
    if horizon < 1:
        raise ConfigError(f"horizon = {horizon}: expected at least 1 turn.")
    told = [bool((turn["labels"] != -100).any()) if turn.get("labels") is not None else False for turn in turns]
    if not any(told):
        raise InputError(f"None of {len(turns)} turns has labels; expected at least one to learn from.")
    stretches = [range(i, min(i + horizon, len(turns))) for i in range(0, len(turns), horizon)]
    learned = sum(any(told[i] for i in stretch) for stretch in stretches)
    state, found, total = memory_state, torch.full((len(turns),), float("nan")), torch.zeros(())
    for stretch in stretches:
        count = sum(told[i] for i in stretch)
        weights = iter(turn_weights(count, growth).tolist() if count else ())
        losses = []
        for i in stretch:
            if not told[i]:
                reading = {k: v for k, v in turns[i].items() if k in ("input_ids", "attention_mask", "inputs_embeds")}
                state = model.read(**reading, memory_state=state).memory_state
                continue
            output = model(**turns[i], memory_state=state)
            state = output.memory_state
            losses.append(output.loss * next(weights))
            found[i] = output.loss.detach()
        if losses:
            loss = torch.stack(losses).sum() / learned
            loss.backward()
            total = total + loss.detach().to(total.device)
        assert state is not None
        state = state.detach()
    assert state is not None
    return TurnLosses(total, found, state)
