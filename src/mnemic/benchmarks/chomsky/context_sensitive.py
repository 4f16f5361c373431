"""Context-sensitive tasks: a tape solves them. Numbers are of any width."""

import math
import random
from collections.abc import Callable

from ..draws import below, bits, positive
from .task import TERMINATOR, FormalTask

HIDDEN, PADDING = 2, 3
_OPERATOR = 2


def duplicate_string(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    x = bits(rng, length)
    return x, x + x


def missing_duplicate_string(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """A string twice with one symbol hidden (2), and 3 behind it if n is odd; which symbol? n = 1 is always 1."""
    if length == 1:
        return [1], [1]
    half = bits(rng, length // 2)
    x = half + half
    at = below(rng, len(x))
    hidden, x[at] = x[at], HIDDEN
    return x + [PADDING] * (length % 2), [hidden]


def odds_first(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """The symbols at places 2, 4, 6, ... counted from 1, then the others: so the released code, despite the name."""
    x = bits(rng, length)
    return x, x[1::2] + x[::2]


def _little_endian(number: int, width: int = 0) -> list[int]:
    return [int(digit) for digit in reversed(f"{number:b}".zfill(width))]


def _two_numbers(rng: random.Random, length: int, combine: Callable[[int, int], int]) -> tuple[list[int], list[int]]:
    first = 1 + below(rng, length - 2)
    a, b = positive(rng, first), positive(rng, length - 1 - first)
    x = [*_little_endian(a, first), _OPERATOR, *_little_endian(b, length - 1 - first)]
    return x, _little_endian(combine(a, b))


def _ended(y: list[int], size: int) -> list[int]:
    return [*y, TERMINATOR] + [0] * (size - 1 - len(y))


def binary_addition(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """Two numbers with 2 between them, lowest digit first; their sum, 2, zeros: n + 1. n < 3: one number, repeated."""
    if length < 3:
        number = below(rng, 2**length - 1)
        return _little_endian(number, length), _ended(_little_endian(number), length + 1)
    x, y = _two_numbers(rng, length, int.__add__)
    return x, _ended(y, length + 1)


def binary_multiplication(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """As `binary_addition`, with the product: n. n < 3: one number, and always n - 1 zeros and 2."""
    if length < 3:
        return _little_endian(below(rng, 2**length - 1), length), _ended([0] * (length - 1), length)
    x, y = _two_numbers(rng, length, int.__mul__)
    return x, _ended(y, length)


def compute_sqrt(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """A number, highest digit first; the floor of its square root in ceil(n / 2) digits."""
    number = positive(rng, length)
    root = f"{math.isqrt(number):b}".zfill((length + 1) // 2)
    return [int(digit) for digit in f"{number:b}".zfill(length)], [int(digit) for digit in root]


def bucket_sort(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    x = [below(rng, 5) for _ in range(length)]
    return x, sorted(x)


TASKS = (
    FormalTask("duplicate_string", "context-sensitive", 2, 2, duplicate_string),
    FormalTask("missing_duplicate_string", "context-sensitive", 4, 2, missing_duplicate_string),
    FormalTask("odds_first", "context-sensitive", 2, 2, odds_first),
    FormalTask("binary_addition", "context-sensitive", 3, 3, binary_addition, terminated=True),
    FormalTask("binary_multiplication", "context-sensitive", 3, 3, binary_multiplication, terminated=True),
    FormalTask("compute_sqrt", "context-sensitive", 2, 2, compute_sqrt),
    FormalTask("bucket_sort", "context-sensitive", 5, 5, bucket_sort),
)
