"""What of a record a model reads: all of it, or the prompt of a baseline, chosen by a setting.

whole                  context and question, as the task puts them together
truncated:BUDGET       the end of the context, in BUDGET tokens with the question
middle-out:BUDGET      the beginning and the end of the context
bm25:BUDGET            the chunks that BM25 finds for the question
dense:BUDGET:MODEL     those that a sentence-transformers model finds; MODEL is its name or folder
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import ConfigError, InputError, UnknownNameError
from .retrieval_baselines import Bm25, Dense, Prompt, Search, retrieved, truncated
from .task import Record, Task

KINDS = ("whole", "truncated", "middle-out", "bm25", "dense")
_FORMS = "'whole', 'truncated:BUDGET', 'middle-out:BUDGET', 'bm25:BUDGET' or 'dense:BUDGET:MODEL'"


@dataclass(frozen=True)
class Prompting:
    """How records become prompts. Made by `parse_prompt`; `setting` is the text that it was made of."""

    setting: str
    kind: str
    budget: int = 0
    search: Search | None = field(default=None, compare=False, repr=False)

    def prompt(self, task: Task, record: Record, tokenizer: Any) -> Prompt | str:
        """The text of the whole prompt, or the token ids that are left of it.

        Raises:
            InputError: the question alone has more tokens than the budget.
        """
        if self.kind == "whole":
            return task.prompt(record)
        if self.search is not None:
            return retrieved(record, tokenizer, self.budget, self.search, separator=task.separator)
        keep = "end" if self.kind == "truncated" else "middle out"
        return truncated(record, tokenizer, self.budget, keep=keep, separator=task.separator)


def parse_prompt(setting: str) -> Prompting:
    """The prompting of that name.

    Raises:
        UnknownNameError: another kind. ConfigError: a budget or model that is missing, wrong or of no use.
        MissingExtraError: bm25s or sentence-transformers is not installed. InputError: the model cannot be loaded.
    """
    kind, *given = setting.split(":", 2)
    if kind not in KINDS:
        raise UnknownNameError.of("prompt", kind, KINDS)
    wanted = {"whole": 0, "dense": 2}.get(kind, 1)
    # A folder of a model may hold a colon, so only a dense one has all that follows.
    if len(given) != wanted or not all(given):
        raise ConfigError(f"prompt = {setting!r}, expected {_FORMS}, with BUDGET in tokens.")
    if kind == "whole":
        return Prompting(setting, kind)
    if not given[0].isascii() or not given[0].isdigit() or int(given[0]) < 1:
        raise ConfigError(f"prompt = {setting!r}: the budget is a number of tokens of at least 1, not {given[0]!r}.")
    search: dict[str, Callable[[], Search]] = {"bm25": Bm25, "dense": lambda: _dense(given[1])}
    return Prompting(setting, kind, int(given[0]), search[kind]() if kind in search else None)


def _dense(model: str) -> Search:
    try:
        return Dense(model)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The encoder {model!r} cannot be loaded ({error}); give the folder of a sentence-transformers model, or "
            "one that was downloaded before."
        ) from error
