"""Training examples in which small models soon learn to read bAbI: many questions a sample, words that come by degrees.

The answer of a bAbI question stands some words behind the name that it belongs to. From whole sentences a model of two
layers needs thousands of steps to find that out: until then it names a place that was mentioned, and that scores too
well (docs/lm2.md has the trials). Telegraphic stories ("Mary kitchen John garden Mary kitchen") it often reads after
some hundred steps, and then keeps reading them while the words that carry nothing come back; not with every seed.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError, InputError
from ..training import Example, SegmentLaw
from ..training.data import IGNORED
from ..training.positions import Positioned
from ..training.tokenizer import tokenizer_fingerprint
from . import babi
from .babi.worlds import WORLDS
from .babilong import data_folder
from .background import named
from .examples import check_room
from .haystack import Haystack, Reader

EMPTY_WORDS = frozenset({
    "to", "the", "is", "was", "in", "of", "a", "Where", "?", ".", "there",
    "back", "moved", "went", "journeyed", "travelled",
})  # fmt: skip
"""What a telegram leaves out. Of the verbs, those of moving: they all say the same."""

FOLLOWING = ("qa1", "qa2", "qa3", "qa6", "qa9", "qa10")
"""Tasks that ask how things stand: there the next story may follow in the same sample, what it says is newer."""

QUESTIONS = (0.1, 0.3, 0.5)
"""Chances of a question behind a fact, one for a sample; while stories grow, the last."""

EARLIER = 0.8
"""Share of the questions that, where there are such, do not take the last fact: else what was said last is the answer
so often that small models stop at that."""

CLOSING = 4
"""Questions at the end of a sample, at most: they are answered over the longest distance."""

_READ = 24
"""Facts that those are answered from, the last ones; what only older ones tell goes unasked."""

_FACT = 12
"""Tokens of a fact with its share of the questions, roughly."""

_TRIES = 50

Unit = tuple[list[int], list[int]]
"""Token ids and labels of a fact, or of a question with its answer."""


class StoryExamples(Positioned):
    """Endless stories with questions in between, loss on each answer; background between them as in BABILong.

    A sample ends with questions and their answers. Facts, and questions in between, stand in order at places drawn
    uniformly between sentences of background that fill the sample. How many facts there are is drawn log-uniformly.

    Args:
        tasks: "qa1" ...; drawn in turn. segment: tokens of a segment. law: how many segments a sample has.
        growth: optimiser steps (batches) up to which stories are telegraphic, and from which they are whole, with
            their background. (0, 0): whole from the start.
        facts: at most so many facts before the last question, where stories are whole; None for as many as fit. Few in
            long samples teach a memory to keep them (bAbI's own stories have at most 10), many to replace them.
        data: folder whose books are the background, or None; see `open_babilong`. Stories are always generated.

    Raises:
        ConfigError: a growth that does not grow; segments too short for any story.
    """

    SHORTEST = 32

    def __init__(
        self,
        tasks: tuple[str, ...],
        tokenizer: Any,
        segment: int,
        law: SegmentLaw,
        *,
        growth: tuple[int, int] = (0, 0),
        facts: int | None = None,
        data: Any = None,
        seed: int = 0,
    ):
        if not 0 <= growth[0] <= growth[1]:
            raise ConfigError(f"growth = {list(growth)}, expected two steps, the first not after the second.")
        check_room(law, segment, self.SHORTEST)
        self.tasks, self.tokenizer, self.segment, self.law = tasks, tokenizer, segment, law
        self.growth, self.facts, self.seed = growth, facts, seed
        folder = data_folder(data)
        self.haystack = Haystack(named("books" if folder else "prose", "train", folder), tokenizer)

    def _draws(self) -> Iterator[tuple[int, int]]:
        return enumerate(self.law.draw(self.seed))

    def _example(self, drawn: tuple[int, int]) -> Example:
        position, segments = drawn
        rng = random.Random(f"mnemic.stories|{self.seed}|{position}")
        most = segments * self.segment
        # Ends anywhere in its last segment, where a story fits that much.
        length = max(most - rng.randrange(16) * self.segment // 16, self.SHORTEST)
        grown = self._grown(position)
        # Below 1 every sample has a share of its own: the easiest are not forgotten while the whole ones are learned.
        share = grown if grown == 1 else grown * (1 - (1 - grown) * rng.random())
        task = self.tasks[position % len(self.tasks)]
        plan = _Plan(task, share, QUESTIONS[-1], None)
        if grown == 1:
            plan = _Plan(task, share, rng.choice(QUESTIONS), self._count(length, rng))
        units = self._units(plan, length, rng) or self._units(plan, most, rng)
        if not units:
            raise ConfigError(
                f"No story of {task} up to its first question fits {most} tokens; train on longer samples."
            )
        room = length - sum(len(ids) for ids, _ in units)
        filled = room > 0 and rng.random() < share
        background = [list(ids) for ids in Reader(self.haystack, rng).read(room)] if filled else []
        # The questions behind the last fact stand at the end.
        within = max((number for number, (_, labels) in enumerate(units) if labels[-1] == IGNORED), default=0) + 1
        drawn_slots = sorted(babi.pick(rng, range(len(background) + 1)) for _ in range(within))
        slots = [*drawn_slots, *[len(background)] * (len(units) - within)]
        parts = [
            *(((slot, 0), unit) for slot, unit in zip(slots, units, strict=True)),
            *(((slot, 1), (ids, [IGNORED] * len(ids))) for slot, ids in enumerate(background)),
        ]
        parts.sort(key=lambda part: part[0])
        return Example(
            input_ids=[i for _, (ids, _) in parts for i in ids],
            labels=[label for _, (_, labels) in parts for label in labels],
        )

    def _count(self, length: int, rng: random.Random) -> int:
        most = length // _FACT if self.facts is None else min(self.facts, length // _FACT)
        return max(1, round(most ** rng.random()))

    def _grown(self, position: int) -> float:
        begin, end = self.growth
        step = position // self.law.batch
        return 1.0 if step >= end else max(step - begin, 0) / (end - begin)

    def _units(self, plan: "_Plan", length: int, rng: random.Random) -> list[Unit]:
        """Facts and questions, the last one a question, of `length` tokens at most; empty where none fits."""
        for _ in range(_TRIES):
            units: list[Unit] = []
            room = length
            for block in self._blocks(plan, rng):
                room -= sum(len(ids) for ids, _ in block)
                if room < 0:
                    break
                units += block
            if units:
                return units
        return []

    def _blocks(self, plan: "_Plan", rng: random.Random) -> Iterator[list[Unit]]:
        """Facts, and behind any of them questions that the stories so far ask and their facts answer by then; behind
        the last of a limited number as many as `CLOSING`, all different."""
        told = _Told(plan.task)
        asked: dict[str, None] = {}
        block: list[Unit] = []
        while True:
            story = list(WORLDS[plan.task](rng))
            asked |= dict.fromkeys(question for _, question, _, _ in story)
            for fact in story[-1][0]:
                told.facts.append(fact)
                block.append(self._unit(fact, None, plan, rng))
                if plan.facts is not None and len(told.facts) >= plan.facts:
                    closing = [question for question in asked if told.asks(question)]
                    if closing:
                        questions = rng.sample(closing, min(len(closing), CLOSING))
                        yield [*block, *(self._unit(q, told.answer(q), plan, rng) for q in questions)]
                    # Otherwise one fact more, unless something was asked before: then this block holds not all of them.
                    if closing or len(block) < len(told.facts):
                        return
                while rng.random() < plan.questions:
                    question = told.question(list(asked), rng)
                    if question is not None:
                        block.append(self._unit(question, told.answer(question), plan, rng))
                if block[-1][1][-1] != IGNORED:
                    yield block
                    block = []
            if plan.task not in FOLLOWING:
                question = story[-1][1]
                if told.asks(question):
                    yield [*block, self._unit(question, told.answer(question), plan, rng)]
                return

    def _unit(self, text: str, answer: str | None, plan: "_Plan", rng: random.Random) -> Unit:
        ids = list(self.haystack.codec.fact(_telegraphic(text, plan.share, rng)))
        labels = [IGNORED] * len(ids)
        if answer is not None:
            said = [*self.haystack.codec.fact(" " + answer), self.tokenizer.eos_token_id]
            ids, labels = ids + said, labels + said
        return ids, labels

    def _content(self) -> Iterator[Any]:
        yield self.tasks, self.segment, self.law.content(), self.law.batch, self.growth, self.facts, self.seed
        yield tokenizer_fingerprint(self.tokenizer)
        for document in self.haystack.documents:
            yield document.name, document.text


@dataclass(frozen=True)
class _Plan:
    """Of one sample. share: of the empty words that are kept. questions: chance of one behind a fact, and of one more
    behind a question. facts: at most, unless one question takes more; None for as many as fit."""

    task: str
    share: float
    questions: float
    facts: int | None


class _Told:
    """The facts of a sample so far, and what they answer."""

    def __init__(self, task: str):
        self.task = task
        self.facts: list[str] = []
        self._answers: dict[tuple[int, str], str | None] = {}

    def answer(self, question: str, without: int = 0) -> str | None:
        """None where the facts, without so many of the last, do not answer it."""
        count = len(self.facts) - without
        if (count, question) not in self._answers:
            try:
                found = babi.oracle(self.task, self.facts[max(count - _READ, 0) : count], question)
            except InputError:
                found = None
            self._answers[count, question] = found
        return self._answers[count, question]

    def asks(self, question: str) -> bool:
        """Whether training may ask it here: it has an answer, and facts and question are not kept for tests."""
        return self.answer(question) is not None and babi.split_of(self.facts, question) != "test"

    def question(self, asked: Sequence[str], rng: random.Random) -> str | None:
        """One of these, most often one that could have been answered before the last fact as well."""
        earlier = rng.random() < EARLIER
        other = None
        for question in rng.sample(asked, len(asked)):
            if self.asks(question):
                if not earlier or self.answer(question, 1) == self.answer(question):
                    return question
                other = other or question
        return other


def _telegraphic(text: str, share: float, rng: random.Random) -> str:
    """The text with that share of its empty words."""
    parts = re.findall(r"\s*(?:\w+|[^\w\s])", " " + text.strip())
    return "".join(p for p in parts if p.strip() not in EMPTY_WORDS or rng.random() < share)
