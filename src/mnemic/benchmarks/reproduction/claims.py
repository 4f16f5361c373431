"""Each claim of LM2's paper, what it prints, and what a reproduction found; nothing here is typed but the claims."""

from collections.abc import Mapping
from typing import Any

from . import printed

_NONE = "not run yet"
_SMALL = "not measured: at this size MMLU is a guess"


def claims(found: Mapping[str, Any] | None) -> str:
    """A table; found: what `findings` gave, or None where nothing has been run.

    Of the main board's qa1, or of all ten tasks where it has them; and of all ten where another board has them.
    """
    rows = []
    for board, task in _measured(found):
        of = "qa1" if task == "qa1" else "mean of qa1 to qa10"
        rows += [
            [f"{of}, 0K to 4K: LM2 over {said}", _printed_margin(name, task), _margin(found, board, entry)]
            for said, name, entry in _OVER
        ]
        rows += [
            [f"{of} at {said}: LM2 / RMT / host", _printed(said, task), _ours(found, board, task, at)]
            for said, at in _AT
        ]
    rows += [
        ["LM2 with its equations as printed against the one above", "–", _variant(found, "lm2 as printed")],
        ["Memory in more blocks: lower perplexity", "1 of 16 near the host; 16 clearly best", _blocks(found)],
        ["Ordinary text: LM2's perplexity against the host's, equally large", "–", _text(found)],
        ["MMLU: LM2 / RMT / host", "29.4 / 26.5 / 28.0", _SMALL if found is not None else _NONE],
    ]
    lines = [["claim", "printed", "here"], ["---"] * 3, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _measured(found: Mapping[str, Any] | None) -> list[tuple[str, str | None]]:
    """Boards that the claims are of, each with its task, None for the mean over all ten."""
    if found is None:
        return [("", "qa1")]
    every = [
        name for name in (found["main"], *found["besides"]) if len(found["boards"].get(name, _EMPTY)["tasks"]) == 10
    ]
    return [*([] if found["main"] in every else [(found["main"], "qa1")]), *((name, None) for name in every)]


_EMPTY: Mapping[str, Any] = {"tasks": []}

_OVER = (("RMT", "RMT-1.7B", "rmt"), ("Llama-3.2 (here: the host alone)", "Llama-3.2-1.2B", "none"))
"""As said in the claim, named in the paper's table, and here."""
_AT = (("0K", "0k"), ("1K", "1k"), ("2K", "2k"), ("4K", "4k"), (">=8K", "8k"))
"""Lengths as printed and as measured."""
_MODELS = {"lm2": "LM2-1.7B", "rmt": "RMT-1.7B", "none": "vanilla-Llama-1.7B"}


def _printed_margin(other: str, task: str | None) -> str:
    """As the paper says it of all tasks; of one, from its table."""
    if task is None:
        return f"{printed.MARGINS[other]:+}%"
    ours, theirs = (sum(_place(length, name, task) for length in printed.COMPARED) for name in ("LM2-1.7B", other))
    return f"{100 * (ours / theirs - 1):+.1f}%, from its table"


def _place(length: str, name: str, task: str | None) -> float:
    """The printed score; without a task the mean over them."""
    return printed.TABLE[length][name][-1 if task is None else int(task.removeprefix("qa")) - 1]


def _printed(length: str, task: str | None) -> str:
    return " / ".join(f"{_place(length, name, task):.1f}" for name in _MODELS.values())


def _ours(found: Mapping[str, Any] | None, board: str, task: str | None, length: str) -> str:
    """The scores of the three models in percent; over all tasks where none is named."""
    if found is None:
        return _NONE
    models = found["boards"][board]["rows"].get(length, {})
    return " / ".join(_score(models.get(name), task) for name in _MODELS)


def _score(cells: Mapping[str, Any] | None, task: str | None) -> str:
    if not cells or (task is not None and task not in cells):
        return "–"
    chosen = list(cells.values()) if task is None else [cells[task]]
    return f"{100 * sum(c[0] for c in chosen) / len(chosen):.1f}"


def _margin(found: Mapping[str, Any] | None, board: str, other: str) -> str:
    if found is None:
        return _NONE
    one = (found["margins"] if board == found["main"] else found["besides"][board]).get(other)
    if one is None or one["all"] is None:
        return "–"
    means, ratios, interval = one["all"]["ratio_of_means"], one["all"]["mean_of_ratios"], one["interval"]
    between = "" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}; "
    return f"{means:+.1f}% ({between}{ratios:+.1f}% as the mean of ratios)"


def _variant(found: Mapping[str, Any] | None, entry: str) -> str:
    """The entry's score against LM2's on the main board or the first other one that has both, at 1k if measured."""
    if found is None:
        return _NONE
    for name, board in sorted(found["boards"].items(), key=lambda one: one[0] != found["main"]):
        for length in sorted(board["rows"], key=lambda one: one != "1k"):
            models = board["rows"][length]
            if {entry, "lm2"} <= models.keys():
                return f"{_score(models[entry], None)} against {_score(models['lm2'], None)} (board {name} at {length})"
    return "–"


def _blocks(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return _NONE
    rows = found["text"].get("blocks", [])
    return "; ".join(
        f"{one['model']} {one['perplexity']['mean']:.2f} ({one['perplexity']['low']:.2f} to "
        f"{one['perplexity']['high']:.2f})"
        for one in rows
    )


def _text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return _NONE
    one = next((c for c in found["text_changes"] if (c["model"], c["against"]) == ("lm2", "none")), None)
    return "–" if one is None else f"{one['mean']:+.2f}% ({one['low']:+.2f} to {one['high']:+.2f})"
