"""The leaderboard behind every table and figure: a row is a model, a column a task at a length.

A score of several runs is the mean over training seeds; what one training seed scored on several draws of samples is
pooled first, weighted by their counts. Its range is the lowest and highest of the training seeds, or of the draws where
there is one training seed, or the 95% interval that came with the only run. All scores are from 0 to 1.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...core.errors import InputError

Data = Mapping[str, Any]
RULES = ("official", "fixed")
_RUN = ("model", "task", "length", "train_seed", "seed")
_KEYS = {
    "models": ("model", "memory", "parameters"),
    "scores": (*_RUN, "count", "chance", "mean_tokens", "truncated", *RULES),
    "grouped": (*_RUN, "by", "value", "count", *RULES),
    "costs": (*_RUN, "seconds", "tokens_per_second", "peak_bytes"),
}
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6}
_ROUNDING = 1e-9


class Column(NamedTuple):
    task: str
    length: str


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Entry:
    """What a model scored in a column. spread: what the range is, "interval", "training seeds" or "sample seeds"."""

    official: Interval
    fixed: Interval
    spread: str
    seeds: int
    truncated: int


@dataclass(frozen=True)
class Cost:
    """What a model cost over all its runs: tokens a second of all their time, and the most bytes of any."""

    tokens_per_second: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Board:
    """models: the best mean first, then those that lack a column, as given. means: over all columns, of those that
    have all. best: the (model, column) that stand out; where two or more have a score, the highest and those not below
    its range. chances: the scores of a guess, usually one."""

    models: list[Data]
    columns: list[Column]
    entries: dict[tuple[str, Column], Entry]
    means: dict[str, float]
    best: set[tuple[str, Column]]
    chances: dict[Column, list[float]]
    costs: dict[str, Cost]

    @property
    def names(self) -> list[str]:
        return [model["model"] for model in self.models]

    @property
    def scored(self) -> list[str]:
        """Models with any score."""
        having = {model for model, _ in self.entries}
        return [name for name in self.names if name in having]

    def state_bytes(self, model: str) -> int | None:
        return next(m.get("state_bytes") for m in self.models if m["model"] == model)


def board(results: Data, costs: Sequence[Data] = ()) -> Board:
    """
    Raises:
        InputError: no scores, a key that is missing, a score that is not from 0 to 1, a run given twice, a model that
            is not among the models.
    """
    check(results, costs)
    runs: dict[tuple[str, Column], list[Data]] = defaultdict(list)
    for score in results["scores"]:
        runs[score["model"], Column(score["task"], score["length"])].append(score)
    tasks = list(dict.fromkeys(column.task for _, column in runs))
    columns = sorted({c for _, c in runs}, key=lambda c: (tasks.index(c.task), length_key(c.length)))
    entries = {key: _entry(scores) for key, scores in runs.items()}
    means = {}
    for name in [model["model"] for model in results["models"]]:
        if columns and all((name, column) in entries for column in columns):
            means[name] = math.fsum(entries[name, column].official.mean for column in columns) / len(columns)
    models = sorted(results["models"], key=lambda model: -means.get(model["model"], -1))
    chances = {
        column: sorted({s["chance"] for (_, c), found in runs.items() if c == column for s in found} - {None})
        for column in columns
    }
    best = {(name, column) for column in columns for name in _best(column, entries)}
    return Board(models, columns, entries, means, best, chances, _costs(costs))


def _entry(scores: list[Data]) -> Entry:
    by_training: dict[Any, list[Data]] = defaultdict(list)
    for score in scores:
        by_training[score["train_seed"]].append(score)
    found = {}
    for rule in RULES:
        pooled = [weighted((s[rule]["mean"], s["count"]) for s in group) for group in by_training.values()]
        each = pooled if len(pooled) > 1 else [s[rule]["mean"] for s in scores]
        low, high = (min(each), max(each)) if len(each) > 1 else (scores[0][rule]["low"], scores[0][rule]["high"])
        found[rule] = Interval(math.fsum(pooled) / len(pooled), low, high)
    spread = "training seeds" if len(by_training) > 1 else "sample seeds" if len(scores) > 1 else "interval"
    seeds = len(by_training) if len(by_training) > 1 else len(scores)
    return Entry(found["official"], found["fixed"], spread, seeds, sum(s["truncated"] for s in scores))


def _best(column: Column, entries: Mapping[tuple[str, Column], Entry]) -> list[str]:
    found = {name: entry.official for (name, c), entry in entries.items() if c == column}
    if len(found) < 2:
        return []
    top = max(found.values(), key=lambda interval: interval.mean)
    return [name for name, interval in found.items() if interval.mean >= min(top.low, top.mean)]


def _costs(costs: Sequence[Data]) -> dict[str, Cost]:
    by_model: dict[str, list[Data]] = defaultdict(list)
    for cost in costs:
        by_model[cost["model"]].append(cost)
    found = {}
    for name, runs in by_model.items():
        timed = [run for run in runs if run["tokens_per_second"] is not None]
        seconds = math.fsum(run["seconds"] for run in timed)
        tokens = math.fsum(run["seconds"] * run["tokens_per_second"] for run in timed)
        most = max((run["peak_bytes"] for run in runs if run["peak_bytes"] is not None), default=None)
        found[name] = Cost(tokens / seconds if seconds > 0 and tokens > 0 else None, most)
    return found


def weighted(pairs: Iterable[tuple[float, int]]) -> float:
    """The mean of (value, count)."""
    pairs = list(pairs)
    return math.fsum(value * count for value, count in pairs) / sum(count for _, count in pairs)


def grouped(results: Data, by: str) -> dict[str, dict[str, dict[str, dict[float, tuple[float, int]]]]]:
    """task -> length -> model -> value of `by` -> (official score pooled over seeds, count); lengths in order."""
    pairs: dict[tuple[str, str, str, float], list[tuple[float, int]]] = defaultdict(list)
    for group in results.get("grouped", ()):
        if group["by"] == by:
            key = (group["task"], group["length"], group["model"], group["value"])
            pairs[key].append((group["official"], group["count"]))
    found: dict[str, Any] = {}
    for key in sorted(pairs, key=lambda key: (length_key(key[1]), key[3])):
        task, length, model, value = key
        place = found.setdefault(task, {}).setdefault(length, {}).setdefault(model, {})
        place[value] = weighted(pairs[key]), sum(count for _, count in pairs[key])
    return found


def length_key(length: str) -> tuple[int, float, str]:
    """Sorts numbers, "4k" and "1M" among them, before words."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", length.lower())
    return (0, float(match[1]) * _THOUSANDS[match[2]], length) if match else (1, 0.0, length)


