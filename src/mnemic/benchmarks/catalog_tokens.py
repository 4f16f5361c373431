"""Token-level tasks and formal languages of the catalog."""

import dataclasses
from functools import partial

from ..core.errors import ConfigError
from . import token_tasks
from .catalog_entry import Entry, Request
from .cell import Cell
from .chomsky import TASKS as LANGUAGES
from .recall import RecallTask
from .token_cell import FormalCell, TokenCell

# The option that the length sets.
_SIZE = {
    "mqar": "length", "compositional_mqar": "length", "induction": "length", "segment_mqar": "segments",
    "remember": "pairs", "rewrite": "pairs", "copying": "string",
}  # fmt: skip


def _tokens(request: Request) -> Cell:
    field = _SIZE[request.name]
    # The question has a segment of its own.
    size = request.size - 1 if field == "pairs" else request.size
    try:
        sized = token_tasks.token_task(request.name, {**request.options, field: size}, request.segment)
    except TypeError as error:
        raise ConfigError(f"{request.name} with {dict(request.options)}: {error}.") from error
    return _drawn(TokenCell(request.name, request.length, request.seed, sized))


def _recall(request: Request) -> Cell:
    known = {f.name for f in dataclasses.fields(RecallTask)} - {"segment_length"}
    sizes = {**request.checked(known), "segments": request.size, "segment_length": request.segment}
    return _drawn(TokenCell(request.name, request.length, request.seed, RecallTask(**sizes)))


def _formal(name: str, request: Request) -> Cell:
    steps = request.checked(("steps", "longest")).get("steps", 0)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ConfigError(f"{request.name}: steps = {steps!r}, expected a whole number of blanks for each symbol.")
    cell = FormalCell(request.name, request.length, request.seed, LANGUAGES[name], request.size, steps)
    return _drawn(cell)


def _drawn(cell: Cell) -> Cell:
    """The cell, of which a sample can be drawn."""
    next(cell.samples())
    return cell


_ENTRIES = (
    ("mqar", "tokens", ("64", "128", "256", "512"), "arXiv 2312.04927", _tokens),
    ("segment_mqar", "segments", ("2", "4", "8"), "MQAR across segments", _tokens),
    ("compositional_mqar", "tokens", ("64", "128", "256"), "MQAR of pairs of keys", _tokens),
    ("remember", "segments", ("6", "11", "21", "51"), "arXiv 2407.04841", _tokens),
    ("rewrite", "segments", ("6", "11", "21", "51"), "arXiv 2407.04841", _tokens),
    ("induction", "tokens", ("32", "64", "128", "256"), "arXiv 2212.14052", _tokens),
    ("copying", "symbols", ("8", "16", "32", "64"), "arXiv 2402.01032", _tokens),
    ("recall", "segments", ("2", "4", "8"), "toy checks of RMT and LM2", _recall),
    *(
        (f"chomsky_{name}", "symbols", ("50", "100", "200", "500"), "arXiv 2207.02098", partial(_formal, name))
        for name in LANGUAGES
    ),
)
ENTRIES = [
    Entry(name=name, kind="tokens", unit=unit, lengths=lengths, source=source, make=make)
    for name, unit, lengths, source, make in _ENTRIES
]
