"""Tables of an evaluation: on the terminal, and as CSV."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .board import RULES, Board, Column, Data, Entry, board
from .text import LEGEND, MEASURES, shown, text
from .text import Text as HeldOut

_RUN = ("model", "task", "length", "train_seed", "seed", "count", "chance", "mean_tokens", "truncated")
CSV_COLUMNS = (*_RUN, *(f"{rule}{part}" for rule in RULES for part in ("", "_low", "_high")))
# Of a column: a blank on both sides and one between columns.
_MARGIN = 3


def percent(value: float) -> str:
    """0.5 -> "50.0"."""
    return f"{100 * value:.1f}"


def spread(entry: Entry) -> str:
    """The range under a score, and in brackets how many seeds it is of."""
    text = f"{percent(max(entry.official.low, 0.0))}–{percent(entry.official.high)}"
    return text if entry.spread == "interval" else f"{text} ({entry.seeds})"


def fixed(entry: Entry) -> str | None:
    """The score by the fixed rule, where it is another one."""
    said = percent(entry.fixed.mean)
    return None if said == percent(entry.official.mean) else said


def amount(number: float | None) -> str:
    """1234567 -> "1.23M"."""
    if number is None:
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def size(number: int | None) -> str:
    """1536 -> "1.5 KiB"."""
    if number is None:
        return ""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**power:
            return f"{number / 2**power:.1f}".removesuffix(".0") + f" {unit}"
    return f"{number} B"


def facts(made: Board, model: Data) -> list[tuple[str, float | None, str]]:
    """(heading, number, as text) of what is known of a model besides its scores.

    A speed is followed by its ratio to the host without memory.
    """
    name = model["model"]
    cost = made.costs.get(name)
    speed, peak = (cost.tokens_per_second, cost.peak_bytes) if cost else (None, None)
    state, trained = made.state_bytes(name), model.get("tokens_trained")
    quiet = model.get("speeds") or {}
    train, decode = quiet.get("train"), quiet.get("decode")
    return [
        ("parameters", model["parameters"], amount(model["parameters"])),
        ("tokens trained", trained, amount(trained)),
        ("state", state, size(state)),
        ("tokens/s", speed, amount(speed)),
        ("peak memory", peak, size(peak)),
        ("training tokens/s", *_speed(train)),
        ("decode tokens/s", *_speed(decode)),
        ("long state", quiet.get("state_bytes"), size(quiet.get("state_bytes"))),
    ]


def _speed(found: Mapping[str, float] | None) -> tuple[float | None, str]:
    if found is None:
        return None, ""
    return found["tokens_per_second"], f"{amount(found['tokens_per_second'])} ({found['ratio']:.2f})"


def speeds_legend(results: Data) -> str | None:
    """What the speeds are, in words; None where none were measured."""
    if (how := results.get("speeds")) is None:
        return None
    return (
        f"Training and decode tokens/s: measured one model at a time on {how['device']}, {how['threads']} threads, "
        f"board {how['board']}, medians of {how['rounds']} rounds; in brackets the ratio to the host without memory in "
        f"the same turn. Decoding: one row that has read {how['history']:,} tokens; long state: what it then carries."
    )


def print_report(results: Data, costs: Sequence[Data], console: Console) -> None:
    """The leaderboard, in as many tables as the width of the console asks for, then what the models cost.

    Raises:
        InputError: see `board`.
    """
    made = board(results, costs)
    title = results["title"] + (f" ({results['scale']})" if results.get("scale") else "")
    for columns in _packed(made, console.width):
        console.print(_scores(made, columns, title, _has_mean(made) and columns[-1] == made.columns[-1]))
        title = ""
    if title:
        console.print(Text(title, style="bold"))
    about = _table("")
    about.add_column("model", overflow="fold")
    rows = {model["model"]: facts(made, model) for model in made.models}
    kept = [i for i in range(len(next(iter(rows.values())))) if any(row[i][2] for row in rows.values())]
    for i in kept:
        about.add_column(next(iter(rows.values()))[i][0], justify="right")
    for name, row in rows.items():
        about.add_row(Text(name), *(Text(row[i][2]) for i in kept))
    console.print(about)
    if (quiet := speeds_legend(results)) is not None:
        console.print(Text(quiet), soft_wrap=True)
    if (held_out := text(results)) is not None:
        for column in held_out.columns:
            console.print(_text(held_out, column))
        console.print(Text(LEGEND), soft_wrap=True)
    for model in made.models:
        if model.get("note"):
            console.print(Text(f"{model['model']}: {model['note']}"))
    if made.columns:
        console.print(Text("\n".join(legend(made, "*"))), soft_wrap=True)


def legend(made: Board, best: str) -> list[str]:
    """What the marks of the leaderboard mean, in sentences; only of those that it has. best: how the best is marked."""
    entries = made.entries.values()
    kinds = {entry.spread for entry in entries}
    below = ["its 95% interval"] if "interval" in kinds else []
    below += [f"the lowest to the highest of (n) {kind}" for kind in sorted(kinds - {"interval"}, reverse=True)]
    lines = [f"Percent by the official rule; below a score {', or '.join(below)}."]
    if made.best:
        lines.append(f"{best}: the best of a column, and what is not below the range of the best.")
    if any(fixed(entry) for entry in entries):
        lines.append("fixed: the score by the rule without the bugs of the official one, where it differs.")
    if any(entry.truncated for entry in entries):
        lines.append("†: tokens of the contexts that were not read.")
    if made.means and len(made.columns) > 1:
        lines.append("mean: over all columns, for models that have all of them.")
    return lines


def _scores(made: Board, columns: Sequence[Column], title: str, means: bool) -> Table:
    table = _table(title)
    table.add_column("model", overflow="fold")
    for column in columns:
        table.add_column(Text(f"{column.task}\n{column.length}"), justify="right", overflow="fold")
    if means:
        table.add_column("mean", justify="right")
    for name in made.scored:
        mean = [Text(percent(made.means[name]) if name in made.means else "")] if means else []
        table.add_row(Text(name), *(_cell(made, name, column) for column in columns), *mean)
    if any(made.chances[column] for column in columns):
        table.add_section()
        table.add_row(Text("chance"), *(Text(" / ".join(map(percent, made.chances[column]))) for column in columns))
    return table


def _text(made: HeldOut, column: Column) -> Table:
    table = _table(f"{column.task}, pieces of {column.length} tokens")
    table.add_column("model", overflow="fold")
    for measure in MEASURES:
        table.add_column(measure, justify="right")
    for name in made.models:
        cells = []
        for measure in MEASURES:
            said, best = shown(made, name, column, measure), (name, column) in made.best and measure == "perplexity"
            if said is None:
                cells.append(Text("–", style="dim"))
                continue
            cells.append(Text(f"{'* ' if best else ''}{said[0]}", style="bold" if best else ""))
            cells[-1].append(f"\n{said[1]}", style="not bold dim")
        table.add_row(Text(name), *cells)
    return table


def _cell(made: Board, name: str, column: Column) -> Text:
    entry = made.entries.get((name, column))
    if entry is None:
        return Text("–", style="dim")
    best = (name, column) in made.best
    text = Text(f"{'* ' if best else ''}{percent(entry.official.mean)}", style="bold" if best else "")
    text.append(f"\n{spread(entry)}", style="not bold dim")
    if said := fixed(entry):
        text.append(f"\nfixed {said}", style="not bold")
    if entry.truncated:
        text.append(f"\n† {entry.truncated:,}", style="not bold")
    return text


def _packed(made: Board, width: int) -> Iterator[list[Column]]:
    """Columns in runs that fit the console beside the names and the mean; at least one a run."""
    if not made.columns:
        return
    beside = [max(map(len, [*made.scored, "chance"])), *([len("100.0")] if _has_mean(made) else [])]
    room = width - sum(letters + _MARGIN for letters in beside) - _MARGIN
    run: list[Column] = []
    used = 0
    for column in made.columns:
        lines = [column.task, column.length]
        lines += [line for name in made.scored for line in _cell(made, name, column).plain.splitlines()]
        needed = max(map(len, lines)) + _MARGIN
        if run and used + needed > room:
            yield run
            run, used = [], 0
        run.append(column)
        used += needed
    yield run


def _has_mean(made: Board) -> bool:
    return len(made.columns) > 1 and bool(made.means)


def _table(title: str) -> Table:
    return Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")


def models_csv(results: Data) -> str:
    """One row a model: what it is, and its speeds."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    known = ("model", "memory", "parameters", "tokens_trained", "state_bytes")
    parts = ("tokens_per_second", "ratio", "low", "high")
    writer.writerow([*known, *(f"{kind}_{part}" for kind in ("train", "decode") for part in parts), "long_state_bytes"])
    for model in results["models"]:
        quiet = model.get("speeds") or {}
        speeds = [quiet.get(kind, {}).get(part) for kind in ("train", "decode") for part in parts]
        writer.writerow([*(model.get(key) for key in known), *speeds, quiet.get("state_bytes")])
    return made.getvalue()


def scores_csv(results: Data) -> str:
    """One row a score; numbers as Python writes them, so that they are read back to the same bits."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for score in results["scores"]:
        writer.writerow(
            [*(score[key] for key in _RUN), *(score[rule][part] for rule in RULES for part in ("mean", "low", "high"))]
        )
    return made.getvalue()
