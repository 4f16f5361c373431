"""RULER's variable tracking (vt): one chain of assignments in noise; which variables have its value?"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from string import ascii_uppercase
from typing import Any

from ..draws import below, choice, distinct
from ..fitting import fill
from ..task import Record, Task
from .needles import NOISE, SOURCE
from .scoring import match_all, match_all_words

HOPS = 4
RESERVE = 30
_SENTENCES = [f"{sentence}." for sentence in NOISE.rstrip(".").split(". ")]


def _chain(rng: random.Random, letters: int) -> tuple[list[str], list[str], str]:
    """Names, assignments in order, and the value."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(choice(rng, ascii_uppercase) for _ in range(letters))
        if name not in names:
            names.append(name)
    # The released code never draws 99999.
    value = str(10_000 + below(rng, 89_999))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
    return names, lines, value


def _hidden(rng: random.Random, noise: list[str], lines: list[str]) -> tuple[str, list[float]]:
    """The lines in order before random different lines of noise, and how deep, in percent."""
    places = sorted(distinct(rng, len(noise), len(lines)))
    mixed = list(noise)
    for offset, (place, line) in enumerate(zip(places, lines, strict=True)):
        mixed.insert(place + offset, line)
    return "\n".join(mixed), [100 * place / len(noise) for place in places]


def _asked(value: str) -> tuple[str, str]:
    question = f"Question: Which variables have the value {value} in the text above?"
    prefix = f"Answer: In the text above, {HOPS + 1} variables have the value {value}:"
    return question, prefix


def build(seed: str, size: int) -> Record:
    """The record with so many lines of noise. The worked example in front has its own names and value."""
    rng = random.Random(seed)
    opening = "Follow the chain of variable assignments that is hidden in the text below.\n\n"
    example, lines, value = _chain(rng, 3)
    question, prefix = _asked(value)
    shown = f"{opening}{_hidden(rng, _SENTENCES, lines)[0]}\n{question}\n{prefix} {' '.join(example)}\n\n"
    names, lines, value = _chain(rng, 5)
    text, depths = _hidden(rng, [NOISE] * size, lines)
    question, prefix = _asked(value)
    metadata = {"task": "vt", "depths": depths, "depth": depths[0], "answer_prefix": prefix}
    return Record(f"{shown}{opening}{text}", f"{question}\n{prefix}", tuple(names), metadata)


def records(*, tokenizer: Any, length: int, seed: int = 42) -> Iterator[Record]:
    """Endless; each prompt with 30 tokens of answer is as long as `length` tokens allow.

    Deviation: the example's noise is one line, cut into its sentences, so that short lengths have room for it.

    Raises:
        InputError: while iterating, a length that cannot hold example and chain.
    """
    size, number = HOPS + 1, 0
    while True:
        make = partial(build, f"mnemic.ruler|vt|{seed}|{number}")
        record, size = fill(make, tokenizer, length, RESERVE, HOPS + 1, size)
        yield record
        number += 1


TASKS = {"vt": Task("vt", SOURCE, records, match_all, match_all_words, RESERVE)}
