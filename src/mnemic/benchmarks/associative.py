"""Associative recall at token level: MQAR and its variants, MQAR across segments, and examples made of them.

Papers: Arora et al., Zoology, 2023 (arXiv 2312.04927). A row of multi-query associative recall (MQAR) of T tokens:

    K V K V ... K V . K . . . K . . K . . .
    0               | 2 * pairs: the questions; each key once, at even offsets

Vocabulary V: 0 is filler, 1 .. V/2 - 1 are keys, V/2 .. V - 1 are values. The question for pair i stands in slot
g_i, and the slots are drawn without replacement with probability proportional to a j^(a - 1) for slot j = 1, 2, ...
(a = `power`: 0.01 is about 1 / j, so questions crowd behind the pairs; 1 is uniform, where position is no help).

Labels follow the convention of Hugging Face: the model shifts, so the value that is to be said at a question stands in
`labels` one place after it. The value is not in `input_ids`, unless `answered`.

Deviations from the released code: the vocabulary need not exceed the length; an update never repeats the old value of
its key (there it does with probability 2 / V); samples depend on seed and position alone, not on the order of calls.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..training.data import IGNORED, Example, SegmentLaw
from ..training.positions import Positioned
from .draws import below, distinct, weighted


class Question(NamedTuple):
    """columns: of the labels that all have to be right. distance: segments from what is asked for to the question."""

    columns: tuple[int, ...]
    distance: int | None = None


class TokenTask(Protocol):
    """Sizes of a task whose samples are token ids; a frozen dataclass.

    Where a labelled token is not a question of its own, or distances are known, it has `questions(example)`.
    """

    @property
    def vocabulary(self) -> int: ...

    @property
    def chance(self) -> float:
        """Share of the labelled tokens that a guess among the possible answers gets right."""
        ...

    def example(self, rng: random.Random) -> Example: ...


class TokenExamples(Positioned):
    """Endless examples of a task; sample i depends on the seed and i alone, so going on at a position costs little.

    Args:
        law: how many segments each sample has, for a task that has `with_segments`; by default as the task says.

    Raises:
        ConfigError: a law for a task without segments, or numbers of segments that the task cannot have.
    """

    def __init__(self, task: TokenTask, seed: int = 0, law: SegmentLaw | None = None):
        if law is not None and not hasattr(task, "with_segments"):
            raise ConfigError(f"{type(task).__name__} has no segments to vary; leave law out.")
        self.task, self.seed, self.law = task, seed, law
        for count in () if law is None else (law.least, *law.most):
            self._sized(count)

    def _draws(self) -> Iterator[tuple[int, int | None]]:
        counts = itertools.repeat(None) if self.law is None else self.law.draw(self.seed)
        return enumerate(counts)

    def _example(self, drawn: tuple[int, int | None]) -> Example:
        position, count = drawn
        task = self._sized(count)
        return task.example(random.Random(f"mnemic.tokens|{type(task).__name__}|{self.seed}|{position}"))

    def _sized(self, count: int | None) -> Any:
        task: Any = self.task
        return task if count is None else task.with_segments(count)

    def _content(self) -> Iterator[Any]:
        yield self.task, self.seed, None if self.law is None else self.law.content()


def rows(task: TokenTask, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The first `count` examples as ids and labels, int64 [count, T]."""
    examples = list(itertools.islice(TokenExamples(task, seed), count))
    return torch.tensor([e["input_ids"] for e in examples]), torch.tensor([e["labels"] for e in examples])


