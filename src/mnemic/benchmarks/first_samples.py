"""Samples of a task as ids to read and an answer, for looking inside a model (`mnemic.analysis`)."""

from typing import Any

from ..core.errors import UnsupportedError
from ..training.data import IGNORED
from .catalog import open_cell
from .text_cell import TextCell
from .token_cell import TokenCell
from .trained import Trained
from .word_cell import WordCell

LAST = 8
"""Tokens at the end of a text that stand for its answer."""


def first_samples(
    trained: Trained, task: str, length: str, tokens: int = 0, *, seed: int = 1, data: str | None = None
) -> list[tuple[list[int], list[int]]]:
    """Ids of the prompt and of the answer of a task's first sample and of others, until they have so many tokens; of
    several questions of a sample the first.

    Raises:
        UnknownNameError, ConfigError, DataError, InputError: as `open_cell`. UnsupportedError: a formal language.
    """
    options = trained.sizes.get(task, {})
    cell: Any = open_cell(
        task, length, seed, tokenizer=trained.tokenizer, segment=trained.unit, options=options, data=data
    )
    found: list[tuple[list[int], list[int]]] = []
    for sample in cell.samples():
        found.append(_split(cell, sample, trained.tokenizer))
        if sum(len(prompt) + len(answer) for prompt, answer in found) >= tokens:
            break
    return found


def _split(cell: Any, sample: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    if isinstance(cell, WordCell):
        answer = tokenizer(sample.targets[0], add_special_tokens=False)["input_ids"]
        return tokenizer(cell.asked.prompt(sample))["input_ids"], answer
    if isinstance(cell, TextCell):
        return list(sample[:-LAST]), list(sample[-LAST:])
    if not isinstance(cell, TokenCell):
        raise UnsupportedError(f"{cell.task} has outputs for every input, not an answer; give a text or another task.")
    ids, labels = sample["input_ids"], sample["labels"]
    if hasattr(cell.sized, "questions"):
        columns = cell.sized.questions(sample)[0].columns
    else:
        columns = (next(i for i, label in enumerate(labels) if label != IGNORED),)
    return ids[: columns[0]], [ids[column] for column in columns]
