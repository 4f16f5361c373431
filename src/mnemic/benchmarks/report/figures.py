"""Figures of an evaluation: heat maps, curves by distance, accuracy against cost. Equal data give equal files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...analysis.drawing import Drawing, check_plots, check_suffix, save_drawings
from .board import Board, Column, Data, board, grouped, length_key, weighted
from .charts import STATE, curves, heat_maps, scatter

_MOST_ROWS = 40


def drawings(results: Data, costs: Sequence[Data]) -> list[Drawing]:
    """All figures for which there are data, in the order of the page.

    Raises:
        InputError: see `board`. MissingExtraError: no matplotlib.
    """
    check_plots()
    made = board(results, costs)
    return [*_task_maps(made), *_depth_maps(results, made), *_curves(results, made), *_cost(made)]


def save_figures(results: Data, costs: Sequence[Data], folder: str | Path, suffix: str = ".png") -> list[Path]:
    """One file a figure, as .png, .pdf or .svg.

    Raises:
        ConfigError: another suffix. InputError: see `board`. MissingExtraError: no matplotlib.
    """
    check_suffix(suffix)
    return save_drawings(drawings(results, costs), folder, suffix)


def _task_maps(made: Board) -> Iterator[Drawing]:
    """Tasks that share lengths, so very likely their unit, share a figure."""
    families = _families(made.columns)
    for number, (tasks, lengths) in enumerate(families, 1):
        panels = {
            name: {
                (task, length): made.entries[name, Column(task, length)].official.mean
                for task in tasks
                for length in lengths
                if (name, Column(task, length)) in made.entries
            }
            for name in made.scored
        }
        panels = {name: cells for name, cells in panels.items() if cells}
        yield Drawing(
            "task-length" if len(families) == 1 else f"task-length-{number}",
            "Task by length",
            f"Score of each model by task and length: {_some(tasks)}",
            "Percent by the official rule, mean over seeds. Grey: not evaluated.",
            lambda panels=panels, tasks=tasks, lengths=lengths: heat_maps(panels, tasks, lengths, "", "length"),
        )


def _families(columns: Sequence[Column]) -> list[tuple[list[str], list[str]]]:
    """(tasks, lengths) such that tasks of different families have no length in common."""
    families: list[tuple[list[str], set[str]]] = []
    for task in dict.fromkeys(column.task for column in columns):
        lengths = {column.length for column in columns if column.task == task}
        touching = [family for family in families if family[1] & lengths]
        merged = ([t for tasks, _ in touching for t in tasks] + [task], lengths.union(*(f[1] for f in touching)))
        families = [*(family for family in families if family not in touching), merged]
    return [(tasks, sorted(lengths, key=length_key)) for tasks, lengths in families]


def _depth_maps(results: Data, made: Board) -> Iterator[Drawing]:
    for task, by_length in grouped(results, "depth").items():
        lengths, found = list(by_length), {d for at in by_length.values() for at_model in at.values() for d in at_model}
        binned = len(found) > _MOST_ROWS
        rows = list(dict.fromkeys(_depth(d, binned) for d in (range(0, 100, 10) if binned else sorted(found))))
        panels: dict[str, dict[tuple[str, str], float]] = {}
        for name in made.scored:
            pairs: dict[tuple[str, str], list[tuple[float, int]]] = {}
            for length in lengths:
                for depth, pair in by_length[length].get(name, {}).items():
                    pairs.setdefault((_depth(depth, binned), length), []).append(pair)
            if pairs:
                panels[name] = {key: weighted(found) for key, found in pairs.items()}
        yield Drawing(
            f"depth-{task}",
            "Depth by length",
            f"{task}: score by depth of the fact and length of the context",
            "Percent by the official rule, pooled over seeds. Depth is the percentage of the context before the fact"
            + (", in steps of ten." if binned else "."),
            lambda panels=panels, rows=rows, lengths=lengths: heat_maps(panels, rows, lengths, "depth (%)", "length"),
        )


def _depth(percent: float, binned: bool) -> str:
    return str(min(int(percent // 10) * 10, 90)) if binned else f"{percent:.1f}".removesuffix(".0")


def _curves(results: Data, made: Board) -> Iterator[Drawing]:
    for task, by_length in grouped(results, "distance").items():
        counts = [count for at in by_length.values() for points in at.values() for _, count in points.values()]
        few = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
        yield Drawing(
            f"distance-{task}",
            "Score by distance",
            f"{task}: score by distance from the fact to the question",
            f"Percent by the official rule, pooled over seeds; {few} answers a point. Dashed grey: chance.",
            lambda task=task, by_length=by_length: curves(made, task, by_length),
        )


def _cost(made: Board) -> Iterator[Drawing]:
    """Of two or more models with all columns, since a mean over other columns says something else."""
    speeds = {n: c.tokens_per_second for n, c in made.costs.items() if c.tokens_per_second and n in made.means}
    states = {n: state for n in made.means if (state := made.state_bytes(n)) is not None}
    panels = {"tokens/s": speeds, STATE: states}
    panels = {label: points for label, points in panels.items() if len(points) > 1 and any(points.values())}
    if not panels:
        return
    left_out = [name for name in made.scored if name not in made.means]
    caption = "Mean score over all columns of the leaderboard, by the official rule; logarithmic across."
    if left_out:
        caption += f" Left out, since a column is missing: {_some(left_out)}."
    yield Drawing(
        "cost", "Score against cost", "Mean score against speed and size of the state", caption,
        lambda: scatter(made, panels),
    )  # fmt: skip


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
