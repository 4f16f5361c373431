"""How sure a margin is: the questions drawn anew, the same ones for both models."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import InputError
from ..comparison import Job
from ..jobs import answers
from ..results import cells

_RESAMPLES = 2000


def margin_interval(
    folder: Path, jobs: Iterable[Job], model: str, other: str, lengths: Sequence[str]
) -> list[float] | None:  # fmt: skip
    """95% interval of the ratio of means (see `layout.margins`) of 2,000 bootstrap resamples of the questions of every
    task and length; [low, high] in percent. Training seeds are taken as they are: two or three say little of others.

    Args:
        jobs: finished ones of one board.

    Returns: None where one of the two lacks all of the lengths, or `other` a right answer.

    Raises:
        InputError: the two were asked different questions.
    """
    ours, theirs = (_questions(folder, [job for job in jobs if job.entry == name], lengths) for name in (model, other))
    both = [cell for cell in ours if cell in theirs]
    if not both:
        return None
    tasks = {length: sum(name == length for name, _, _ in both) for length, _, _ in both}
    above, below = np.zeros(_RESAMPLES), np.zeros(_RESAMPLES)
    rng = np.random.default_rng(0)
    for cell in both:
        (asked, scores), (same, others) = ours[cell], theirs[cell]
        if asked != same:
            raise InputError(f"{model} and {other} were asked different questions: {cell[1]} at length {cell[0]}.")
        drawn = rng.integers(len(asked), size=(_RESAMPLES, len(asked)))
        above += scores[drawn].mean(1) / tasks[cell[0]]
        below += others[drawn].mean(1) / tasks[cell[0]]
    if not below.all():
        return None
    return [round(float(v), 1) for v in np.quantile(100 * (above / below - 1), (0.025, 0.975))]


def _questions(folder: Path, jobs: Sequence[Job], lengths: Sequence[str]) -> dict[tuple[str, str, int], Any]:
    """(length, task, seed of the samples) -> the right answers, and the score of each, mean over training seeds."""
    found: dict[tuple[str, str, int], list[Any]] = defaultdict(list)
    for job in jobs:
        for log in answers(job, folder):
            for cell, lines in cells(log):
                if cell["length"] in lengths:
                    found[cell["length"], cell["task"], cell["seed"]].append(
                        [r for one in lines for r in one["records"]]
                    )
    return {
        cell: ([r["targets"] for r in runs[0]], np.mean([[float(r["official"]) for r in run] for run in runs], 0))
        for cell, runs in found.items()
    }
