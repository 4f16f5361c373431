"""Capacity: how many facts a memory gives back of those that it was told."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from ..core.errors import InputError
from ..hosts import base_model
from ..training.data import IGNORED, Example

Draw = Callable[[], Example]
"""Makes a sample that tells some facts and asks for one or several. Its labels are the answers' tokens; labels side by
side are one answer, right if all of them are."""


@dataclass(frozen=True)
class CapacityPoint:
    """facts: stored. accuracy: share of the answers that are right. low, high: its 95% interval (Wilson), with answers
    taken for independent. chance: of an answer that is guessed. recalled: facts that are known if the others are
    guessed, n (accuracy - chance) / (1 - chance), at least 0; arXiv 2407.04841."""

    facts: int
    answers: int
    accuracy: float
    low: float
    high: float
    chance: float

    @property
    def recalled(self) -> float:
        return self._known(self.accuracy)

    @property
    def bounds(self) -> tuple[float, float]:
        """`recalled` at the ends of the interval."""
        return self._known(self.low), self._known(self.high)

    def _known(self, accuracy: float) -> float:
        return max(self.facts * (accuracy - self.chance) / (1 - self.chance), 0.0)


def capacity_curve(
    model: Any, draws: Mapping[int, Draw], *, chance: float = 0.0, samples: int = 64, batch_size: int = 16
) -> list[CapacityPoint]:
    """A point for each number of facts, each sample read from a new state; for every memory.

    Args:
        model: an attached model, trained on samples of the kind. draws: by number of facts, what makes samples; those
            of one number may differ in length. chance: of an answer that is guessed.

    Raises:
        InputError: numbers that cannot be, or a sample without labels.
    """
    if samples < 1 or batch_size < 1 or not 0 <= chance < 1 or not draws or min(draws) < 1:
        raise InputError("A capacity curve takes numbers of facts, samples and rows of at least 1, chance below 1.")
    base = base_model(model)
    base.eval()
    return [_point(facts, _right(base, draw, samples, batch_size), chance) for facts, draw in sorted(draws.items())]


def _right(base: Any, draw: Draw, samples: int, batch_size: int) -> list[bool]:
    drawn = [draw() for _ in range(samples)]
    right: list[bool] = []
    for batch in _alike(drawn, batch_size):
        ids, labels = (torch.tensor([one[key] for one in batch]) for key in ("input_ids", "labels"))
        if not bool((labels[:, 1:] != IGNORED).any(1).all()):
            raise InputError("A sample of a capacity curve has no label; expected labels at the answers' tokens.")
        first = int((labels[:, 1:] != IGNORED).any(0).nonzero()[0]) + 1
        with torch.no_grad():
            logits = base(ids.to(base.device), use_cache=False, logits_to_keep=ids.shape[1] - first + 1).logits
        said, asked = logits[:, :-1].argmax(-1).cpu(), labels[:, first:]
        right += [one for row in zip(said.tolist(), asked.tolist(), strict=True) for one in _answers(*row)]
    return right


def _answers(said: list[int], asked: list[int]) -> Iterator[bool]:
    pairs = zip(said, asked, strict=True)
    for marked, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        if marked:
            yield all(a == b for a, b in run)


def _alike(drawn: list[Example], batch_size: int) -> Iterator[list[Example]]:
    """Batches of equal lengths."""
    by_length: dict[int, list[Example]] = {}
    for one in drawn:
        by_length.setdefault(len(one["input_ids"]), []).append(one)
    for group in by_length.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _point(facts: int, right: list[bool], chance: float) -> CapacityPoint:
    n, accuracy = len(right), sum(right) / len(right)
    z = 1.96
    centre = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z * ((accuracy * (1 - accuracy) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    return CapacityPoint(facts, n, accuracy, max(centre - half, 0.0), min(centre + half, 1.0), chance)
