"""Reading a sentence, or saying that it is none of the task's language."""

import re

from ....core.errors import InputError


def matched(pattern: re.Pattern[str], sentence: str, task: str, kind: str = "a fact") -> re.Match[str]:
    match = pattern.fullmatch(sentence)
    if match is None:
        raise InputError(f"{sentence!r} is not {kind} of {task}; expected {pattern.pattern!r}.")
    return match


def unanswered(question: str) -> InputError:
    return InputError(f"The facts do not answer {question!r}.")
