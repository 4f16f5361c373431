"""Regular tasks: a finite automaton solves them. One output symbol each."""

import random
from itertools import pairwise

from ..draws import below, bits
from .task import FormalTask

MODULUS = 5
PLUS, MINUS, TIMES = MODULUS, MODULUS + 1, MODULUS + 2


def even_pairs(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """Are the adjacent unequal pairs odd in number? The same as: do first and last symbol differ?"""
    x = bits(rng, length)
    return x, [sum(a != b for a, b in pairwise(x)) % 2]


def modular_arithmetic(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """Numbers 0 .. 4 with + (5), - (6) and * (7) between them, * first; the value modulo 5. An even n means n - 1."""
    x = [below(rng, MODULUS) if i % 2 == 0 else PLUS + below(rng, 3) for i in range(length - 1 + length % 2)]
    total, term, sign = 0, x[0], 1
    for operator, number in zip(x[1::2], x[2::2], strict=True):
        if operator == TIMES:
            term *= number
        else:
            total += sign * term
            term, sign = number, -1 if operator == MINUS else 1
    return x, [(total + sign * term) % MODULUS]


def parity_check(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """Is the number of ones odd?"""
    x = bits(rng, length)
    return x, [sum(x) % 2]


def cycle_navigation(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """Steps back (0), none (1) or forward (2) on a cycle of 5; the place in the end."""
    x = [below(rng, 3) for _ in range(length)]
    return x, [sum(step - 1 for step in x) % MODULUS]


TASKS = (
    FormalTask("even_pairs", "regular", 2, 2, even_pairs),
    FormalTask("modular_arithmetic", "regular", 9, MODULUS, modular_arithmetic),
    FormalTask("parity_check", "regular", 2, 2, parity_check),
    FormalTask("cycle_navigation", "regular", 3, MODULUS, cycle_navigation),
)
