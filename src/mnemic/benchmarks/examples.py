"""Training examples of the tasks of this package, for `mnemic.training`."""

import random
from collections.abc import Iterator
from typing import Any

import torch

from ..core.errors import ConfigError
from ..training import Example, SegmentLaw, answer_example
from ..training.positions import Positioned
from ..training.tokenizer import tokenizer_fingerprint
from . import babi
from .babilong import BabilongSample, data_folder, open_babilong, prompt
from .background import named
from .haystack import Haystack
from .recall import RecallTask


class RecallExamples(Positioned):
    """Endless cross-segment recall: the fact in `fact_segment` (None: any), the question at the end of the last."""

    def __init__(self, task: RecallTask, law: SegmentLaw, seed: int = 0, *, fact_segment: int | None = None):
        self.task, self.law, self.seed, self.fact_segment = task, law, seed, fact_segment

    def _draws(self) -> Iterator[tuple[Any, Any]]:
        """Ids and labels of one row, (T,) each."""
        generator = torch.Generator().manual_seed(self.seed)
        counts = self.law.draw(self.seed)
        while True:
            n = next(counts)
            for _ in range(self.law.batch - 1):
                next(counts)
            batch = self.task.batch(self.law.batch, generator, segments=n, fact_segment=self.fact_segment)
            yield from zip(batch.input_ids, batch.labels, strict=True)

    def _example(self, drawn: tuple[Any, Any]) -> Example:
        ids, labels = drawn
        return Example(input_ids=ids.tolist(), labels=labels.tolist())

    def _content(self) -> Iterator[Any]:
        yield self.task, self.law.content(), self.seed, self.fact_segment


def check_room(law: SegmentLaw, segment: int, tokens: int) -> None:
    """Raises `ConfigError` where the shortest samples have less room than a story and its question need."""
    if law.least * segment < tokens:
        raise ConfigError(
            f"{law.least} segment(s) of {segment} tokens leave no room for a story; train on more segments at "
            "least, or longer ones."
        )


class BabilongExamples(Positioned):
    """Endless BABILong samples of a whole number of segments, question and answer at the end, loss on the answer.

    The layout of the RMT and ARMT recipes (arXiv 2406.10149): context + question + answer + end token; the context
    is as long as the segments leave room for.

    Args:
        tasks: "qa1" ...; drawn in turn. segment: tokens of a segment. law: how many segments a sample has.
        data: folder with the released files, or None; see `open_babilong`.
        vary_length: let samples end anywhere in their last segment, in sixteenths of it. Otherwise the question always
            stands at the same place of a segment, and a model answers it only there.

    Raises:
        ConfigError: segments too short for any story.
    """

    RESERVE = 20
    SHORTEST = 28

    def __init__(
        self,
        tasks: tuple[str, ...],
        tokenizer: Any,
        segment: int,
        law: SegmentLaw,
        *,
        data: Any = None,
        seed: int = 0,
        vary_length: bool = True,
    ):
        check_room(law, segment, self.RESERVE + self.SHORTEST)
        self.tasks, self.tokenizer, self.segment, self.law, self.seed = tasks, tokenizer, segment, law, seed
        self.vary_length = vary_length
        folder = data_folder(data)
        background = "books" if folder else "prose"
        self.haystack = Haystack(named(background, "train", folder), tokenizer)
        self.data = folder

    def _draws(self) -> Iterator[BabilongSample]:
        opened: dict[tuple[str, int], Iterator[BabilongSample]] = {}
        rng = random.Random(f"mnemic.lengths|{self.seed}")
        for i, count in enumerate(self.law.draw(self.seed)):
            length = count * self.segment
            if self.vary_length:
                length -= rng.randrange(16) * self.segment // 16
            key = (self.tasks[i % len(self.tasks)], max(length, self.RESERVE + self.SHORTEST))
            if key not in opened:
                opened[key] = self._open(*key)
            yield next(opened[key])

    def _example(self, drawn: BabilongSample) -> Example:
        ids = self.tokenizer(prompt(drawn))["input_ids"]
        answer = self.tokenizer(drawn.target, add_special_tokens=False)["input_ids"]
        return answer_example(ids, [*answer, self.tokenizer.eos_token_id])

    def _content(self) -> Iterator[Any]:
        yield self.tasks, self.segment, self.law.content(), self.seed, self.vary_length
        yield tokenizer_fingerprint(self.tokenizer)
        for document in self.haystack.documents:
            yield document.name, document.text
        if self.data is not None:
            for task in self.tasks:
                yield from babi.read(self.data, task, "train")

    def _open(self, task: str, length: int) -> Iterator[BabilongSample]:
        return iter(
            open_babilong(
                task,
                length,
                self.tokenizer,
                "train",
                data=self.data,
                seed=self.seed + (length if self.vary_length else length // self.segment),
                background=self.haystack,
                reserve=self.RESERVE,
                # The official bound (an eighth of the budget) would leave short samples without a story.
                max_n_facts=None,
            )
        )
