"""Charts of what a memory holds and does, in matplotlib; each function makes one figure."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .capacity import CapacityPoint
from .captures import Look
from .importance import Importance
from .maps import ReadMaps
from .slots import joined_reads

# Okabe and Ito's colours, without yellow, which is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":")
_BLOCK = re.compile(r"(?:.*/)?block(\d+)/(.+)")
MOST_TOKENS, MOST_SLOTS = 48, 24


def usage_map(looks: Sequence[Look]) -> Any:
    """Share of each block's read mass by slot, over an even share: 1 is even."""
    blocks = list(looks[0].reads)
    shares = torch.stack([joined_reads(looks, block).mean(0) for block in blocks])
    height = max(1.4, 0.24 * len(blocks) + 0.9)
    figure, axes = _axes(8.5, height)
    drawn = axes.pcolormesh(shares.numpy() * shares.shape[1], cmap="viridis", vmin=0)
    _rows(axes, [f"block {block}" for block in blocks])
    axes.set_xlabel("slot")
    figure.colorbar(drawn, ax=axes, label="share / even share")
    return figure


def read_map(maps: ReadMaps, block: int, texts: Sequence[str]) -> Any:
    """Tokens x slots before and after, of the last tokens and the slots whose reads differ most."""
    before, after = maps.before[block], maps.after[block]
    first = max(0, len(maps.ids) - MOST_TOKENS)
    before, after = before[first:], after[first:]
    slots = telling(torch.cat([before, after]), MOST_SLOTS)
    top = float(torch.cat([before, after])[:, slots].max())
    figure, grid = _axes(max(5.5, 0.44 * len(slots) + 3), 0.16 * len(before) + 1.2, columns=2)
    titles = "before", f"after {maps.updates} updates"
    for axes, values, title in zip(grid, (before, after), titles, strict=True):
        axes.pcolormesh(values[:, slots].numpy(), cmap="viridis", vmin=0, vmax=top)
        axes.set_title(title, fontsize=8)
        axes.set_xticks([i + 0.5 for i in range(len(slots))], [str(slot) for slot in slots], rotation=90, fontsize=6)
        axes.set_xlabel("slot")
        _rows(axes, list(texts)[first:], size=6)
    grid[1].tick_params(labelleft=False)
    figure.colorbar(grid[0].collections[0], ax=list(grid), label="read weight")
    return figure


def write_map(writes: Tensor, texts: Sequence[str]) -> Any:
    """Tokens x slots: how much of each slot's write came from each token, (T, N); the first `MOST_TOKENS`."""
    shown = writes[:MOST_TOKENS]
    slots = telling(shown, MOST_SLOTS)
    figure, axes = _axes(max(3.5, 0.22 * len(slots) + 2), 0.16 * len(shown) + 0.9)
    drawn = axes.pcolormesh(shown[:, slots].numpy(), cmap="viridis", vmin=0)
    axes.set_xticks([i + 0.5 for i in range(len(slots))], [str(slot) for slot in slots], rotation=90, fontsize=6)
    axes.set_xlabel("slot")
    _rows(axes, texts[: len(shown)], size=6)
    figure.colorbar(drawn, ax=axes, label="share of the write x input gate")
    return figure


def telling(reads: Tensor, most: int) -> list[int]:
    """The slots whose weights (T, N) differ most between tokens, in order of their numbers."""
    spread = reads.std(0, correction=0)
    return sorted(spread.topk(min(most, reads.shape[1])).indices.tolist())


def rank_curves(look: Look) -> Any:
    """Effective rank of each bank over the tokens read."""
    figure, axes = _axes(6, 2.8)
    for number, (bank, ranks) in enumerate(look.ranks.items()):
        axes.plot([0, *look.commits], ranks, label=bank, **_mark(number), marker=_dots(ranks))
    axes.set_xlabel("tokens read")
    axes.set_ylabel("effective rank")
    axes.set_ylim(bottom=0)
    _legend(axes, len(look.ranks))
    return figure


def gate_traces(look: Look) -> Any:
    """A panel for each diagnostic, a line for each block, over the tokens read."""
    panels = traces(look)
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure, grid = _axes(3.1 * across, 2.2 * down, columns=across, rows=down)
    flat = grid if isinstance(grid, list) else [grid]
    for axes, (name, lines) in zip(flat, panels.items(), strict=False):
        for number, (label, values) in enumerate(lines.items()):
            axes.plot(list(look.commits), values, label=label, **_mark(number), marker=_dots(values))
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("tokens read")
        _legend(axes, len(lines))
    for axes in flat[len(panels) :]:
        axes.set_axis_off()
    return figure


def traces(look: Look) -> dict[str, dict[str, list[float]]]:
    """Diagnostics over commits: name -> block -> values; NaN where a commit has none."""
    panels: dict[str, dict[str, list[float]]] = {}
    for key in dict.fromkeys(key for found in look.diagnostics for key in found):
        match = _BLOCK.fullmatch(key)
        name, label = (match[2], f"block {match[1]}") if match else (key, "")
        panels.setdefault(name, {})[label] = [found.get(key, math.nan) for found in look.diagnostics]
    return panels


def importance_bars(importances: Mapping[str, Importance]) -> Any:
    """Change of the answer's loss by slot; a panel for each way of taking a slot away."""
    figure, grid = _axes(8.5, 2.1 * len(importances), rows=len(importances))
    for axes, (name, found) in zip(grid if isinstance(grid, list) else [grid], importances.items(), strict=True):
        axes.bar(found.slots, found.total.tolist(), color=_COLOURS[0], width=0.8)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_title(f"{name} ({found.bank})", fontsize=8)
        axes.set_ylabel("change of loss (nats)")
        axes.set_xlabel("slot")
    return figure


def capacity_plot(points: Sequence[CapacityPoint]) -> Any:
    """Facts recalled against facts stored, with intervals; dashed: all of them."""
    figure, axes = _axes(4.6, 3.2)
    stored, recalled = [point.facts for point in points], [point.recalled for point in points]
    axes.plot(stored, stored, color="#888888", linestyle="--", linewidth=1, label="all")
    spread = [[abs(point.recalled - end) for point in points for end in [point.bounds[i]]] for i in (0, 1)]
    axes.errorbar(stored, recalled, spread, color=_COLOURS[0], marker="o", markersize=4, capsize=2, label="recalled")
    axes.set_xlabel("facts stored")
    axes.set_ylabel("facts recalled")
    axes.legend(fontsize=7, frameon=False)
    return figure


def _axes(width: float, height: float, *, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes: one, or a list of them."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    flat = list(grid.flat)
    return figure, flat if len(flat) > 1 else flat[0]


def _rows(axes: Any, labels: Sequence[str], size: int = 7) -> None:
    axes.set_yticks([i + 0.5 for i in range(len(labels))], list(labels), fontsize=size)
    axes.set_ylim(len(labels), 0)
    axes.tick_params(length=0)


def _mark(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)],
        "linewidth": 1.2,
    }


def _dots(values: Sequence[float]) -> str:
    return "." if len(values) < 30 else ""


def _legend(axes: Any, lines: int) -> None:
    if 1 < lines <= 16:
        axes.legend(fontsize=6, frameon=False, ncols=2 if lines > 6 else 1)
