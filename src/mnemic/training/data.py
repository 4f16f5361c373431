"""Data: examples over several segments, and how many segments each has.

A random number of segments is the default: it is what makes a recurrent memory work beyond the length it was trained
on (Bulatov et al. 2023, arXiv 2304.11062). The number is drawn once for each batch, so rows of a batch fit together.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from ..core.errors import ConfigError, InputError
from .positions import Positioned

IGNORED = -100


class Example(TypedDict):
    """One sample: token ids and, at the same places, labels (-100 where there is no loss; the model shifts).

    reset: in stateful batches, whether the row begins a document with it.
    """

    input_ids: list[int]
    labels: list[int]
    reset: NotRequired[bool]


def answer_example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """Loss on the answer only."""
    if not prompt or not answer:
        raise InputError("An example needs at least one token of prompt and one of answer.")
    return {"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + list(answer)}


@dataclass(frozen=True)
class SegmentLaw:
    """Number of segments of a sample: uniform from `least` to the most of the current stage, drawn for a batch at once.

    most: the largest number in each stage of the curriculum; one entry for no curriculum. batch: samples of a batch.
    stage_batches: batches of a stage; the last stage never ends.
    """

    least: int
    most: tuple[int, ...]
    batch: int
    stage_batches: int = 1

    def __post_init__(self) -> None:
        if not self.most or not all(1 <= self.least <= most for most in self.most):
            raise ConfigError(f"Segments from {self.least} to {self.most}: expected 1 <= least <= most in every stage.")
        if self.batch < 1 or self.stage_batches < 1:
            raise ConfigError(
                f"{self.batch} samples a batch, {self.stage_batches} batches a stage: expected at least 1."
            )

    def content(self) -> tuple:
        """What decides the numbers: without a curriculum, stages are of no account."""
        return self.least, self.most, self.batch, self.stage_batches if len(self.most) > 1 else None

    def draw(self, seed: int) -> Iterator[int]:
        """Endless, one number a sample."""
        rng = random.Random(f"mnemic.segments|{seed}")
        for index in itertools.count():
            most = self.most[min(index // self.stage_batches, len(self.most) - 1)]
            yield from [rng.randint(self.least, most)] * self.batch


class Collator:
    """Examples -> a batch, padded on the right; only logits that carry a loss are asked for.

    Args:
        pad_id: any id of the vocabulary; masked out.
    """

    def __init__(self, pad_id: int = 0):
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor | int]:
        longest = max(len(e["input_ids"]) for e in examples)

        def rows(values: Iterable[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor([[*v, *[fill] * (longest - len(v))] for v in values])

        labels = rows([e["labels"] for e in examples], IGNORED)
        first = int((labels != IGNORED).any(0).nonzero().min()) if bool((labels != IGNORED).any()) else 0
        resets = [e["reset"] for e in examples if "reset" in e]
        return {
            **({"reset": torch.tensor(resets)} if resets else {}),
            "input_ids": rows([e["input_ids"] for e in examples], self.pad_id),
            "attention_mask": rows([[1] * len(e["input_ids"]) for e in examples], 0),
            "labels": labels,
            # The logits that predict column `first` stand one before it.
            "logits_to_keep": longest - max(first - 1, 0),
        }


class TextExamples(Positioned):
    """Next-token examples: consecutive stretches of documents, a whole number of segments long, round and round.

    Args:
        documents: token ids of each document. segment: tokens of a segment. law: how many segments a sample has.

    Raises:
        InputError: no document is as long as one segment.
    """

    def __init__(self, documents: Sequence[Sequence[int]], segment: int, law: SegmentLaw, seed: int = 0):
        self.documents = [d for d in documents if len(d) >= segment]
        if not self.documents:
            raise InputError(f"None of {len(documents)} documents has the {segment} tokens of one segment.")
        self.segment, self.law, self.seed = segment, law, seed

    def _draws(self) -> Iterator[tuple[int, int, int]]:
        """Document, first token, number of tokens."""
        rng = random.Random(f"mnemic.text|{self.seed}")
        places = range(len(self.documents))
        for count in self.law.draw(self.seed):
            document = rng.choice(places)
            length = min(count * self.segment, len(self.documents[document]))
            yield document, rng.randint(0, len(self.documents[document]) - length), length

    def _example(self, drawn: tuple[int, int, int]) -> Example:
        document, start, length = drawn
        ids = list(self.documents[document][start : start + length])
        return Example(input_ids=ids, labels=list(ids))

    def _content(self) -> Iterator[Any]:
        yield self.segment, self.law.content(), self.seed
        yield from self.documents
