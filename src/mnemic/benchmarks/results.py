"""Results of evaluations: scores with intervals out of logs, as plain data for reports.

Scores depend on the records alone, so equal records give equal bytes. Costs (seconds, tokens a second, peak memory) are
measurements and kept apart.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from . import log

RULES = ("official", "fixed")
_RESAMPLES = 2000
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A model that was evaluated.

    Attributes:
        model: its name in reports. log: what it answered. train_seed: of its training, where several are compared.
        trained_on: stands before the names of tasks, where models of equal names were trained on different ones.
    """

    model: str
    log: Path
    train_seed: int | None = None
    trained_on: str | None = None


def summarise(runs: Sequence[Evaluated]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores and costs of every cell.

    Returns: {"scores": [...], "grouped": [...]}, with "text" (see `perplexity`) where there is any, and costs. A score
    has model, task, length, train_seed, seed, count, chance, mean_tokens, truncated, and for each rule mean, low and
    high: the 95% interval of Wilson where every score is 0 or 1, of 2,000 bootstrap resamples otherwise. "grouped" has
    means by depth (whole percent) or distance (segments). A cost has seconds, tokens_per_second and peak_bytes.
    """
    scores, grouped, text, costs = [], [], [], []
    for run in runs:
        for cell, lines in cells(run.log):
            task = cell["task"] if run.trained_on is None else f"{run.trained_on}: {cell['task']}"
            name = {"model": run.model, **cell, "task": task, "train_seed": run.train_seed}
            records = [record for line in lines for record in line["records"]]
            costs.append({**name, **_cost(lines, records)})
            if "carried" in records[0]:
                text.append({**name, **perplexity(records)})
                continue
            scores.append({**name, "chance": lines[0]["chance"], **_score(records)})
            grouped += [{**name, **group} for group in _groups(records)]
    return {"scores": scores, "grouped": grouped, **({"text": text} if text else {})}, costs


def cells(path: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Lines by cell, in the order of the log; a cell's lines in the order of its batches."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in log.batches(path):
        found[line["task"], line["length"], line["seed"]].append(line)
    for (task, length, seed), lines in found.items():
        yield {"task": task, "length": length, "seed": seed}, sorted(lines, key=lambda line: line["batch"])


def _score(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "count": len(records),
        "mean_tokens": round(sum(r["tokens"] for r in records) / len(records)),
        "truncated": sum(r["truncated"] for r in records),
        **{rule: interval([float(r[rule]) for r in records]) for rule in RULES},
    }


def _groups(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for by in ("depth", "distance"):
        values: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
        for record in records:
            for part in record.get("parts", (record,)):
                if by in part:
                    # Depths are continuous where a needle may stand anywhere.
                    values[round(part[by])].append(part)
        for value, group in sorted(values.items()):
            means = {rule: round(sum(p[rule] for p in group) / len(group), 6) for rule in RULES}
            yield {"by": by, "value": value, "count": len(group), **means}


def _cost(lines: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = sum(line["seconds"] for line in lines)
    peaks = [line["peak_bytes"] for line in lines if line["peak_bytes"] is not None]
    return {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sum(r["tokens"] for r in records) / seconds, 1) if seconds else None,
        "peak_bytes": max(peaks, default=None),
    }


def interval(scores: Sequence[float]) -> dict[str, float]:
    """Mean of scores from 0 to 1, and its 95% interval, {"mean", "low", "high"}."""
    mean = sum(scores) / len(scores)
    if all(score in (0.0, 1.0) for score in scores):
        low, high = wilson(mean, len(scores))
    else:
        draws = np.random.default_rng(0).integers(len(scores), size=(_RESAMPLES, len(scores)))
        low, high = np.quantile(np.asarray(scores)[draws].mean(1), (0.025, 0.975)).tolist()
    return {"mean": round(mean, 6), "low": round(low, 6), "high": round(high, 6)}


def perplexity(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of pieces of text, records as of `TextCell`: count, the number of predicted tokens, and with the 95% interval of
    2,000 bootstrap resamples of the pieces "perplexity" (a token, the state carried) and "gain" (nats a token that
    carrying saves against a new state for every segment)."""
    sums = {key: np.asarray([r[key] for r in records], float) for key in ("carried", "predicted", "gained", "compared")}
    if not sums["compared"].all():
        raise InputError("Segments of one token predict nothing without a state, so nothing can be compared.")
    return {
        "count": len(records),
        "predicted": int(sums["predicted"].sum()),
        "perplexity": _ratio(sums["carried"], sums["predicted"], lambda loss: np.exp(np.minimum(loss, 700))),
        "gain": _ratio(sums["gained"], sums["compared"], lambda nats: nats),
    }


def perplexity_change(records: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By how many percent the perplexity of a model is above that of another one on the same pieces of text; mean, low
    and high of the 95% interval of 2,000 bootstrap resamples of the pieces.

    Raises:
        InputError: records of other pieces.
    """
    if [(r["tokens"], r["predicted"]) for r in records] != [(r["tokens"], r["predicted"]) for r in others]:
        raise InputError("Perplexities are compared on the same pieces of text; these two models read different ones.")
    more = np.asarray([ours["carried"] - theirs["carried"] for ours, theirs in zip(records, others, strict=True)])
    return _ratio(more, np.asarray([r["predicted"] for r in records], float), lambda nats: 100 * np.expm1(nats))


def _ratio(above: Any, below: Any, change: Callable[[Any], Any]) -> dict[str, float]:
    """Of two sums over pieces, changed; resampled by pieces."""
    draws = np.random.default_rng(0).integers(len(above), size=(_RESAMPLES, len(above)))
    low, high = np.quantile(change(above[draws].sum(1) / below[draws].sum(1)), (0.025, 0.975))
    return {
        "mean": round(float(change(above.sum() / below.sum())), 6),
        "low": round(float(low), 6),
        "high": round(float(high), 6),
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share of `count` draws (Wilson 1927)."""
    shrunk = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / shrunk
    half = _Z / shrunk * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)
