"""Held-out text in reports: perplexities and what carrying the state gains, by model and length.

A number of several runs is their mean, and its range the lowest and highest of them; of one run the 95% interval.
"""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ...core.errors import InputError
from .board import Column, Data, Interval, length_key

KEYS = ("model", "task", "length", "train_seed", "seed", "count", "predicted", "perplexity", "gain")
MEASURES = ("perplexity", "gain")
CSV_COLUMNS = (*KEYS[:-2], *(f"{measure}{part}" for measure in MEASURES for part in ("", "_low", "_high")))
LEGEND = (
    "Perplexity of a token with the state carried through a piece, the lower the better; gain: nats a token that "
    "carrying saves against a new state for every segment. Below them the 95% interval over pieces, or the lowest to "
    "the highest of (n) runs."
)


@dataclass(frozen=True)
class Text:
    """models: the lowest mean perplexity first, then those that lack a column. best: as in `Board`, but the lowest."""

    models: list[str]
    columns: list[Column]
    entries: dict[tuple[str, Column], dict[str, Interval]]
    runs: dict[tuple[str, Column], int]
    best: set[tuple[str, Column]]


def text(results: Data) -> Text | None:
    """What a report shows of the text; None where there is none.

    Raises:
        InputError: a key that is missing, a model that is not among the models, a run given twice, a number that is
            none.
    """
    _check(results)
    runs: dict[tuple[str, Column], list[Data]] = defaultdict(list)
    for one in results.get("text", ()):
        runs[one["model"], Column(one["task"], one["length"])].append(one)
    if not runs:
        return None
    columns = sorted({column for _, column in runs}, key=lambda c: (c.task, length_key(c.length)))
    entries = {
        key: {measure: _pooled([one[measure] for one in found]) for measure in MEASURES} for key, found in runs.items()
    }
    means = {
        name: math.fsum(entries[name, c]["perplexity"].mean for c in columns) / len(columns)
        for name in dict.fromkeys(name for name, _ in runs)
        if all((name, c) in entries for c in columns)
    }
    order = [m["model"] for m in results["models"] if any(name == m["model"] for name, _ in runs)]
    models = sorted(order, key=lambda name: means.get(name, math.inf))
    best = {(name, column) for column in columns for name in _best(column, entries)}
    return Text(models, columns, entries, {key: len(found) for key, found in runs.items()}, best)


def _pooled(found: list[Mapping[str, float]]) -> Interval:
    means = [one["mean"] for one in found]
    low, high = (min(means), max(means)) if len(means) > 1 else (found[0]["low"], found[0]["high"])
    return Interval(math.fsum(means) / len(means), low, high)


def _best(column: Column, entries: Mapping[tuple[str, Column], Mapping[str, Interval]]) -> list[str]:
    found = {name: entry["perplexity"] for (name, c), entry in entries.items() if c == column}
    if len(found) < 2:
        return []
    top = min(found.values(), key=lambda interval: interval.mean)
    return [name for name, interval in found.items() if interval.mean <= max(top.high, top.mean)]


def shown(made: Text, name: str, column: Column, measure: str) -> tuple[str, str] | None:
    """A number and its range as a reader sees them; None where it was not measured."""
    if (name, column) not in made.entries:
        return None
    value, runs = made.entries[name, column][measure], made.runs[name, column]
    digits = 2 if measure == "perplexity" else 4
    between = f"{value.low:,.{digits}f}–{value.high:,.{digits}f}"
    return f"{value.mean:,.{digits}f}", between if runs == 1 else f"{between} ({runs})"


def _check(results: Data) -> None:
    names, runs = [model["model"] for model in results["models"]], set()
    for number, one in enumerate(results.get("text", ())):
        if lacking := [key for key in KEYS if key not in one]:
            raise InputError(f"text[{number}] has no {lacking[0]!r}; expected {', '.join(KEYS)}.")
        where = f"text of {one['model']!r} at {one['length']!r}"
        if one["model"] not in names:
            raise InputError(f"{where}: no such model; the models are {', '.join(names) or 'none'}.")
        run = tuple(one[key] for key in KEYS[:5])
        if run in runs:
            raise InputError(f"text: {' '.join(map(str, run))} is given twice; expected each once.")
        runs.add(run)
        for measure in MEASURES:
            values = [one[measure][part] for part in ("mean", "low", "high")]
            if not all(map(math.isfinite, values)) or (measure == "perplexity" and min(values) < 1 - 1e-9):
                raise InputError(f"{where}: {measure} {values}; expected finite numbers, perplexities of 1 or more.")


def text_csv(results: Data) -> str:
    """One row a run."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for one in results["text"]:
        values = [one[measure][part] for measure in MEASURES for part in ("mean", "low", "high")]
        writer.writerow([*(one[key] for key in KEYS[:-2]), *values])
    return made.getvalue()
