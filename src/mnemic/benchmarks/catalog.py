"""Every task of the package by name, opened as cells."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, UnknownNameError, UnsupportedError
from . import catalog_tokens, catalog_words, text_cell
from .babi import SPLITS
from .catalog_entry import RELEASED, Entry, Request
from .cell import Cell
from .prompts import parse_prompt

_ENTRIES = {entry.name: entry for entry in (*catalog_words.ENTRIES, *text_cell.ENTRIES, *catalog_tokens.ENTRIES)}
_ELSEWHERE = {
    "longmemeval": "A judge model scores the answers of LongMemEval, so it has no score here. Answer the questions of "
    "mnemic.benchmarks.longmemeval.longmemeval_records, write them with write_hypotheses, and run the released judge "
    "script on that file."
}


def catalog() -> list[Entry]:
    """All tasks that can be opened, tasks in words first."""
    return list(_ENTRIES.values())


def entry(name: str) -> Entry:
    """What the catalog says of a task.

    Raises:
        UnknownNameError: no such task. UnsupportedError: one that cannot be scored here.
    """
    if name in _ELSEWHERE:
        raise UnsupportedError(_ELSEWHERE[name])
    if name not in _ENTRIES:
        raise UnknownNameError.of("task", name, _ENTRIES)
    return _ENTRIES[name]


def open_cell(
    name: str,
    length: str | int,
    seed: int,
    *,
    tokenizer: Any,
    segment: int,
    options: Mapping[str, Any] | None = None,
    data: str | Path | None = None,
    split: str = "test",
    prompt: str = "whole",
) -> Cell:
    """The cell of a task at a length. One sample is drawn, so that what cannot be is told before a model is loaded.

    Args:
        name: of the task; see `catalog`.
        length: in the task's unit, or an official name such as "4k"; "released" for files that fix their samples.
        seed: of the samples.
        tokenizer: of the model, for tasks in words; None where there is none.
        segment: tokens of the model's segments, in which distances are counted and `recall`, `segment_mqar`, `remember`
            and `rewrite` lay out their rows.
        options: the other sizes of the task, as the model was trained; the size that the length sets does not count.
        data: folder with released files, or the one file; without it, the folder named by MNEMIC_DATA.
        split: of facts and backgrounds, for tasks that have splits.
        prompt: what of a record is read; see `prompts`.

    Raises:
        UnknownNameError: unknown task, length, split or prompt.
        ConfigError: options, sizes or prompts that cannot be. UnsupportedError: a task that cannot be scored here.
        DataError: files that are missing or of another format. MissingExtraError: an extra that the task needs.
        InputError: a length that cannot hold the facts, no tokenizer, or one that cannot write the answer.
    """
    chosen, length = entry(name), str(length)
    if split not in SPLITS:
        raise UnknownNameError.of("split", split, SPLITS)
    if segment < 1:
        raise ConfigError(f"segment = {segment}, expected at least 1 token.")
    prompting = parse_prompt(prompt)
    if chosen.kind != "words" and prompting.kind != "whole":
        raise ConfigError(f"prompt = {prompt!r} is for tasks in words; {name} is read whole.")
    request = Request(
        name=name, length=length, size=chosen.size(length), seed=seed, tokenizer=tokenizer, segment=segment,
        options=options or {}, data=data, split=split, prompting=prompting,
    )  # fmt: skip
    return chosen.make(request)


__all__ = ["RELEASED", "Entry", "catalog", "entry", "open_cell"]
