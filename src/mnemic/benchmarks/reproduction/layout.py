"""The main table of LM2's paper, in its layout: for each length the models, for each model the tasks and their mean.

The paper says of LM2 that it is 37.1% better than RMT and 86.3% better than Llama-3.2 "on average", and not over what;
its table gives 36.6% and 88.0% as the ratio of the means over 0K to 4K, and 39.5% and 87.0% as the mean of the ratios.
Both are computed here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..report.board import Column, board, length_key

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""length -> model -> the score of each task, from 0 to 1 or in percent."""


@dataclass(frozen=True)
class Cell:
    """A score from 0 to 1, and its range: of the training seeds, or the 95% interval where there is one."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """rows: length -> model -> task -> score; a model is left out of a length where it lacks a task."""

    tasks: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Mapping[str, Cell]]]

    def averages(self) -> dict[str, dict[str, float]]:
        """Length -> model -> mean over tasks."""
        return {
            length: {name: math.fsum(c.mean for c in cells.values()) / len(cells) for name, cells in models.items()}
            for length, models in self.rows.items()
        }

    def as_json(self) -> dict[str, Any]:
        rows = {
            length: {
                name: {task: [round(v, 6) for v in (c.mean, c.low, c.high)] for task, c in cells.items()}
                for name, cells in models.items()
            }
            for length, models in self.rows.items()
        }
        return {"tasks": list(self.tasks), "rows": rows}


def layout(results: Mapping[str, Any]) -> Table:
    """The scores of a leaderboard by length.

    Args:
        results: as `leaderboard` gives them, scores of one board.

    Raises:
        InputError: see `report.board`.
    """
    # Groups keep the names of boards, which `scores` may come without.
    made = board({**results, "grouped": []})
    tasks = tuple(dict.fromkeys(c.task for c in made.columns))
    rows: dict[str, dict[str, dict[str, Cell]]] = {}
    for length in sorted({c.length for c in made.columns}, key=length_key):
        asked = [c.task for c in made.columns if c.length == length]
        found = {}
        for model in results["models"]:
            name = model["model"]
            scores = [made.entries.get((name, Column(task, length))) for task in asked]
            if all(scores):
                found[name] = {
                    task: Cell(s.official.mean, s.official.low, s.official.high)
                    for task, s in zip(asked, scores, strict=True)
                    if s is not None
                }
        rows[length] = found
    return Table(tasks, rows)


def margins(
    averages: Mapping[str, Mapping[str, float]], model: str, other: str, lengths: Sequence[str]
) -> dict[str, float] | None:
    """How much better `model` is than `other`, in percent of it: {"ratio_of_means", "mean_of_ratios"}.

    Lengths that one of them lacks are left out; None where there are none, or `other` scores nothing at one.
    """
    pairs = [(averages[n][model], averages[n][other]) for n in lengths if {model, other} <= averages.get(n, {}).keys()]
    if not pairs or any(below <= 0 for _, below in pairs):
        return None
    whole = sum(above for above, _ in pairs) / sum(below for _, below in pairs)
    each = sum(above / below for above, below in pairs) / len(pairs)
    return {"ratio_of_means": round(100 * (whole - 1), 1), "mean_of_ratios": round(100 * (each - 1), 1)}
