"""What a sample is, and the random draws that all generators share."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

Asked = tuple[tuple[str, ...], str, str, tuple[int, ...]]
"""Facts, question, answer, supporting facts."""
World = Callable[[random.Random], Iterator[Asked]]
"""Tells one story: its questions, each with all facts before it."""

FACTS_PER_QUESTION = 2
QUESTIONS_PER_STORY = 5
WINDOW = (1.0, 0.95, 0.8, 0.75, 0.55)
"""How readily a fact 1, 2, ... back is asked about; never one further back. Counted on the release (qa6 to qa10)."""


@dataclass(frozen=True, slots=True)
class BabiSample:
    """One question with all facts told before it.

    Attributes:
        task: "qa1" .. "qa20".
        facts: the sentences, in story order, as in the file.
        question: as in the file; most v1.2 questions end in "? " with a blank.
        answer: as in the file; several words are joined by ",".
        supporting: indices into `facts`, in the order in which the file lists them.
        provenance: where the sample comes from, for reports.
    """

    task: str
    facts: tuple[str, ...]
    question: str
    answer: str
    supporting: tuple[int, ...]
    provenance: str


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """A uniform choice that uses only `rng.random()`, whose sequence no Python release changes."""
    return items[int(rng.random() * len(items))]


def pick_weighted(rng: random.Random, weights: Mapping[T, float]) -> T:
    """A choice in proportion to positive weights, by one `rng.random()`."""
    # fsum: exact, so the same for every Python; sum() rounds differently from 3.12 on.
    at = rng.random() * math.fsum(weights.values())
    for item, weight in weights.items():
        at -= weight
        if at < 0:
            return item
    return list(weights)[-1]  # what rounding left over


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """The items in random order, by `rng.random()` only."""
    return sorted(items, key=lambda _: rng.random())


def pick_recent(
    rng: random.Random, said: Mapping[T, int], now: int, window: Sequence[float] = WINDOW
) -> T | None:  # fmt: skip
    """An item by how long ago it was said last, or None where all are out of the window.

    Args:
        said: item -> index of the fact that said it last. now: facts told. window: weight of 1, 2, ... facts back.
    """
    near = {item: window[now - fact - 1] for item, fact in said.items() if now - fact <= len(window)}
    return pick_weighted(rng, near) if near else None
