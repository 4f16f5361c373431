"""Charts in matplotlib: heat maps in small multiples, curves, points; readable in print and for all colour vision."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .board import Board, Column
from .tables import amount, size

STATE = "state"

# Okabe and Ito's colours, without yellow, which is faint on white. With 9 markers, 63 models differ from each other.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES = ("-", "--", "-.", ":")
_COLOUR_MAP = "viridis"
_WIDTH = 12.5
_INCHES_PER_LETTER = 0.078


def heat_maps(
    panels: Mapping[str, Mapping[tuple[str, str], float]], rows: list[str], columns: list[str], down: str, across: str
) -> Any:
    """A panel for each model, its cells by (row, column)."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    labels = max(map(len, rows)) * _INCHES_PER_LETTER + 0.4
    cell = max(0.42, max(map(len, columns)) * _INCHES_PER_LETTER)
    width = max(cell * len(columns), 1.3) + 0.15
    down_page = math.ceil(len(panels) / max(1, int((_WIDTH - labels - 0.9) / width)))
    across_page = math.ceil(len(panels) / down_page)
    titles = {name: _folded(name, width) for name in panels}
    height = 0.24 * len(rows) + 0.17 * max(title.count("\n") + 1 for title in titles.values()) + 0.45
    figure = Figure((labels + width * across_page + 0.9, height * down_page + 0.2), layout="constrained")
    grid = figure.subplots(down_page, across_page, squeeze=False, sharex=True, sharey=True)
    colours, scale = colormaps[_COLOUR_MAP], Normalize(0, 1)
    for axes, name in zip(grid.flat, panels, strict=False):
        values = np.array([[panels[name].get((row, column), math.nan) for column in columns] for row in rows])
        axes.pcolormesh(values, norm=scale, cmap=colours, edgecolors="white", linewidth=0.8)
        for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
            value = values[row, column]
            text = axes.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=7)
            text.set_color(_readable(tuple(colours(value))))
            text.set_in_layout(False)
        axes.set_facecolor("#dddddd")
        axes.set_title(titles[name], fontsize=8)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylim(len(rows), 0)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    # The panel above a gap has no labels of its own, since panels share them.
    for place in range(len(panels) - across_page, len(panels)):
        grid.flat[max(place, 0)].tick_params(labelbottom=True)
    figure.supxlabel(across, fontsize=8)
    if down:
        figure.supylabel(down, fontsize=8)
    bar = figure.colorbar(
        ScalarMappable(scale, colours), ax=grid, shrink=min(1.0, 2 / (height * down_page)), aspect=14, pad=0.02
    )
    ticks = (0, 25, 50, 75, 100) if height * down_page > 1.2 else (0, 50, 100)
    bar.set_ticks([tick / 100 for tick in ticks], labels=[str(tick) for tick in ticks])
    bar.outline.set_visible(False)
    return figure


