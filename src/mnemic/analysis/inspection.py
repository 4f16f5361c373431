"""Inspection: all reports that apply to a model, over a text with an answer at its end and others, as plain data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.errors import InputError
from ..hosts import Stream, base_model
from .capacity import CapacityPoint
from .captures import Look, look, stream_of
from .explanations import LEAST_SPANS, Explainer, SlotExplanation, explain
from .figures import telling
from .importance import FACTOR, Importance, suppressed, zeroed
from .maps import ReadMaps, read_maps
from .reports import REPORTS, lacking, require
from .slots import SlotReport, joined_reads, slot_report

UPDATES, MOST_EXPLAINED = 4, 16
_WINDOW, _SPAN = 24, 16


@dataclass(frozen=True)
class Inspection:
    """What was found of a model.

    ids: of the first text, the answer last. texts: of all token ids. answer: how many tokens it has. block: the one
    whose reads differ most between tokens, of which slots, maps and explanations are. looks: at each text; slots and
    explanations are over all of them. made: reports. missing: those that were not made -> why.
    """

    ids: tuple[int, ...]
    texts: Mapping[int, str]
    answer: int
    block: int | None
    looks: tuple[Look, ...]
    slots: SlotReport | None = None
    maps: ReadMaps | None = None
    importance: Mapping[str, Importance] = field(default_factory=dict)
    explanations: tuple[SlotExplanation, ...] = ()
    capacity: tuple[CapacityPoint, ...] = ()
    made: frozenset[str] = frozenset()
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def look(self) -> Look:
        """At the first text."""
        return self.looks[0]

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(len(one.ids) for one in self.looks)


def inspect(
    model: Any, prompt: Sequence[int], answer: Sequence[int], text: Callable[[int], str] = str, *,
    more: Sequence[Sequence[int]] = (), reports: Sequence[str] | None = None, capacity: Sequence[CapacityPoint] = (),
    explainer: Explainer | None = None,
) -> Inspection:  # fmt: skip
    """Makes the reports that apply to the model's memory.

    Args:
        model: an attached model. prompt: ids read first. answer: ids that come behind; importance is of their loss.
        text: of a token id. more: ids of other texts, for the reports over many tokens. reports: some of `REPORTS`;
            None for all that apply. capacity: points of a curve (`capacity_curve`). explainer: see `explain`.

    Raises:
        UnsupportedError: a report was asked for that does not apply; the message names those that do.
        UnknownNameError: no such report. InputError: an empty prompt or answer.
    """
    base, ids = base_model(model), [*prompt, *answer]
    if not len(prompt) or not len(answer):
        raise InputError(
            f"An inspection takes a prompt and an answer of at least one token; got {len(prompt)} and {len(answer)}."
        )
    for name in reports or ():
        require(base.memory, name)
    missing = lacking(base.memory)
    wanted = {n for n in (REPORTS if reports is None else reports) if n not in missing}
    looks = tuple(look(base, one) for one in (ids, *more))
    first, every = looks[0], looks[0].every
    if not first.commits:
        missing |= {n: f"no commit in {len(ids)} tokens (every {every})" for n in ("gates", "rank") if n in wanted}
    elif "gates" in wanted and not any(first.diagnostics):
        missing["gates"] = "the memory's diagnostics are empty"
    block = max(first.reads, key=lambda i: _differences(looks, i)) if first.reads else None
    texts = {i: text(i) for i in {i for one in looks for i in one.ids.tolist()}}
    if "capacity" in wanted and not capacity:
        missing["capacity"] = "no facts to ask for: the model was trained on no task that tells any"
    cut = max(0, (len(prompt) - _WINDOW) // every * every)
    explained: tuple[SlotExplanation, ...] = ()
    if "explanations" in wanted and block is not None:
        tokens = [texts[i] for one in looks for i in one.ids.tolist()]
        width = min(_SPAN, len(tokens) // (2 * LEAST_SPANS))
        if width < 2:
            missing["explanations"] = f"{len(tokens)} tokens are too few for held-out spans"
        else:
            explained = _explanations(joined_reads(looks, block), tokens, width, explainer)
    return Inspection(
        ids=tuple(ids),
        texts=texts,
        answer=len(answer),
        block=block,
        looks=looks,
        slots=slot_report(looks, block) if "slots" in wanted and block is not None else None,
        maps=read_maps(_fed(base, prompt[:cut]), prompt[cut:], updates=UPDATES) if "read_maps" in wanted else None,
        importance=_importance(base, prompt, answer, every, None if block is None else first.banks[block], wanted),
        explanations=explained,
        capacity=tuple(capacity) if "capacity" in wanted else (),
        made=frozenset(wanted - set(missing)),
        missing={n: reason for n, reason in missing.items() if reports is None or n in reports},
    )


def _importance(
    base: Any, prompt: Sequence[int], answer: Sequence[int], every: int, bank: str | None, wanted: set[str]
) -> dict[str, Importance]:
    """Slots are taken away behind the last write, so that what is measured is the answer's use of them."""
    found: dict[str, Importance] = {}
    if not wanted & {"importance", "zeroing"}:
        return found
    last = (len(prompt) - 1) // every * every
    stream, asked = _fed(base, prompt[:last]), prompt[last:]
    if "importance" in wanted:
        found[f"read odds x {FACTOR}"] = suppressed(stream, asked, answer, bank=bank)
    if "zeroing" in wanted:
        found["content zeroed"] = zeroed(stream, asked, answer, bank=bank)
    return found


def _fed(base: Any, ids: Sequence[int]) -> Stream:
    stream = stream_of(base)
    return stream.feed(list(ids)) if len(ids) else stream


def _differences(looks: Sequence[Look], block: int) -> float:
    return float(joined_reads(looks, block).std(0, correction=0).sum())


def _explanations(
    reads: Tensor, tokens: Sequence[str], width: int, explainer: Explainer | None
) -> tuple[SlotExplanation, ...]:
    """Of the slots whose reads differ most between tokens, the best explained first."""
    made = [explain(reads[:, n], tokens, n, explainer, width=width) for n in telling(reads, MOST_EXPLAINED)]
    return tuple(sorted(made, key=lambda one: 2.0 if one.score is None else -one.score))