def check(results: Data, costs: Sequence[Data]) -> None:
    """Raises `InputError` as `board` does."""
    for key in ("title", "models", "scores"):
        if key not in results:
            raise InputError(f"The results have no {key!r}; expected what an evaluation writes.")
    if not results["scores"] and not results.get("text"):
        raise InputError(f"{results['title']!r} has no scores, so there is nothing to report; run an evaluation first.")
    lists = {"models": results["models"], "scores": results["scores"], "grouped": results.get("grouped", ())}
    for kind, entries in {**lists, "costs": costs}.items():
        for number, entry in enumerate(entries):
            if lacking := [key for key in _KEYS[kind] if key not in entry]:
                raise InputError(f"{kind}[{number}] has no {lacking[0]!r}; expected {', '.join(_KEYS[kind])}.")
    names = [model["model"] for model in results["models"]]
    _no_repeats("models", [(name,) for name in names])
    for kind in ("scores", "grouped"):
        keys = (*_RUN, "by", "value") if kind == "grouped" else _RUN
        _no_repeats(kind, [tuple(entry[key] for key in keys) for entry in lists[kind]])
    scored = {(score["model"], score["task"], score["length"]) for score in results["scores"]}
    for kind, entries in {"scores": lists["scores"], "grouped": lists["grouped"], "costs": costs}.items():
        for entry in entries:
            where = f"{kind} of {entry['model']!r} on {entry['task']!r} at {entry['length']!r}"
            if entry["model"] not in names:
                raise InputError(f"{where}: no such model; the models are {', '.join(names) or 'none'}.")
            if kind == "grouped" and (entry["model"], entry["task"], entry["length"]) not in scored:
                raise InputError(f"{where}: there is no score of it; expected groups of what was scored.")
            if kind != "costs":
                _check_values(where, entry)


def _check_values(where: str, entry: Data) -> None:
    if entry["count"] < 1:
        raise InputError(f"{where}: count is {entry['count']}; expected at least one sample.")
    if entry.get("by", "depth") not in ("depth", "distance"):
        raise InputError(f"{where}: grouped by {entry['by']!r}; expected 'depth' or 'distance'.")
    for rule in RULES:
        score = entry[rule]
        for name, value in score.items() if isinstance(score, Mapping) else [("score", score)]:
            if not -_ROUNDING <= value <= 1 + _ROUNDING:
                raise InputError(f"{where}: the {rule} {name} is {value}; expected a number from 0 to 1.")


def _no_repeats(kind: str, keys: list[tuple]) -> None:
    if len(set(keys)) < len(keys):
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise InputError(f"{kind}: {' '.join(map(str, twice))} is given twice; expected each once.")
