"""Tasks in words: what a benchmark asks, and how its answers are scored."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """One question about one context.

    targets: answers that count as right. metadata: what the task knows besides (depth of the needle, length, ids of
    the supporting facts, ...), as JSON.
    """

    context: str
    question: str
    targets: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


Scorer = Callable[[str, Record], float]
"""(what the model said, the record) -> a score from 0 to 1."""


@dataclass(frozen=True)
class Task:
    """A benchmark task.

    records: called with the task's sizes by keyword and `seed`, gives records without end or of a released file;
    equal arguments give equal records. official: the published scoring rule, its bugs included. fixed: the rule
    without them; the same function where there are none. max_new_tokens: what the published protocol lets a model say.
    separator: between context and question.
    """

    name: str
    source: str
    records: Callable[..., Iterator[Record]]
    official: Scorer
    fixed: Scorer
    max_new_tokens: int
    separator: str = "\n"

    def prompt(self, record: Record) -> str:
        """What a model reads that reads everything."""
        return f"{record.context}{self.separator}{record.question}"
