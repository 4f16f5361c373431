"""Accuracy by distance: what is left of a fact after so many segments."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .cell import Cell
from .results import wilson


@dataclass(frozen=True, slots=True)
class Score:
    """Correct answers out of `count`, with the half-width of the 95% Wilson interval (0 to 1)."""

    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def interval(self) -> float:
        low, high = wilson(self.accuracy, self.count)
        return (high - low) / 2


def by_distance(model: Any, cell: Cell, count: int = 512, batch_size: int = 256) -> dict[int, Score]:
    """Distance in segments -> score of the questions there, over `count` samples; the cell's records have "parts"."""
    samples, hits = islice(cell.samples(), count), defaultdict(list)
    while batch := list(islice(samples, batch_size)):
        for record in cell.answer(model, batch):
            for part in record["parts"]:
                hits[part["distance"]].append(part["official"] == 1)
    return {distance: Score(sum(found), len(found)) for distance, found in sorted(hits.items())}
