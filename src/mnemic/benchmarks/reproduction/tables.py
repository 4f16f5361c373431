"""What a reproduction found: tables, margins, ablations, held-out text and curves, as JSON, Markdown and PNG."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ...core.errors import MissingExtraError
from ...core.files import replace_atomically
from ..experiment import LOG
from ..jobs import Outcome
from ..leaderboard import leaderboard
from . import printed
from .layout import layout, margins
from .margin_interval import margin_interval
from .recipe import Recipe
from .text_changes import text_changes

FINDINGS, TABLES, CURVES = "findings.json", "tables.md", "curves.png"


def findings(recipe: Recipe, folder: str | Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything that was found, as plain data.

    Returns: "boards": name -> {"tasks", "rows": length -> model -> task -> [mean, low, high]}, ranges being those of
        the training seeds, or the 95% interval of a single run; "text": board -> held-out perplexities;
        "text_changes": see `text_changes`; "margins": other -> "all": of the means over the training seeds, "interval":
        see `margin_interval`, "seeds": of each; "besides": board -> its margins; "curves": board -> entry ->
        [tokens, perplexity]; "models", "settings", "scale", "environment".
    """
    folder = Path(folder)
    results, _ = leaderboard(recipe.comparison, folder, outcomes)
    asked: dict[str, set[str]] = {}
    for job in recipe.comparison.jobs:
        asked.setdefault(job.board, set()).update(name for one in job.evaluations for name, _, _ in one.names())
    scores, text = (_by_board(results.get(kind, []), asked) for kind in ("scores", "text"))
    boards = {name: layout({**results, "scores": own}) for name, own in scores.items()}
    return {
        "title": recipe.comparison.title,
        "scale": recipe.comparison.scale,
        "main": recipe.main,
        "boards": {name: table.as_json() for name, table in boards.items()},
        "text": text,
        "text_changes": text_changes(folder, outcomes),
        "margins": _margins(recipe, recipe.main, folder, outcomes, results, scores.get(recipe.main, [])),
        "besides": {
            name: _margins(recipe, name, folder, outcomes, results, scores.get(name, [])) for name in recipe.besides
        },
        "curves": {name: _curves(recipe, folder, outcomes, name) for name in recipe.curves},
        "models": results["models"],
        "settings": results["settings"],
        "environment": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _by_board(
    rows: Sequence[Mapping[str, Any]], asked: Mapping[str, set[str]]
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Scores by board, tasks without its name, which stands before them where two boards measure the same one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        board, _, task = row["task"].rpartition(": ")
        board = board or next(name for name, tasks in asked.items() if task in tasks)
        found.setdefault(board, []).append({**row, "task": task})
    return found


def _margins(
    recipe: Recipe, board: str, folder: Path, outcomes: Sequence[Outcome], results: Mapping[str, Any],
    scores: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Of a board, by other entry: of the means over training seeds, its interval, and of each training seed."""
    done = [one.job for one in outcomes if one.refused is None and one.job.board == board]

    def one(other: str, some: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
        averages = layout({**results, "scores": some}).averages() if some else {}
        return margins(averages, recipe.model, other, recipe.compared)

    seeds = sorted({s["train_seed"] for s in scores})
    return {
        other: {
            "all": one(other, scores),
            "interval": margin_interval(folder, done, recipe.model, other, recipe.compared),
            "seeds": {str(seed): one(other, [s for s in scores if s["train_seed"] == seed]) for seed in seeds},
        }
        for other in recipe.others
    }


def _curves(
    recipe: Recipe, folder: Path, outcomes: Sequence[Outcome], board: str
) -> dict[str, list[list[float]]]:  # fmt: skip
    """Entry -> [tokens seen, perplexity of the training text since the line before], mean over seeds of the loss.

    All samples of such a board have one length, so tokens go with steps.
    """
    losses: dict[str, dict[float, list[float]]] = {}
    for outcome in outcomes:
        job = outcome.job
        if job.board != board or outcome.refused is not None or job.trained is not None:
            continue
        log = json.loads((folder / job.folder / LOG).read_text(encoding="utf-8"))
        each = log["summary"]["tokens"] / job.experiment.steps
        for line in log["history"]:
            if "loss" in line:
                losses.setdefault(job.entry, {}).setdefault(line["step"] * each, []).append(line["loss"])
    return {
        entry: [[round(at), round(math.exp(min(sum(found) / len(found), 50)), 4)] for at, found in sorted(line.items())]
        for entry, line in losses.items()
    }


def write(found: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """findings.json, tables.md and, where there are curves, curves.png; the paths.

    Raises:
        MissingExtraError: curves, and no matplotlib.
    """
    folder = Path(folder)
    texts = {FINDINGS: json.dumps(found, indent=1) + "\n", TABLES: markdown(found)}
    for name, text in texts.items():
        replace_atomically(folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    paths = [folder / name for name in texts]
    if any(found["curves"].values()):
        figure = plot(found["curves"])
        replace_atomically(folder / CURVES, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
        paths.append(folder / CURVES)
    return paths


def markdown(found: Mapping[str, Any]) -> str:
    """All tables, the main one first."""
    order = sorted(found["boards"], key=lambda name: name != found["main"])
    parts = [f"# {found['title']}\n"]
    for name in order:
        parts.append(f"## {name}\n\n{board_table(found['boards'][name])}\n")
        if name == found["main"]:
            parts.append(f"{margin_table(found['margins'])}\n")
        if name in found["besides"]:
            parts.append(f"{margin_table(found['besides'][name])}\n")
    for name, rows in found["text"].items():
        parts.append(f"## {name}: held-out text\n\n{text_table(rows)}\n")
    if found["text_changes"]:
        parts.append(f"## Held-out text, compared\n\n{change_table(found['text_changes'])}\n")
    return "\n".join(parts)


def board_table(board: Mapping[str, Any]) -> str:
    """Lengths and models down, tasks across, as in the paper; of one task, models down and lengths across.

    In percent; behind each score the lowest and highest of the seeds, or the 95% interval of a single one.
    """
    tasks, rows = board["tasks"], board["rows"]
    if len(tasks) == 1:
        models = dict.fromkeys(name for found in rows.values() for name in found)
        values = [[_cell(rows[length].get(name, {}).get(tasks[0])) for length in rows] for name in models]
        return _table([tasks[0], *rows], [[name, *cells] for name, cells in zip(models, values, strict=True)])
    lines = []
    for length, models in rows.items():
        for name, cells in models.items():
            mean = sum(one[0] for one in cells.values()) / len(cells)
            lines.append([length, name, *(_cell(cells.get(task)) for task in tasks), f"{100 * mean:.1f}"])
    return _table(["length", "model", *tasks, "mean"], lines)


def _cell(score: Sequence[float] | None) -> str:
    if score is None:
        return "–"
    mean, low, high = score
    return f"{100 * mean:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def margin_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """How much better the model is than each other entry, beside what the paper prints and what its table gives."""
    lines = []
    for other, one in found.items():
        each = [m["ratio_of_means"] for m in one["seeds"].values() if m is not None]
        whole, interval = one["all"], one["interval"]
        lines.append(
            [
                other,
                *(["–", "–"] if whole is None else [f"{whole[kind]:+.1f}%" for kind in _KINDS]),
                "–" if interval is None else f"{interval[0]:+.1f}% to {interval[1]:+.1f}%",
                f"{min(each):+.1f}% to {max(each):+.1f}%" if each else "–",
            ]
        )
    for other, said in printed.MARGINS.items():
        one = margins(printed.averages(), "LM2-1.7B", other, printed.COMPARED)
        assert one is not None
        lines.append([f"paper: {other}, printed +{said}%", *(f"{one[kind]:+.1f}%" for kind in _KINDS), "–", "–"])
    return _table(["better than", "ratio of means", "mean of ratios", "95%, of the questions", "seeds"], lines)


_KINDS = ("ratio_of_means", "mean_of_ratios")


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity on held-out text and what carrying the state gains, with 95% intervals."""
    lines = []
    for one in rows:
        p, g = one["perplexity"], one["gain"]
        lines.append(
            [
                one["model"], str(one["train_seed"]), one["length"],
                f"{p['mean']:.2f} ({p['low']:.2f} to {p['high']:.2f})",
                f"{g['mean']:.4f} ({g['low']:.4f} to {g['high']:.4f})",
            ]
        )  # fmt: skip
    return _table(["model", "seed", "length", "perplexity", "nats a token gained by carrying"], lines)


def change_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """By how much each perplexity is above another one on the same pieces of text, with 95% intervals."""
    lines = [
        [
            f"{one['board']}: {one['model']}", str(one["train_seed"]), one["length"], one["against"],
            f"{one['mean']:+.2f}% ({one['low']:+.2f} to {one['high']:+.2f})",
        ]
        for one in rows
    ]  # fmt: skip
    return _table(["board: model", "seed", "length", "against", "perplexity"], lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def plot(curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Any:
    """Perplexity against tokens, a panel a board, axes as in the paper.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Curves need matplotlib: pip install 'mnemic[plots]'.") from error
    figure = Figure(figsize=(5.5 * len(curves), 3.6), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for entry, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=entry, linewidth=1)
        axes.set(title=name, xlabel="tokens seen in training", ylabel="perplexity", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure
