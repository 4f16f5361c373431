"""BABILong as tasks in words, one each of qa1 to qa20; length "0k" is bAbI itself."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from .babilong import LABELS, compare_answers, compare_answers_fixed, open_babilong
from .task import Record, Task

MAX_NEW_TOKENS = 20


def records(task: str, *, tokenizer: Any, length: int | str = "4k", seed: int = 0, **options: Any) -> Iterator[Record]:
    """Samples of one task, in the order of `open_babilong`, whose other arguments `options` are.

    Metadata: "task", "length" and "tokens" (of the context); "facts", the token at which each begins; "support", that
    of the last one that the answer rests on; "provenance".

    Raises:
        UnknownNameError, ConfigError, DataError: as `open_babilong`.
    """
    return map(_record, open_babilong(task, length, tokenizer, seed=seed, **options))


def _record(sample: Any) -> Record:
    metadata = {
        "task": sample.task, "length": sample.length, "tokens": sample.tokens, "facts": list(sample.fact_offsets),
        "support": max(sample.fact_offsets[fact] for fact in sample.supporting), "provenance": sample.provenance,
    }  # fmt: skip
    return Record(sample.context, sample.question.strip(), (sample.target,), metadata)


def official(output: str, record: Record) -> float:
    """The published rule, which counts the right answer "none" of qa7 as wrong; see `compare_answers`."""
    return float(compare_answers(record.targets[0], output, record.question, record.metadata["task"]))


def fixed(output: str, record: Record) -> float:
    """As `official`, with whole words; see `compare_answers_fixed`."""
    return float(compare_answers_fixed(record.targets[0], output, record.question, record.metadata["task"]))


TASKS = {
    f"babilong_{task}": Task(
        f"babilong_{task}", "arXiv 2406.10149", partial(records, task), official, fixed, MAX_NEW_TOKENS, separator=" "
    )
    for task in LABELS
}
