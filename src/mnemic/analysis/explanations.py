"""Explanations of slots by what reads them most, and how well they foretell reads that they were not made from.

Source: the neuron explainer (Bills et al., Language models can explain neurons in language models, 2023), which LM2
(arXiv 2502.06049) runs on slots: explain the spans of the highest activation, simulate activations of other spans from
the explanation alone, and score it by their correlation with the true ones. An explainer is any callable; `top_ngrams`
needs no language model.
"""

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core.errors import InputError

LEAST_SPANS = 4


@dataclass(frozen=True)
class Span:
    """Some tokens in a row, and how strongly each reads the slot. start: of the first in the whole."""

    start: int
    tokens: tuple[str, ...]
    activations: tuple[float, ...]


class Explanation(Protocol):
    """What an explainer says of a slot."""

    @property
    def text(self) -> str:
        """For people."""
        ...

    def simulate(self, tokens: Sequence[str]) -> Sequence[float]:
        """An activation for each token, on any scale, from the explanation alone."""
        ...


class Explainer(Protocol):
    """Makes an explanation from the spans that read a slot most."""

    def __call__(self, spans: Sequence[Span]) -> Explanation: ...


@dataclass(frozen=True)
class SlotExplanation:
    """score: correlation of simulated and true activations on the held-out spans, -1 to 1; 0 where the simulation says
    the same of all tokens; None where the slot is read by all alike. spans: the most activating ones, best first.
    held_out: number of spans behind the score."""

    slot: int
    text: str
    score: float | None
    spans: tuple[Span, ...]
    held_out: int


def explain(
    activations: Tensor, tokens: Sequence[str], slot: int, explainer: Explainer | None = None, *, width: int = 16,
    best: int = 10, seed: int = 0,
) -> SlotExplanation:  # fmt: skip
    """Explains one slot.

    Args:
        activations: (T,), weights with which tokens read the slot. tokens: their texts. explainer: `top_ngrams` by
            default. width: tokens of a span. best: most activating spans, of which every second one goes to the
            explainer; the others are held out, with as many random ones of the rest.

    Raises:
        InputError: too few tokens, or an explainer that simulates another number of them.
    """
    if len(tokens) != len(activations):
        raise InputError(f"{len(tokens)} tokens with {len(activations)} activations.")
    spans = spans_of(activations, tokens, width)
    if len(spans) < LEAST_SPANS or best < 2:
        raise InputError(
            f"{len(tokens)} tokens in spans of {width}: an explanation takes at least {LEAST_SPANS} spans and best=2; "
            "give more text or shorter spans."
        )
    order = sorted(spans, key=lambda span: (-max(span.activations), span.start))
    top, rest = order[: min(best, len(spans) // 2)], order[min(best, len(spans) // 2) :]
    held = top[1::2] + random.Random(seed).sample(rest, min(len(top), len(rest)))
    made = (explainer or top_ngrams)(top[::2])
    simulated: list[float] = []
    for span in held:
        said = list(made.simulate(span.tokens))
        if len(said) != len(span.tokens):
            raise InputError(f"The explainer simulated {len(said)} activations for {len(span.tokens)} tokens.")
        simulated += said
    return SlotExplanation(
        slot, made.text, correlation(simulated, [a for s in held for a in s.activations]), tuple(top), len(held)
    )


def spans_of(activations: Tensor, tokens: Sequence[str], width: int) -> list[Span]:
    """Consecutive spans of `width` tokens; what is left at the end joins none."""
    values = activations.tolist()
    starts = range(0, len(tokens) - width + 1, width)
    return [Span(at, tuple(tokens[at : at + width]), tuple(values[at : at + width])) for at in starts]


def correlation(simulated: Sequence[float], true: Sequence[float]) -> float | None:
    """Pearson's; see `SlotExplanation` for constants."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (simulated, true))
    x, y = x - x.mean(), y - y.mean()
    if float(y.norm()) < 1e-12:
        return None
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 1e-24 else 0.0


@dataclass(frozen=True)
class NgramExplanation:
    """levels: by n-gram, the mean activation of its last token, the telling ones first; other: of all other tokens."""

    levels: dict[tuple[str, ...], float]
    other: float

    @property
    def text(self) -> str:
        said = [f"{' '.join(gram)!r} ({level:.2f})" for gram, level in self.levels.items()]
        return f"{', '.join(said)}; else {self.other:.2f}" if said else f"no n-gram; all {self.other:.2f}"

    def simulate(self, tokens: Sequence[str]) -> list[float]:
        """The first of the n-grams that ends at a token counts."""
        found = [self.other] * len(tokens)
        for gram, level in reversed(self.levels.items()):
            for end in range(len(gram), len(tokens) + 1):
                if tuple(tokens[end - len(gram) : end]) == gram:
                    found[end - 1] = level
        return found


def top_ngrams(spans: Sequence[Span], *, longest: int = 3, most: int = 5, least: int = 2) -> NgramExplanation:
    """Chooses n-grams one by one, each that which leaves the smallest squared error of the activations at its ends.

    longest: tokens of an n-gram. most: n-grams. least: occurrences of an n-gram.
    """
    values = torch.tensor([a for span in spans for a in span.activations], dtype=torch.float64)
    ends: dict[Hashable, list[int]] = defaultdict(list)
    offset = 0
    for span in spans:
        for end in range(1, len(span.tokens) + 1):
            for n in range(1, min(longest, end) + 1):
                ends[span.tokens[end - n : end]].append(offset + end - 1)
        offset += len(span.tokens)
    places = {gram: torch.tensor(at) for gram, at in ends.items() if len(at) >= least}
    free, levels = torch.ones(len(values), dtype=torch.bool), {}
    for _ in range(most):
        rest, gains = values[free], {}
        if len(rest) < 2 or float(rest.var(correction=0)) < 1e-18:
            break
        for gram, at in places.items():
            mine = values[at[free[at]]]
            if least <= len(mine) < len(rest):
                # Between the two groups; it is what a split takes off the squared error.
                gains[gram] = len(mine) * len(rest) / (len(rest) - len(mine)) * float(mine.mean() - rest.mean()) ** 2
        if not gains or max(gains.values()) <= 1e-18:
            break
        # Of equal ones the shorter, which says as much with less.
        gram = min(gains, key=lambda one: (-round(gains[one], 12), len(one)))
        levels[gram] = float(values[places[gram][free[places[gram]]]].mean())
        free[places[gram]] = False
    return NgramExplanation(levels, float(values[free].mean()) if bool(free.any()) else 0.0)
