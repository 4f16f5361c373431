"""RULER's word counting: the ten common words of a list (cwe), the frequent nonsense words of a text (fwe)."""

import math
import random
from collections.abc import Iterator
from functools import partial
from string import ascii_lowercase
from typing import Any

from ...core.errors import InputError
from ..draws import choice, distinct, shuffled
from ..fitting import fill
from ..task import Record, Task
from ..words import NOUNS, PAIRS, SINGLES, pair
from .needles import SOURCE
from .scoring import match_all, match_all_words

COMMON = 10
MOST = 9000
"""Words in a list of cwe: so many are left whatever the common ones are."""
EXCLUDED = COMMON * len(NOUNS)
"""Joined words that ten common ones exclude at most."""
CWE_RESERVE, FWE_RESERVE = 120, 50
SHORT = 4096
"""Below this length cwe repeats its words less often."""
WORD_LENGTH, ALPHA, ZETA = 6, 2.0, math.pi**2 / 6


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _list(rng: random.Random, words: list[str], often: int, seldom: int) -> str:
    return _numbered(shuffled(rng, words[:COMMON] * often + words[COMMON:] * seldom))


def build_cwe(seed: str, short: bool, size: int) -> Record:
    """The record whose list has so many different words; the worked example has others."""
    rng = random.Random(seed)
    shown, repeats, example_repeats = (20, (6, 1), (3, 1)) if short else (40, (30, 3), (10, 3))
    singles: list[str] = shuffled(rng, SINGLES)
    example, words = singles[:shown], singles[shown:]
    if size > len(words):
        # A common word within a joined one would count where the joined one is said.
        joined = (pair(number, "") for number in distinct(rng, PAIRS, min(PAIRS, size + EXCLUDED)))
        words += [word for word in joined if not any(common in word for common in words[:COMMON])]
    words = words[:size]
    opening = "Some words of the numbered list below stand there more often than the others. Remember those.\n"
    question = f"Question: Which {COMMON} words are the most common in the list above?"
    prefix = f"Answer: The {COMMON} most common words in the list are:"
    first = f"{opening}{_list(rng, example, *example_repeats)}\n{question}\n{prefix} {_numbered(example[:COMMON])}\n"
    context = f"{first}{opening}{_list(rng, words, *repeats)}"
    metadata = {"task": "cwe", "words": size, "answer_prefix": prefix}
    return Record(context, f"{question}\n{prefix}", tuple(words[:COMMON]), metadata)


def cwe(*, tokenizer: Any, length: int, seed: int = 42) -> Iterator[Record]:
    """Endless; each prompt with 120 tokens of answer is as long as `length` tokens allow.

    Words are of a frozen list of 201; longer lists go on with two joined ("amberacorn"), and end at 9,000 words.

    Raises:
        InputError: while iterating, a length that cannot hold the example and ten common words.
    """
    size, number = COMMON + 1, 0
    while True:
        make = partial(build_cwe, f"mnemic.ruler|cwe|{seed}|{number}", length < SHORT)
        record, size = fill(make, tokenizer, length, CWE_RESERVE, COMMON + 1, size, MOST)
        yield record
        number += 1


def counts(size: int, vocabulary: int) -> list[int]:
    """How often the word of each rank stands in a text of about `size` words."""
    return [int(size * rank**-ALPHA / ZETA) for rank in range(1, vocabulary + 1)]


def build_fwe(seed: str, vocabulary: int, size: int) -> Record:
    """The record of about so many words."""
    rng = random.Random(seed)
    words: list[str] = []
    while len(words) < vocabulary:
        word = "".join(choice(rng, ascii_lowercase) for _ in range(WORD_LENGTH))
        if word not in words:
            words.append(word)
    # The most frequent word is shown as dots: noise.
    words[0] = "..."
    text = shuffled(rng, [w for w, n in zip(words, counts(size, vocabulary), strict=True) for _ in range(n)])
    opening = "The coded text below repeats some words. Keep count of them."
    question = "Question: Which three words are the most frequent in the coded text above? Leave out the dots '...'."
    prefix = "Answer: The three most frequent words are:"
    metadata = {"task": "fwe", "words": len(text), "answer_prefix": prefix}
    return Record(f"{opening}\n{' '.join(text)}", f"{question}\n{prefix}", tuple(words[1:4]), metadata)


def fwe(*, tokenizer: Any, length: int, seed: int = 42) -> Iterator[Record]:
    """Endless; each prompt with 50 tokens of answer is as long as `length` tokens allow.

    Deviation: every sample has an order of its own; the released code shuffles all with the same seed.

    Raises:
        InputError: while iterating, a length at which ranks 2 to 5 are not all different in number.
    """
    vocabulary = length // 50
    if vocabulary < 5:
        raise InputError(f"fwe needs a length of at least 250 tokens, for 5 different words; got {length}.")
    # The first size at which ranks 2, 3, 4 and 5 differ.
    least = next(n for n in range(1, 1000) if len({*counts(n, 5)[1:]}) == 4)
    return _fwe(tokenizer, length, seed, vocabulary, least)


def _fwe(tokenizer: Any, length: int, seed: int, vocabulary: int, least: int) -> Iterator[Record]:
    size, number = least, 0
    while True:
        make = partial(build_fwe, f"mnemic.ruler|fwe|{seed}|{number}", vocabulary)
        record, size = fill(make, tokenizer, length, FWE_RESERVE, least, size)
        if len({*counts(size, 5)[1:]}) < 4:
            raise InputError(
                f"fwe at {length} tokens: {size} words leave two of the ranks 2 to 5 equally frequent, so the answer "
                "is not decided. Use a greater length."
            )
        yield record
        number += 1


TASKS = {
    "cwe": Task("cwe", SOURCE, cwe, match_all, match_all_words, CWE_RESERVE),
    "fwe": Task("fwe", SOURCE, fwe, match_all, match_all_words, FWE_RESERVE),
}