def accuracy(said: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of labelled tokens that are right, and of rows with all of them right.

    Args:
        said: int64 [B, T], the token said for each place of `labels` (logits one place before it).
        labels: int64 [B, T], -100 where nothing is asked.
    """
    asked = labels != IGNORED
    right = said == labels
    return float(right[asked].float().mean()), float((right | ~asked).all(1).float().mean())


@dataclass(frozen=True, kw_only=True)
class Mqar:
    """MQAR, and with `updates` its forgetting variant: some keys come again with another value, and the last counts.

    Args:
        vocabulary: V. length: T, even. pairs: n. power: a of the law of gaps, above 0.
        updates: u of the n keys are written again after the pairs.
        random_others: put uniform random tokens where filler is. They may repeat keys; say so beside results.
        earliest: the first place of the questions, even; by default right after the pairs.
        answered: let each question be followed by its value.

    Raises:
        ConfigError: sizes that cannot be.
    """

    vocabulary: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    updates: int = 0
    random_others: bool = False
    earliest: int | None = None
    answered: bool = False

    def __post_init__(self) -> None:
        written = 2 * (self.pairs + self.updates)
        if self.pairs < 1 or not 0 <= self.updates <= self.pairs:
            raise ConfigError(f"{self.pairs} pairs, {self.updates} updates: expected 1 or more, and 0 to all of them.")
        if self.length % 2 or written + 2 * self.pairs > self.length:
            raise ConfigError(
                f"{self.pairs} pairs, {self.updates} updates and the questions need an even length of at least "
                f"{written + 2 * self.pairs}; got {self.length}."
            )
        if not self.power > 0:
            raise ConfigError(f"power must be above 0; got {self.power}.")
        _check_vocabulary(self.vocabulary, self.pairs, self.pairs + (1 if self.updates else 0))
        first = self.first_question
        if first % 2 or not written <= first <= self.length - 2 * self.pairs:
            raise ConfigError(
                f"earliest must be even, from {written} (end of the pairs) to {self.length - 2 * self.pairs} (room for "
                f"the questions); got {first}."
            )

    @property
    def first_question(self) -> int:
        return 2 * (self.pairs + self.updates) if self.earliest is None else self.earliest

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def example(self, rng: random.Random) -> Example:
        keys, values = _pairs(rng, self.vocabulary, self.pairs)
        said = [*zip(keys, values, strict=True)]
        for i in distinct(rng, self.pairs, self.updates):
            old = values[i]
            while values[i] == old:
                values[i] = _value(rng, self.vocabulary)
            said.append((keys[i], values[i]))
        ids = [token for pair in said for token in pair]
        ids += [0] * (self.length - len(ids))
        labels = [IGNORED] * self.length
        first = self.first_question
        # The factor a of the law does not change the proportions.
        gaps = [(j + 1) ** (self.power - 1) for j in range((self.length - first) // 2)]
        for key, value, slot in zip(keys, values, weighted(rng, gaps, self.pairs), strict=True):
            at = first + 2 * slot
            ids[at], labels[at + 1] = key, value
            if self.answered:
                ids[at + 1] = value
        if self.random_others:
            ids = [token or below(rng, self.vocabulary) for token in ids]
        return Example(input_ids=ids, labels=labels)


@dataclass(frozen=True, kw_only=True)
class CompositionalMqar:
    """MQAR whose keys are two tokens, from a full grid of `grid` x `grid`: neither token alone tells the value.

    Three tokens an entry, entries in random order; then questions of two tokens at even offsets, uniformly.

    Raises:
        ConfigError: sizes that cannot be.
    """

    vocabulary: int = 8192
    length: int = 64
    grid: int = 2

    def __post_init__(self) -> None:
        if self.grid < 2:
            raise ConfigError(f"grid must be at least 2; got {self.grid}.")
        least = 5 * self.grid**2 + 1
        if self.length < least:
            raise ConfigError(
                f"A {self.grid} x {self.grid} grid needs a length of at least {least}; got {self.length}."
            )
        _check_vocabulary(self.vocabulary, 2 * self.grid, self.grid**2)

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def example(self, rng: random.Random) -> Example:
        count = self.grid**2
        tokens = [1 + key for key in distinct(rng, self.vocabulary // 2 - 1, 2 * self.grid)]
        first, second = tokens[: self.grid], tokens[self.grid :]
        _, values = _pairs(rng, self.vocabulary, count)
        entries = [(first[i // self.grid], second[i % self.grid], value) for i, value in enumerate(values)]
        ids = [token for i in distinct(rng, count, count) for token in entries[i]]
        start = len(ids)
        ids += [0] * (self.length - start)
        labels = [IGNORED] * self.length
        for (a, b, value), slot in zip(entries, distinct(rng, (self.length - start - 1) // 2, count), strict=True):
            at = start + 2 * slot
            ids[at], ids[at + 1], labels[at + 2] = a, b, value
        return Example(input_ids=ids, labels=labels)


@dataclass(frozen=True, kw_only=True)
class SegmentMqar:
    """MQAR across segments: pairs anywhere in all segments but the last, all questions in the last one.

    Only what is carried from segment to segment can answer. Pairs stand at random even places, in random order;
    questions at random even places of the last segment; the rest is filler.

    Args:
        asked: so many of the pairs, any of them, are asked; None for all. With fewer there may be more pairs than one
            segment has room to ask.

    Raises:
        ConfigError: sizes that cannot be.
    """

    vocabulary: int = 128
    segments: int = 3
    segment_length: int = 32
    pairs: int = 4
    asked: int | None = None

    def __post_init__(self) -> None:
        if self.segments < 2 or self.segment_length < 2 or self.segment_length % 2:
            raise ConfigError(
                f"{self.segments} segments of {self.segment_length} tokens: expected at least 2, of an even length."
            )
        room = self.segment_length // 2
        if self.asked is None and not 1 <= self.pairs <= room:
            raise ConfigError(
                f"A segment of {self.segment_length} tokens has room for 1 to {room} pairs, not {self.pairs}; of more "
                "pairs fewer can be asked (asked)."
            )
        written = (self.segments - 1) * room
        if self.asked is not None and not (1 <= self.asked <= min(room, self.pairs) and self.pairs <= written):
            raise ConfigError(
                f"{self.asked} of {self.pairs} pairs asked: {self.segments} segments of {self.segment_length} tokens "
                f"have room for {written} pairs and the questions of 1 to {room}."
            )
        _check_vocabulary(self.vocabulary, self.pairs, self.pairs)

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def with_segments(self, count: int) -> "SegmentMqar":
        return replace(self, segments=count)

    def example(self, rng: random.Random) -> Example:
        keys, values = _pairs(rng, self.vocabulary, self.pairs)
        room, before = self.segment_length // 2, (self.segments - 1) * self.segment_length
        ids = [0] * (self.segments * self.segment_length)
        labels = [IGNORED] * len(ids)
        places = distinct(rng, (self.segments - 1) * room, self.pairs)
        for key, value, place in zip(keys, values, places, strict=True):
            ids[2 * place : 2 * place + 2] = key, value
        # Keys are in random order, so the first ones are any ones.
        for key, value, slot in zip(keys, values, distinct(rng, room, self.asked or self.pairs), strict=False):
            ids[before + 2 * slot], labels[before + 2 * slot + 1] = key, value
        return Example(input_ids=ids, labels=labels)

    def questions(self, example: Example) -> list[Question]:
        ids, last = example["input_ids"], self.segments - 1
        asked = [column for column, label in enumerate(example["labels"]) if label != IGNORED]
        return [Question((c,), last - ids.index(ids[c - 1]) // self.segment_length) for c in asked]


def _check_vocabulary(vocabulary: int, keys: int, values: int) -> None:
    have = vocabulary // 2 - 1, vocabulary - vocabulary // 2
    if keys > have[0] or values > have[1]:
        raise ConfigError(
            f"{keys} keys and {values} values: a vocabulary of {vocabulary} has {have[0]} and {have[1]}; give at least "
            f"{max(2 * keys + 2, 2 * values)}."
        )


def _pairs(rng: random.Random, vocabulary: int, count: int) -> tuple[list[int], list[int]]:
    """Different keys and different values."""
    half = vocabulary // 2
    return [1 + k for k in distinct(rng, half - 1, count)], [half + v for v in distinct(rng, vocabulary - half, count)]


def _value(rng: random.Random, vocabulary: int) -> int:
    return vocabulary // 2 + below(rng, vocabulary - vocabulary // 2)
