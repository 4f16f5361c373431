"""The files of a report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.errors import InputError, MissingExtraError
from ...core.files import replace_atomically
from .board import Data, board
from .page import page
from .tables import models_csv, scores_csv
from .text import text, text_csv

REPORT, TABLE, COSTS, PAGE = "report.json", "report.csv", "costs.json", "report.html"
TEXT, MODELS = "text.csv", "models.csv"


def write_report(results: Data, costs: Sequence[Data], folder: str | Path) -> list[Path]:
    """Write report.json, report.csv, costs.json and report.html, each in one step, and return their paths.

    With them text.csv where there is held-out text, and models.csv where speeds were measured. All but costs.json and
    the page depend on the results alone, so equal results give equal bytes. The page comes last: without
    matplotlib the others are there, and the error says so.

    Raises:
        InputError: see `board`; no JSON; or the folder cannot be written. MissingExtraError: no matplotlib.
    """
    board(results, costs)
    text(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    makers = {
        REPORT: lambda: _json(results),
        TABLE: lambda: scores_csv(results),
        COSTS: lambda: _json(list(costs)),
        **({TEXT: lambda: text_csv(results)} if results.get("text") else {}),
        **({MODELS: lambda: models_csv(results)} if "speeds" in results else {}),
        PAGE: lambda: _page(results, costs),
    }
    for name, make in makers.items():
        # Bytes, since text would have the line ends of the platform.
        content = make().encode()
        replace_atomically(folder / name, lambda temporary, content=content: temporary.write_bytes(content))
    return [folder / name for name in makers]


def _page(results: Data, costs: Sequence[Data]) -> str:
    try:
        return page(results, costs)
    except MissingExtraError as error:
        raise MissingExtraError(f"{REPORT}, {TABLE} and {COSTS} are written, but not {PAGE}. {error}") from error


def _json(data: Any) -> str:
    try:
        return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"The report is no JSON ({error}); expected plain data and finite numbers.") from error
