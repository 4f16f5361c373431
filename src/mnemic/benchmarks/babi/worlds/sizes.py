"""qa18: what is bigger than what; a hidden order of a chocolate, a box of chocolates and four containers."""

import random
from collections.abc import Iterator
from itertools import combinations

from ..sample import QUESTIONS_PER_STORY, Asked, pick, shuffled
from ..words import CONTAINERS

_FACTS = 5


def qa18(rng: random.Random) -> Iterator[Asked]:
    """Size reasoning: five facts, or more until two of them chain; five questions that two facts answer."""
    order = ["chocolate", "box of chocolates", *shuffled(rng, CONTAINERS)]
    pairs = list(combinations(order, 2))
    facts: list[str] = []
    first: dict[tuple[str, str], int] = {}  # (smaller, bigger) -> the first fact that says so
    chains: list[tuple[tuple[str, str], tuple[str, str]]] = []
    while not chains:
        for _ in range(_FACTS):
            small, big = pick(rng, pairs)
            first.setdefault((small, big), len(facts))
            bigger = rng.random() < 0.5
            facts.append(f"The {big} is bigger than the {small}." if bigger else f"The {small} fits inside the {big}.")
        chains = [(low, high) for low in first for high in first if low[1] == high[0]]
    for _ in range(QUESTIONS_PER_STORY):
        low, high = pick(rng, chains)
        small, big = low[0], high[1]
        true = rng.random() < 0.5
        if not true:
            small, big = big, small
        bigger = rng.random() < 0.5
        question = f"Is the {big} bigger than the {small}?" if bigger else f"Does the {small} fit in the {big}?"
        supporting = first[high], first[low]
        yield tuple(facts), question, "yes" if true else "no", supporting if true else supporting[::-1]
