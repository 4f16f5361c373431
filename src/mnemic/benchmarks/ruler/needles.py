"""RULER's eight needle tasks: sentences that say the special magic number of a key, hidden in a haystack."""

import random
import uuid
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...core.errors import DataError
from ..babilong import data_folder
from ..background import Document, named, sentence_spans
from ..draws import distinct, shuffled
from ..fitting import fill
from ..task import Record, Task
from ..words import PAIRS, pair
from .scoring import match_all, match_all_words

SOURCE = "RULER, arXiv 2404.06654"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The line that noise repeats, as in the passkey task of arXiv 2305.16300."""
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Depths of needles in an essay, percent; drawn without replacement."""
RESERVE = 128


@dataclass(frozen=True)
class NeedleTask:
    """Parameters of a task: kinds of haystack, keys and values; keys hidden, values a key, keys asked."""

    haystack: str
    keys: str
    values: str
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


PARAMETERS = {
    "niah_single_1": NeedleTask("noise", "words", "numbers"),
    "niah_single_2": NeedleTask("essay", "words", "numbers"),
    "niah_single_3": NeedleTask("essay", "words", "uuids"),
    "niah_multikey_1": NeedleTask("essay", "words", "numbers", num_keys=4),
    "niah_multikey_2": NeedleTask("needles", "words", "numbers"),
    "niah_multikey_3": NeedleTask("needles", "uuids", "uuids"),
    "niah_multivalue": NeedleTask("essay", "words", "numbers", num_values=4),
    "niah_multiquery": NeedleTask("essay", "words", "numbers", num_keys=4, num_queries=4),
}


class Essay:
    """Sentences of documents one after another, over and over; `take` gives the first words."""

    def __init__(self, documents: Iterable[Document]):
        self.sentences = [d.text[a:b].split() for d in documents for a, b in sentence_spans(d.text)]
        if not self.sentences:
            raise DataError("The background of the needle tasks has no sentences; give documents with text.")
        self.ends = list(accumulate(map(len, self.sentences)))

    def take(self, words: int) -> list[str]:
        """Sentences of so many words together, the last one cut."""
        rounds, rest = divmod(words, self.ends[-1])
        whole = bisect_left(self.ends, rest)
        before = self.ends[whole - 1] if whole else 0
        last = [self.sentences[whole][: rest - before]] if rest else []
        return [" ".join(s) for s in [*self.sentences * rounds, *self.sentences[:whole], *last]]


def needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def drawn(kind: str, rng: random.Random) -> str:
    """A random word pair, 7-digit number or uuid."""
    if kind == "words":
        return pair(int(rng.random() * PAIRS))
    if kind == "numbers":
        return str(1_000_000 + int(rng.random() * 9_000_000))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def unlike(kind: str, rng: random.Random, known: Iterable[str]) -> str:
    """As `drawn`, but none of `known`."""
    while (word := drawn(kind, rng)) in known:
        pass
    return word


def build(name: str, essay: Essay | None, seed: str, size: int) -> Record:
    """The record with a haystack of so many lines (an essay: words)."""
    task, rng = PARAMETERS[name], random.Random(seed)
    values: dict[str, list[str]] = {}
    known: set[str] = set()
    for _ in range(task.num_keys):
        key = unlike(task.keys, rng, values)
        values[key] = []
        for _ in range(task.num_values):
            values[key].append(unlike(task.values, rng, known))
            known.add(values[key][-1])
    needles = shuffled(rng, [needle(task.values, key, value) for key in values for value in values[key]])
    asked = [list(values)[i] for i in distinct(rng, len(values), task.num_queries)]
    if task.haystack == "essay":
        assert essay is not None
        context, depths = _in_essay(essay.take(size), needles, rng)
    else:
        context, depths = _in_lines(task, needles, values, known, rng, size)
    return _record(name, task, context, asked, [v for key in asked for v in values[key]], depths)


def _in_essay(sentences: Sequence[str], needles: Sequence[str], rng: random.Random) -> tuple[str, list[float]]:
    depths = sorted(DEPTHS[i] for i in distinct(rng, len(DEPTHS), len(needles)))
    parts, at = [], 0
    for depth, text in zip(depths, needles, strict=True):
        place = len(sentences) * depth // 100
        parts += [*sentences[at:place], text]
        at = place
    return " ".join([*parts, *sentences[at:]]), [float(d) for d in depths]


def _in_lines(
    task: NeedleTask,
    needles: Sequence[str],
    keys: Iterable[str],
    values: set[str],
    rng: random.Random,
    size: int,
) -> tuple[str, list[float]]:
    places = sorted(distinct(rng, size, len(needles)))
    if task.haystack == "noise":
        lines = [NOISE] * size
    else:
        # Another needle must not answer the question.
        lines = [
            needle(task.values, unlike(task.keys, rng, keys), unlike(task.values, rng, values)) for _ in range(size)
        ]
    for offset, (place, text) in enumerate(zip(places, needles, strict=True)):
        lines.insert(place + offset, text)
    return "\n".join(lines), [100 * place / size for place in places]


def _record(
    name: str, task: NeedleTask, context: str, asked: Sequence[str], targets: Sequence[str], depths: Sequence[float]
) -> Record:
    one = task.num_values * task.num_queries == 1
    kind = task.values[:-1] if one else task.values
    verb = "is" if one else "are"
    keys = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    what, they = (f"a special magic {kind}", "it") if one else (f"special magic {kind}", "them")
    opening = f"The text below hides {what}. Remember {they}: you will be asked."
    prefix = f"The special magic {kind} for {keys} in the text above {verb}"
    question = f"Question: What {verb} the special magic {kind} for {keys} in the text above?\n{prefix}"
    metadata = {"task": name, "depths": list(depths), "depth": depths[0], "answer_prefix": prefix}
    return Record(f"{opening}\n{context}", question, tuple(targets), metadata)


def records(
    name: str,
    *,
    tokenizer: Any,
    length: int,
    seed: int = 42,
    background: str | Sequence[Document] = "auto",
    data: str | Path | None = None,
    split: str = "test",
) -> Iterator[Record]:
    """Endless; each prompt with 128 tokens of answer is as long as `length` tokens allow.

    Args:
        background: "books", "prose", "pg19", documents, or "auto": books where there is a data folder, else prose.

    Raises:
        InputError: while iterating, a length that cannot hold the needles.
        DataError, UnknownNameError: the background.
    """
    task, essay = PARAMETERS[name], None
    if task.haystack == "essay":
        given = named(background, split, data_folder(data)) if isinstance(background, str) else background
        essay = Essay(given)
    hidden = task.num_keys * task.num_values
    return _endless(name, essay, tokenizer, length, seed, hidden)


def _endless(name: str, essay: Essay | None, tokenizer: Any, length: int, seed: int, least: int) -> Iterator[Record]:
    size, number = least, 0
    while True:
        make = partial(build, name, essay, f"mnemic.ruler|{name}|{seed}|{number}")
        record, size = fill(make, tokenizer, length, RESERVE, least, size)
        yield record
        number += 1


TASKS = {name: Task(name, SOURCE, partial(records, name), match_all, match_all_words, RESERVE) for name in PARAMETERS}
