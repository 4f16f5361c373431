"""Leaderboard: what the jobs of a comparison left, as results and costs for a report."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import results
from .comparison import Comparison
from .jobs import DESCRIPTION, Outcome, answers
from .speeds import with_speeds


def leaderboard(
    comparison: Comparison, folder: str | Path, outcomes: Iterable[Outcome]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and costs as `results.summarise` gives them, with title, scale, settings, models and speeds if measured.

    Jobs without an outcome are missing; so a leaderboard can be made of a comparison that is under way.
    """
    folder, refused = Path(folder), {o.job.folder: o.refused for o in outcomes}
    done = [job for job in comparison.jobs if refused.get(job.folder, "") is None]
    measured = {
        j.board: {name[0] for evaluation in j.evaluations for name in evaluation.names()} for j in comparison.jobs
    }
    shared = max(Counter(task for tasks in measured.values() for task in tasks).values()) > 1
    found, costs = results.summarise(
        [
            results.Evaluated(job.entry, log, job.seed, job.board if shared else None)
            for job in done
            for log in answers(job, folder)
        ]
    )
    models = []
    for entry in dict.fromkeys(job.entry for job in comparison.jobs):
        own = [job for job in done if job.entry == entry]
        described = [json.loads((folder / job.folder / DESCRIPTION).read_text(encoding="utf-8")) for job in own]
        whys = [(job.board, refused.get(job.folder)) for job in comparison.jobs if job.entry == entry]
        notes = dict.fromkeys(f"{board}: not run: {why}" for board, why in whys if why is not None)
        memory = next(job.experiment.memory for job in comparison.jobs if job.entry == entry)
        unknown = {"memory": memory, "parameters": None, "state_bytes": None, "tokens_trained": None}
        # Boards may differ in vocabulary, and so in parameters; those of the first stand for all.
        first = described[0] if described else {"model": entry, **unknown}
        models.append({**first, "note": "; ".join(notes) or None})
    settings = {key: value for key, value in comparison.settings.items() if key not in ("title", "scale")}
    head = {"title": comparison.title, "scale": comparison.scale, "settings": settings, "models": models}
    return with_speeds({**head, **found}, folder), costs
