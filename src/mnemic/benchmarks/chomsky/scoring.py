"""Length generalisation: the accuracy at every length beyond those of training, and its mean, the score of the paper.

An accuracy is per output symbol, without those behind the terminator; it is taken over batches of 64 samples and
averaged over 8 of them, as the released evaluation does. The example of the released code scores lengths 42 to 100
(its slice begins one late); here the lengths are those of the paper, 41 to 500.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.errors import InputError
from .examples import token_example
from .task import FormalTask

TEST_LENGTHS = range(41, 501)
SOLVED = 0.9
"""A task counts as solved at this score, for the best seed and settings."""

Solver = Callable[[Sequence[Sequence[int]], int], Sequence[Sequence[int]]]
"""(input symbols of B samples of one length, number of outputs m) -> m output symbols for each."""


@dataclass(frozen=True)
class Generalisation:
    """Accuracies by length. `score` is their mean."""

    task: str
    by_length: dict[int, float]
    samples: int
    chance: float

    @property
    def score(self) -> float:
        return sum(self.by_length.values()) / len(self.by_length)

    @property
    def solved(self) -> bool:
        return self.score >= SOLVED


def batch_accuracy(task: FormalTask, targets: Sequence[Sequence[int]], said: Sequence[Sequence[int]]) -> float:
    """Share of the counted outputs of all samples together that are right.

    Raises:
        InputError: another number of outputs than asked for.
    """
    right = counted = 0
    for target, answer in zip(targets, said, strict=True):
        if len(answer) != len(target):
            raise InputError(f"{task.name}: {len(answer)} outputs were said where {len(target)} are asked for.")
        count = task.counted(target)
        counted += count
        right += sum(a == b for a, b in zip(target[:count], answer[:count], strict=True))
    return right / counted


def length_generalisation(
    task: FormalTask,
    solver: Solver,
    lengths: Iterable[int] = TEST_LENGTHS,
    *,
    samples: int = 512,
    batch: int = 64,
    seed: int = 1,
) -> Generalisation:
    """Measure `solver` on samples that depend on seed and length alone.

    Raises:
        InputError: no lengths, or samples that are no whole number of batches.
    """
    lengths = list(lengths)
    if not lengths or batch < 1 or samples < batch or samples % batch:
        raise InputError(
            f"{len(lengths)} lengths, {samples} samples in batches of {batch}: expected at least one length, and "
            "samples that are a multiple of batch."
        )
    found = {}
    for length in lengths:
        rng = random.Random(f"mnemic.chomsky|{task.name}|{seed}|length {length}")
        parts = []
        for _ in range(samples // batch):
            drawn = [task.sample(rng, length) for _ in range(batch)]
            targets = [y for _, y in drawn]
            parts.append(batch_accuracy(task, targets, solver([x for x, _ in drawn], len(targets[0]))))
        found[length] = sum(parts) / len(parts)
    return Generalisation(task.name, found, samples, task.chance)


def model_solver(model: Any, task: FormalTask, steps: int = 0) -> Solver:
    """A causal language model as solver, read at the last places; only output symbols can be said.

    Every call begins with no state. steps: blanks for each input symbol, as in training.
    """

    @torch.no_grad()
    def solve(inputs: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        ids = [token_example(task, x, [0] * count, steps)["input_ids"] for x in inputs]
        logits = model(input_ids=torch.tensor(ids, device=model.device), use_cache=False).logits
        return logits[:, -count - 1 : -1, : task.outputs].argmax(-1).tolist()

    return solve