def _readable(colour: Sequence[float]) -> str:
    """Black or white, whichever has more contrast on red, green and blue from 0 to 1 (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def curves(made: Board, task: str, by_length: Mapping[str, Mapping[str, Mapping[float, tuple[float, int]]]]) -> Any:
    """A panel for each length, a line for each model: length -> model -> distance -> (score, count)."""
    from matplotlib.figure import Figure

    across = min(len(by_length), 3)
    down = math.ceil(len(by_length) / across)
    names = [name for name in made.scored if any(name in at for at in by_length.values())]
    width = max(3.9 * across, 5.0)
    figure = Figure((width, 2.7 * down + _legend_inches(names, width)), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for axes, (length, at) in zip(grid.flat, by_length.items(), strict=False):
        for chance in made.chances.get(Column(task, length), ()):
            handles["chance"] = axes.axhline(chance, color="#888888", linestyle=(0, (5, 4)), linewidth=1)
        for name in names:
            if points := at.get(name):
                (handles[name],) = axes.plot(
                    list(points), [score for score, _ in points.values()], **_mark(made, name), linewidth=1.2
                )
        axes.set_title(f"length {length}", fontsize=8)
        axes.set_xlabel("distance (segments)")
        _distances(axes, [value for points in at.values() for value in points])
        _percents(axes)
    for axes in grid.flat[len(by_length) :]:
        axes.set_axis_off()
    order = [*names, *(["chance"] if "chance" in handles else [])]
    _legend(figure, [(name, handles[name]) for name in order], width)
    return figure


def _distances(axes: Any, values: list[float]) -> None:
    """Whole numbers, closer together the larger they are where they span much."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if max(values) > 32:
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_xlim(min(values) - 0.5, max(values) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def scatter(made: Board, panels: Mapping[str, Mapping[str, float]]) -> Any:
    """A panel for each kind of cost, a point for each model at its mean score: label -> model -> cost."""
    from matplotlib.figure import Figure

    names = [name for name in made.scored if any(name in points for points in panels.values())]
    width = max(4.6 * len(panels), 5.0)
    figure = Figure((width, 3.2 + _legend_inches(names, width)), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for axes, (label, points) in zip(grid.flat, panels.items(), strict=True):
        _logarithmic(axes, list(points.values()), bytes=label == STATE)
        for name in names:
            if name in points:
                mark = {**_mark(made, name), "linestyle": "none", "markersize": 7}
                (handles[name],) = axes.plot([points[name]], [made.means[name]], **mark)
        axes.set_xlabel(label)
        _percents(axes)
    _legend(figure, [(name, handles[name]) for name in names], width)
    return figure


def _logarithmic(axes: Any, values: list[float], *, bytes: bool) -> None:
    """A logarithmic axis, with a place for 0 if there is one, and labels that are read at a glance."""
    positive = [value for value in values if value]
    base = 2 if bytes else 10
    ticks = _ticks(min(positive), max(positive), (1,) if bytes else (1, 2, 5), base)
    # Half a tick more on both sides, so that no point stands on the frame.
    low, high = ticks[0] / math.sqrt(ticks[1] / ticks[0]), ticks[-1] * math.sqrt(ticks[-1] / ticks[-2])
    if len(positive) == len(values):
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    else:
        axes.set_xscale("symlog", base=base, linthresh=ticks[0])
        axes.set_xlim(-ticks[0] / 2, high)
        ticks = [0.0, *ticks]
    axes.set_xticks(ticks, [size(int(tick)) if bytes else amount(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _ticks(low: float, high: float, digits: tuple[int, ...], base: int, most: int = 5) -> list[float]:
    """At least two and about `most` of digit x base^n, the first not above `low` and the last not below `high`."""
    powers = range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 2)
    found = [float(digit * base**power) for power in powers for digit in digits]
    first = max(i for i, tick in enumerate(found) if tick <= low)
    last = max(next(i for i, tick in enumerate(found) if tick >= high), first + 1)
    step = math.ceil((last - first) / most)
    if step > 1 and len(digits) > 1:
        return _ticks(low, high, (1,), base, most)
    last = first + math.ceil((last - first) / step) * step
    while last >= len(found):
        found.append(found[-1] * base)
    return found[first : last + 1 : step]


def _percents(axes: Any) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("score (%)")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mark(made: Board, name: str) -> dict[str, Any]:
    place = made.names.index(name)
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _LINES[place // len(_COLOURS) % len(_LINES)],
        "markersize": 4,
    }


def _legend_columns(names: list[str], width: float) -> int:
    return max(1, int(width / (max(map(len, names)) * _INCHES_PER_LETTER + 0.6)))


def _legend_inches(names: list[str], width: float) -> float:
    return 0.25 + 0.18 * math.ceil((len(names) + 1) / _legend_columns(names, width))


def _legend(figure: Any, handles: list[tuple[str, Any]], width: float) -> None:
    names = [name for name, _ in handles]
    # matplotlib leaves out labels that begin with "_".
    labels = [f"\u200b{name}" if name.startswith("_") else name for name in names]
    figure.legend(
        [handle for _, handle in handles], labels, loc="outside lower center", frameon=False, fontsize=8,
        ncols=min(_legend_columns(names, width), len(names)),
    )  # fmt: skip


def _folded(name: str, width: float) -> str:
    return "\n".join(textwrap.wrap(name, max(8, int(width / _INCHES_PER_LETTER)))) or name
