"""Samples as token ids for causal language models.

Layout of the paper: the input, `steps` x n blanks to compute in, and one token "empty" for each output, at which that
output is said (not autoregressive). The model shifts labels, so they stand one place behind, and one more "empty" ends
the row.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from ...core.errors import ConfigError
from ...training.data import IGNORED, Example
from ...training.positions import Positioned
from ..draws import below
from .task import FormalTask

TRAIN_LENGTHS = (1, 40)
"""Lengths of the paper's training samples: uniform, one for a batch."""


def token_example(task: FormalTask, x: Sequence[int], y: Sequence[int], steps: int = 0) -> Example:
    before = [*x, *[task.blank] * (steps * len(x))]
    return Example(
        input_ids=[*before, *[task.empty] * (len(y) + 1)],
        labels=[*[IGNORED] * (len(before) + 1), *y],
    )


class FormalExamples(Positioned):
    """Endless training examples; sample i depends on the seed and i alone. All outputs carry the loss.

    Args:
        batch: samples of a batch, which have one length.
        lengths: least and most, drawn uniformly for each batch. steps: blanks for each input symbol.

    Raises:
        ConfigError: sizes that cannot be.
    """

    def __init__(
        self,
        task: FormalTask,
        batch: int = 128,
        seed: int = 0,
        *,
        lengths: tuple[int, int] = TRAIN_LENGTHS,
        steps: int = 0,
    ):
        if batch < 1 or not 1 <= lengths[0] <= lengths[1] or steps < 0:
            raise ConfigError(
                f"batch {batch}, lengths {lengths}, steps {steps}: expected at least 1, 1 <= least <= most, at least 0."
            )
        self.task, self.batch, self.seed, self.lengths, self.steps = task, batch, seed, lengths, steps

    def _draws(self) -> Iterator[tuple[int, int]]:
        rng = random.Random(f"mnemic.chomsky|{self.task.name}|{self.seed}|lengths")
        position, (least, most) = 0, self.lengths
        while True:
            length = least + below(rng, most - least + 1)
            for _ in range(self.batch):
                yield position, length
                position += 1

    def _example(self, drawn: tuple[int, int]) -> Example:
        position, length = drawn
        rng = random.Random(f"mnemic.chomsky|{self.task.name}|{self.seed}|{position}")
        return token_example(self.task, *self.task.sample(rng, length), steps=self.steps)

    def _content(self) -> Iterator[Any]:
        yield self.task.name, self.batch, self.seed, self.lengths, self.steps
