"""What memory gains or costs on ordinary text: perplexities of two models, compared piece by piece."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..comparison import Job
from ..jobs import Outcome, answers
from ..results import cells, perplexity_change


def text_changes(folder: Path, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Each model against the plain host of its board, and against the model that its training began with.

    Returns: board, model, train_seed, length, against, and of the percent by which the perplexity is above that of the
        other one "mean", "low" and "high" of a 95% interval.
    """
    done = {outcome.job.folder: outcome.job for outcome in outcomes if outcome.refused is None}
    found = []
    for job in done.values():
        for name, other in _others(job, done.values()):
            ours, theirs = _texts(job, folder), _texts(other, folder)
            found += [
                {
                    "board": job.board,
                    "model": job.entry,
                    "train_seed": job.seed,
                    "length": length,
                    "against": name,
                    **perplexity_change(records, theirs[task, length]),
                }
                for (task, length), records in ours.items()
                if (task, length) in theirs
            ]
    return found


def _others(job: Job, jobs: Any) -> Iterator[tuple[str, Job]]:
    for other in jobs:
        if other.folder == job.start:
            yield f"{other.entry} before, from board {other.board}", other
        alike = (other.board, other.seed) == (job.board, job.seed)
        if alike and other.trained is None and other.experiment.memory == "none" != job.experiment.memory:
            yield other.entry, other


def _texts(job: Job, folder: Path) -> dict[tuple[str, str], list[Any]]:
    """(task, length) -> records of pieces of text."""
    found = {}
    for log in answers(job, folder):
        for cell, lines in cells(log):
            records = [record for line in lines for record in line["records"]]
            if "carried" in records[0]:
                found[cell["task"], cell["length"]] = records
    return found
