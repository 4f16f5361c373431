"""Facts put between sentences: the draws of a sample, and its context as a stream of sentences.

The text is read more than once, never kept: first its sentences are counted, then the slots are drawn and the tokens
before each fact counted, and every reading of the context goes over it again.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from ...core.errors import ConfigError
from .. import babi
from ..babi import BabiSample
from ..haystack import Haystack, Reader
from .sample import BabilongSample, StreamedSample


@dataclass(frozen=True, kw_only=True)
class Babilong:
    """A stream of samples: iterate over it, as often as wanted; each iteration gives the same samples, lazily.

    Made by `open_babilong`, which explains the fields. `len` is not defined: generated and training streams never end.
    """

    task: str
    length: int
    haystack: Haystack
    facts: Callable[[], Iterator[BabiSample]]
    endless: bool
    seed: int
    reserve: int
    max_n_facts: int | None
    start_pct: float | None
    end_pct: float | None
    count: int | None

    @property
    def budget(self) -> int:
        """Tokens of a context: facts and background."""
        return self.length - self.reserve

    def __iter__(self) -> Iterator[BabilongSample]:
        return (sample.whole() for sample in self.streamed())

    def streamed(self) -> Iterator[StreamedSample]:
        """The same samples, with contexts that are read in pieces: memory does not grow with the length."""
        samples = self._samples()
        return samples if self.count is None else islice(samples, self.count)

    def _samples(self) -> Iterator[StreamedSample]:
        rng = random.Random(f"mnemic.babilong|{self.task}|{self.length}|{self.seed}")
        reader = Reader(self.haystack, random.Random(f"mnemic.background|{self.task}|{self.length}|{self.seed}"))
        skipped = made = 0
        for story in self.facts():
            sample = self._build(story, rng, reader)
            if sample is not None:
                made += 1
                yield sample
                continue
            skipped += 1
            if made == 0 and skipped == 2000:
                break
        if made == 0:
            raise ConfigError(
                f"None of {skipped} samples of {self.task} fits length {self.length}: the budget is {self.budget} "
                f"tokens and at most {self.max_n_facts} facts with the question are allowed. Use a larger length, a "
                "smaller reserve, or max_n_facts=None."
            )

    def _build(self, story: BabiSample, rng: random.Random, reader: Reader) -> StreamedSample | None:
        if self.max_n_facts is not None and len(story.facts) + 1 > self.max_n_facts:
            return None
        facts = [self.haystack.codec.fact(" " + fact) for fact in story.facts]
        total = sum(map(len, facts))
        if self.length and total >= self.budget:
            return None
        background = self.budget - total if self.length else 0
        start = reader.fork()
        sentences, names, possible = self._survey(reader, background, total)
        slots = tuple(sorted(babi.pick(rng, possible) for _ in facts))
        parts = partial(_parts, facts, slots, start, background)
        offsets, at = [], 0
        for is_fact, part in parts():
            if is_fact:
                offsets.append(at)
            at += len(part)
        read = f"; background: {'; '.join(names)}" if names else ""
        return StreamedSample(
            task=self.task, length=self.length, question=story.question, target=story.answer, seed=self.seed,
            provenance=f"facts: {story.provenance}{read}", fact_slots=slots, slots=sentences + 1,
            fact_offsets=tuple(offsets), tokens=at, supporting=story.supporting, codec=self.haystack.codec,
            parts=lambda: (part for _, part in parts()), plain=None if self.length else " ".join(story.facts),
        )  # fmt: skip

    def _survey(self, reader: Reader, background: int, total: int) -> tuple[int, list[str], range]:
        """Reads the background: number of sentences, names of documents, slots that facts may have."""
        low = int(self.budget * (self.start_pct or 0.0))
        high = int(self.budget * (1.0 if self.end_pct is None else self.end_pct)) - total
        documents: dict[int, None] = {}
        sentences = at = first = stop = 0
        for ids in reader.read(background):
            documents[reader.document] = None
            first += at < low
            stop += at < high
            sentences += 1
            at += len(ids)
        known = self.haystack.documents
        names = list(dict.fromkeys(known[number].provenance for number in documents))
        if not self.length or (self.start_pct is None and self.end_pct is None):
            return sentences, names, range(sentences + 1)
        if first >= stop:
            raise ConfigError(
                f"No slot between {self.start_pct} and {self.end_pct} of {self.budget} tokens leaves room for {total} "
                "tokens of facts. Widen the window or increase the length."
            )
        return sentences, names, range(first, stop)


def _parts(
    facts: Sequence[Sequence[int]], slots: Sequence[int], start: Reader, background: int
) -> Iterator[tuple[bool, Sequence[int]]]:
    """Facts and sentences in order: whether it is a fact, and its token ids."""
    at = 0
    for slot, sentence in enumerate(start.fork().read(background)):
        while at < len(facts) and slots[at] == slot:
            yield True, facts[at]
            at += 1
        yield False, sentence
    for fact in facts[at:]:
        yield True, fact
