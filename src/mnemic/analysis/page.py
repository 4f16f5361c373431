"""One page a model that needs nothing but itself: what its memory holds, reads and writes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import figures
from .drawing import Drawing, check_plots
from .html import rendered
from .inspection import Inspection
from .reports import REPORTS
from .slots import Share
from .svg import inline

MOST_ROWS = 64


def drawings(found: Inspection) -> list[Drawing]:
    """All figures for which there are data, in the order of the page.

    Raises:
        MissingExtraError: no matplotlib.
    """
    check_plots()
    return list(_drawings(found))


def inspection_page(found: Inspection, title: str, facts: Mapping[str, str]) -> str:
    """The page as HTML; equal data give equal text. facts: of the model, shown as they are.

    Raises:
        MissingExtraError: no matplotlib.
    """
    drawn = [(one, inline(one, f"figure{number}-")) for number, one in enumerate(drawings(found), 1)]
    return rendered(
        Path(__file__).parent,
        title=title,
        facts=facts,
        drawn=drawn,
        slots=_slot_rows(found),
        readers=_token_rows(found),
        usage=None if found.slots is None else found.slots.usage,
        block=found.block,
        explanations=[
            (one.slot, "" if one.score is None else f"{one.score:.2f}", one.text,
             [" ".join(span.tokens) for span in one.spans[:2]])
            for one in found.explanations
        ],
        missing=[(name, REPORTS[name], reason) for name, reason in found.missing.items()],
        tokens=found.tokens,
    )  # fmt: skip


def _drawings(found: Inspection) -> Iterator[Drawing]:
    look = found.look
    texts = f"{len(found.looks)} texts of " if len(found.looks) > 1 else ""
    words = [found.texts[i] for i in found.ids]
    if found.slots is not None:
        yield Drawing(
            "usage", "Slots", "Use of slots",
            f"Share of the read mass by block and slot, over an even share; {texts}{found.tokens:,} tokens.",
            lambda: figures.usage_map(found.looks),
        )  # fmt: skip
    if found.slots is not None and found.slots.writers and look.commits:
        writes = look.writes[found.slots.block][: look.commits[-1]]
        shown = f"the first {figures.MOST_TOKENS}" if len(writes) > figures.MOST_TOKENS else "all"
        yield Drawing(
            "writes", "Writes", f"Which tokens are written in block {found.slots.block}",
            f"How much of each slot's write came from each token, its share of what was routed there times the slot's "
            f"input gate; {shown} of the {len(writes):,} tokens written.",
            lambda: figures.write_map(writes, words),
        )  # fmt: skip
    if (maps := found.maps) is not None and found.block is not None:
        block, mapped = found.block, [found.texts[i] for i in maps.ids.tolist()]
        shown = f"the last {figures.MOST_TOKENS} tokens" if len(maps.ids) > figures.MOST_TOKENS else "all tokens"
        yield Drawing(
            "read-maps", "Reads before and after updates", f"What tokens read in block {block}",
            f"Read weights of {shown} of the prompt's end, and the slots whose reads differ most. Left: the bank as "
            f"these tokens met it. Right: the same tokens against the bank after {maps.updates} updates.",
            lambda: figures.read_map(maps, block, mapped),
        )  # fmt: skip
    if "rank" in found.made:
        yield Drawing(
            "rank", "Slots over time", "Effective rank of the slots",
            "exp of the entropy of the singular values, after each commit.", lambda: figures.rank_curves(look),
        )  # fmt: skip
    if "gates" in found.made:
        yield Drawing(
            "gates", "Gates", "The memory's diagnostics at each commit",
            f"Means over the tokens of each commit; {len(found.ids):,} tokens.",
            lambda: figures.gate_traces(look),
        )  # fmt: skip
    if found.importance:
        yield Drawing(
            "importance", "Importance of slots", "Change of the loss of the answer without a slot",
            f"The answer: {' '.join(words[-found.answer :])!r}. Above 0: the slot helps.",
            lambda: figures.importance_bars(found.importance),
        )  # fmt: skip
    if found.capacity:
        answers = sum(point.answers for point in found.capacity)
        yield Drawing(
            "capacity", "Capacity", "Facts recalled against facts stored",
            f"{answers:,} answers, with 95% intervals; corrected for guessing.",
            lambda: figures.capacity_plot(found.capacity),
        )  # fmt: skip


def _slot_rows(found: Inspection) -> list[dict[str, Any]]:
    """The most used slots, and the least."""
    if (report := found.slots) is None:
        return []
    order = report.usage.share.argsort(descending=True).tolist()
    if len(order) > MOST_ROWS:
        order = [*order[: MOST_ROWS - 4], *order[-4:]]
    names = found.texts
    return [
        {
            "slot": slot,
            "share": f"{100 * float(report.usage.share[slot]):.2f}",
            "readers": _said(report.readers[slot], names),
            "writers": _said(report.writers[slot], names) if report.writers else "",
        }
        for slot in order
    ]


def _token_rows(found: Inspection) -> list[tuple[str, str]]:
    """The last tokens of the first text and their top slots, the answer's first."""
    if found.slots is None:
        return []
    names = found.texts
    last = list(dict.fromkeys(reversed(found.ids)))[:MOST_ROWS]
    return [(names[i], ", ".join(f"{one.number} ({one.mean:.2f})" for one in found.slots.slots[i])) for i in last]


def _said(shares: Sequence[Share], names: Mapping[int, str]) -> str:
    return ", ".join(f"{names[one.number]} ({one.mean:.2f})" for one in shares)
