"""Random draws that use only `random()` and `getrandbits()`, whose sequences no Python release changes."""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def below(rng: random.Random, high: int) -> int:
    """Uniform in 0 .. high - 1, for high up to 2^50."""
    return int(rng.random() * high)


def bits(rng: random.Random, count: int) -> list[int]:
    """`count` fair bits."""
    number = rng.getrandbits(count) if count else 0
    return [number >> i & 1 for i in range(count)]


def positive(rng: random.Random, width: int) -> int:
    """Uniform in 1 .. 2^width - 1, of any width."""
    while True:
        number = rng.getrandbits(width)
        if number:
            return number


def choice(rng: random.Random, items: Sequence[T]) -> T:
    return items[below(rng, len(items))]


def distinct(rng: random.Random, high: int, count: int) -> list[int]:
    """`count` different numbers below `high`, in random order; every order is equally likely."""
    moved: dict[int, int] = {}
    drawn = []
    for i in range(count):
        j = i + below(rng, high - i)
        drawn.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return drawn


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return [items[i] for i in distinct(rng, len(items), len(items))]


def weighted(rng: random.Random, weights: Sequence[float], count: int) -> list[int]:
    """`count` different indices, drawn one after another with probability proportional to the weights that are left.

    An exponential clock for each index, of rate its weight: the order in which they ring is that of the draws.
    """
    times = [-math.log1p(-rng.random()) / weight for weight in weights]
    return sorted(range(len(weights)), key=times.__getitem__)[:count]
