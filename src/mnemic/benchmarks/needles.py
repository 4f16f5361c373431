"""Needles: passkey, needle in a haystack over depth and length, and the lines of LongEval.

Papers: Mohtashami and Jaggi, Landmark Attention, 2023 (arXiv 2305.16300) for the passkey; Kamradt's test of 2023 for
the needle in a haystack; Li et al., LongChat / LongEval, 2023, for lines; InfiniteBench (arXiv 2402.13718) for the
passkey at a length in tokens and evenly stepped depths. Instructions are in our words.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import count as numbers
from math import exp
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError, InputError
from .babilong import data_folder
from .background import Document, named
from .draws import below, distinct
from .fitting import check_answers, counter, fill, full_prompt
from .haystack import Codec
from .ruler.needles import NOISE
from .ruler.scoring import match_all, match_all_words
from .task import Record, Task
from .words import PAIRS, pair

GARBAGE = (0, 100, 500, 1000, 5000, 8000, 10_000, 12_000, 14_000, 18_000, 20_000, 25_000, 38_000)
"""Characters of garbage in the published passkey runs, 50 samples each."""
NIAH_LENGTHS = tuple(round(1000 + 15_000 * i / 34) for i in range(35))
NIAH_DEPTHS = tuple(round(100 * i / 34) for i in range(35))
NIAH_BUFFER = 200
LINES = tuple(range(200, 681, 40))
_TASK_LINE = "There is important information hidden in a lot of irrelevant text. Find it and remember it."
_KEYS = 50_000


def first_integer(said: str) -> int | None:
    found = re.search(r"\d+", said)
    return None if found is None else int(found[0])


def passkey_score(said: str, record: Record) -> float:
    """Is the first integer that was said the key?"""
    return float(first_integer(said) == int(record.targets[0]))


def last_integer_score(said: str, record: Record) -> float:
    """Official rule of LongEval: is the last integer that was said the number? Anything said after it spoils it."""
    found = re.findall(r"\d+", said)
    return float(bool(found) and int(found[-1]) == int(record.targets[0]))


# ----------------------------------------------------------------------------------------------------------- passkey


def _passkey(key: int, prefix: str, suffix: str, depth: float) -> Record:
    told = f"The pass key is {key}. Keep it in mind: {key} is the pass key."
    context = "\n".join([_TASK_LINE, prefix, told, suffix])
    metadata = {"task": "passkey", "garbage": len(prefix) + len(suffix), "depth": depth}
    return Record(context, "What is the pass key? The pass key is", (str(key),), metadata)


def _garbage(start: int, stop: int) -> str:
    text = f"{NOISE} " * (stop // (len(NOISE) + 1) + 1)
    return text[start:stop]


def passkey(*, garbage: int = 10_000, seed: int = 0) -> Iterator[Record]:
    """Endless, of so many characters of garbage: a uniform share of it before the key, cut within words.

    The key is uniform in 1 .. 50,000. Both parts begin with the beginning of the garbage.

    Raises:
        ConfigError: a negative number.
    """
    if garbage < 0:
        raise ConfigError(f"garbage must be 0 or more characters; got {garbage}.")
    return _passkeys(garbage, seed)


def _passkeys(garbage: int, seed: int) -> Iterator[Record]:
    for number in numbers():
        rng = random.Random(f"mnemic.passkey|{garbage}|{seed}|{number}")
        key, before = 1 + below(rng, _KEYS), below(rng, garbage + 1)
        depth = 100 * before / garbage if garbage else 0.0
        yield _passkey(key, _garbage(0, before), _garbage(0, garbage - before), depth)


def passkey_tokens(*, tokenizer: Any, length: int, depths: int = 10, seed: int = 0) -> Iterator[Record]:
    """Endless, of `length` tokens with the answer: whole lines of noise, a 5-digit key, depths 0 .. 100 in turn.

    Raises:
        ConfigError: less than 2 depths.
        InputError: while iterating, a length that cannot hold the key.
    """
    if depths < 2:
        raise ConfigError(f"depths must be at least 2, from 0 to 100 percent; got {depths}.")
    return _passkey_tokens(tokenizer, length, depths, seed)


def _passkey_tokens(tokenizer: Any, length: int, depths: int, seed: int) -> Iterator[Record]:
    def build(key: int, depth: float, lines: int) -> Record:
        before = round(lines * depth / 100)
        return _passkey(key, "\n".join([NOISE] * before), "\n".join([NOISE] * (lines - before)), depth)

    size = 0
    for number in numbers():
        rng = random.Random(f"mnemic.passkey|tokens|{length}|{seed}|{number}")
        key = 10_000 + below(rng, 90_000)
        make = partial(build, key, 100 * (number % depths) / (depths - 1))
        record, size = fill(make, tokenizer, length, PASSKEY_TOKENS.max_new_tokens, 0, size)
        yield record


# --------------------------------------------------------------------------------------------- needle in a haystack

NEEDLE = ("The best thing to do in Lisbon is to ride the old yellow tram.", "What is the best thing to do in Lisbon?",
          "ride the old yellow tram")  # fmt: skip


def niah(
    *,
    tokenizer: Any,
    length: int,
    depth: float | None = None,
    seed: int = 0,
    needle: tuple[str, str, str] = NEEDLE,
    background: str | Sequence[Document] = "auto",
    data: str | Path | None = None,
    split: str = "test",
) -> Iterator[Record]:
    """Endless; the context has exactly `length` - 200 tokens (needle included) before it is decoded.

    The needle stands at token int(n depth / 100) of the n tokens of haystack, moved back to the end of a sentence; at
    depth 100 behind all. A token ends a sentence if its text ends with a full stop. Texts start at a random place and
    repeat where they are too short.

    Args:
        depth: percent; by default those of `NIAH_DEPTHS`, in turn.
        needle: sentence, question, and the part of the sentence that answers.

    Raises:
        ConfigError: a depth that is no percentage, or an answer that is not in the needle.
        InputError: a length that cannot hold the needle, or a tokenizer that cannot write it; while iterating, a
            prompt that does not fit.
    """
    if depth is not None and not 0 <= depth <= 100:
        raise ConfigError(f"depth is in percent, 0 to 100; got {depth}.")
    if needle[2] not in needle[0]:
        raise ConfigError(f"The answer {needle[2]!r} is not in the needle {needle[0]!r}.")
    codec = Codec(tokenizer)
    check_answers([needle[2]], codec)
    told = codec.encode(f" {needle[0]}")
    room = length - NIAH_BUFFER - len(told)
    if room < 1:
        raise InputError(
            f"{length} tokens less {NIAH_BUFFER} of buffer leave no room for a needle of {len(told)}; use a length of "
            f"at least {NIAH_BUFFER + len(told) + 1}."
        )
    given = named(background, split, data_folder(data)) if isinstance(background, str) else background
    texts = tuple(d.text for d in given if d.text.strip())
    if not texts:
        raise DataError("The background of the needle has no text; give documents.")
    return _niah(codec, length, room, depth, seed, needle, told, texts)


def _niah(
    codec: Codec,
    length: int,
    room: int,
    depth: float | None,
    seed: int,
    needle: tuple[str, str, str],
    told: Sequence[int],
    texts: Sequence[str],
) -> Iterator[Record]:
    @lru_cache(maxsize=8)
    def encoded(text: int) -> tuple[int, ...]:
        return codec.encode(f" {' '.join(texts[text].split())}")

    full_stop = lru_cache(maxsize=65_536)(lambda token: codec.decode([token]).rstrip().endswith("."))
    measure = counter(codec.tokenizer)
    for number in numbers():
        rng = random.Random(f"mnemic.niah|{length}|{seed}|{number}")
        at = below(rng, len(texts))
        # Not from the last tokens of a text: the haystack begins within a document.
        hay = list(encoded(at)[below(rng, max(1, len(encoded(at)) // 2)) :])
        while len(hay) < room:
            at = (at + 1) % len(texts)
            hay += encoded(at)
        hay = hay[:room]
        wanted = NIAH_DEPTHS[number % len(NIAH_DEPTHS)] if depth is None else depth
        place = int(len(hay) * wanted / 100)
        while 0 < place < len(hay) and not full_stop(hay[place - 1]):
            place -= 1
        context = codec.decode([*hay[:place], *told, *hay[place:]])
        metadata = {"task": "niah", "length": length, "depth": wanted, "place": place, "haystack": room}
        record = Record(context, f"{needle[1]}\nAnswer:", (needle[2],), metadata)
        tokens = measure(full_prompt(record))
        if tokens + NIAH.max_new_tokens > length:
            raise InputError(
                f"The prompt has {tokens} tokens, which with {NIAH.max_new_tokens} of answer is more than {length}: "
                f"the question is too long for the buffer of {NIAH_BUFFER}. Shorten it."
            )
        yield Record(record.context, record.question, record.targets, {**metadata, "tokens": tokens})


def sigmoid_depths(depths: Sequence[float] = NIAH_DEPTHS) -> tuple[float, ...]:
    """The depths crowded at both ends, by a logistic curve of rate 0.1 about 50; 0 and 100 stay."""
    return tuple(float(d) if d in (0, 100) else round(100 / (1 + exp(-0.1 * (d - 50))), 3) for d in depths)


def heat_map(scored: Iterable[tuple[Record, float]]) -> dict[tuple[int, float], tuple[float, int]]:
    """Mean score and number of samples by (length, depth), in order.

    Raises:
        InputError: a record of a task without depths.
    """
    cells: dict[tuple[int, float], list[float]] = defaultdict(list)
    for record, score in scored:
        if "length" not in record.metadata or "depth" not in record.metadata:
            raise InputError(f"A record of {record.metadata.get('task', 'a task')} has no length or no depth to map.")
        cells[record.metadata["length"], record.metadata["depth"]].append(score)
    return {cell: (sum(scores) / len(scores), len(scores)) for cell, scores in sorted(cells.items())}


# ------------------------------------------------------------------------------------------------- lines of LongEval


def _lines(rng: random.Random, count: int) -> Record:
    names = [pair(i) for i in distinct(rng, PAIRS, count)]
    contents = [1 + below(rng, _KEYS) for _ in names]
    asked = below(rng, count)
    text = "\n".join(
        f"line {name}: the register holds <{content}>" for name, content in zip(names, contents, strict=True)
    )
    opening = "Remember what the register holds in each of these lines. You will be asked for one of them."
    question = f"What does the register hold in line {names[asked]}? Answer with the number.\nAnswer:"
    metadata = {"task": "lines", "lines": count, "depth": 100 * asked / max(1, count - 1)}
    return Record(f"{opening}\n{text}", question, (str(contents[asked]),), metadata)


def longeval_lines(*, lines: int = 200, seed: int = 0) -> Iterator[Record]:
    """Endless, of so many lines (published: 200 to 680); names differ, numbers are uniform in 1 .. 50,000.

    Raises:
        ConfigError: no lines, or more than there are names.
    """
    if not 1 <= lines <= PAIRS:
        raise ConfigError(f"lines must be 1 to {PAIRS}, which is how many names there are; got {lines}.")
    return (_lines(random.Random(f"mnemic.lines|{lines}|{seed}|{number}"), lines) for number in numbers())


PASSKEY = Task("passkey", "arXiv 2305.16300", passkey, passkey_score, passkey_score, 10)
PASSKEY_TOKENS = Task("passkey_tokens", "arXiv 2402.13718", passkey_tokens, passkey_score, passkey_score, 10)
NIAH = Task("niah", "Kamradt 2023", niah, match_all, match_all_words, 50)
"""The published score is a judge model's; both rules here look for the answer in the text instead."""
LONGEVAL_LINES = Task("lines", "LongChat 2023", longeval_lines, last_integer_score, passkey_score, 100)

TASKS = {task.name: task for task in (PASSKEY, PASSKEY_TOKENS, NIAH, LONGEVAL_LINES)}
