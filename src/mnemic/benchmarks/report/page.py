"""One page that needs nothing but itself: leaderboard, figures, what was measured, settings."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ...analysis.drawing import check_plots
from ...analysis.html import rendered
from ...analysis.svg import inline
from .board import Board, Data, board
from .figures import drawings
from .tables import amount, facts, fixed, legend, percent, size, speeds_legend, spread
from .text import LEGEND, MEASURES, shown, text


def page(results: Data, costs: Sequence[Data]) -> str:
    """The report as HTML; equal data give equal text.

    Raises:
        InputError: see `board`. MissingExtraError: no matplotlib.
    """
    check_plots()
    made = board(results, costs)
    headings, known = _known(made)
    figures = [
        (drawing, inline(drawing, f"figure{number}-")) for number, drawing in enumerate(drawings(results, costs), 1)
    ]
    return rendered(
        Path(__file__).parent,
        title=results["title"],
        scale=results.get("scale"),
        settings=_as_text(results.get("settings")),
        legend=legend(made, "Bold"),
        tasks=[(task, len(list(group))) for task, group in groupby(made.columns, lambda column: column.task)],
        lengths=[column.length for column in made.columns],
        facts=headings,
        rows=[_row(made, model, known[model["model"]]) for model in made.models],
        has_mean=bool(made.means) and len(made.columns) > 1,
        chances=[" / ".join(map(percent, made.chances[column])) for column in made.columns],
        sections=[
            (heading, list(group)) for heading, group in groupby(figures, lambda drawn: drawn[0].section)
        ],
        costs=[_cost(cost) for cost in costs],
        speeds=speeds_legend(results),
        text=_text(results),
    )  # fmt: skip


def _row(made: Board, model: Data, known: list[tuple[float | None, str]]) -> dict[str, Any]:
    name = model["model"]
    return {
        "name": name,
        "memory": "" if model["memory"] == name else model["memory"],
        "note": model.get("note"),
        "mean": (repr(made.means[name]), percent(made.means[name])) if name in made.means else None,
        "cells": [
            {
                "value": repr(entry.official.mean),
                "official": percent(entry.official.mean),
                "spread": spread(entry),
                "fixed": fixed(entry),
                "truncated": entry.truncated,
                "best": (name, column) in made.best,
            }
            if (entry := made.entries.get((name, column)))
            else None
            for column in made.columns
        ],
        "facts": known,
    }


def _text(results: Data) -> dict[str, Any] | None:
    if (made := text(results)) is None:
        return None
    rows = [
        (
            name,
            [
                {
                    "value": repr(made.entries[name, column][measure].mean),
                    "said": said,
                    "best": measure == "perplexity" and (name, column) in made.best,
                }
                if (said := shown(made, name, column, measure))
                else None
                for column in made.columns
                for measure in MEASURES
            ],
        )
        for name in made.models
    ]
    tasks = [f"{column.task}, {column.length} tokens" for column in made.columns]
    return {"tasks": tasks, "measures": MEASURES, "rows": rows, "legend": LEGEND}


def _known(made: Board) -> tuple[list[str], dict[str, list[tuple[float | None, str]]]]:
    """Headings, and the values of each model, of the facts that are known of any model."""
    rows = {model["model"]: facts(made, model) for model in made.models}
    first = next(iter(rows.values()))
    kept = [i for i in range(len(first)) if any(row[i][2] for row in rows.values())]
    return [first[i][0] for i in kept], {name: [row[i][1:] for i in kept] for name, row in rows.items()}


def _cost(cost: Data) -> list[tuple[str, str]]:
    """(class, text) of each cell."""
    run = ["" if cost[key] is None else str(cost[key]) for key in ("model", "task", "length", "train_seed", "seed")]
    measured = [f"{cost['seconds']:.1f}", amount(cost["tokens_per_second"])]
    measured += [size(cost["peak_bytes"])]
    return [("", text) for text in run] + [("number", text) for text in measured]


def _as_text(settings: Any) -> str:
    return json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) if settings else ""
