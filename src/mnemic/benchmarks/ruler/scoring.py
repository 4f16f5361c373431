"""Scorers of RULER: string matches of the references in what the model said.

Official: substrings without regard to case, so "123" counts inside "41234". Fixed: the reference as a whole word, with
no letter, digit, "_" or "-" beside it. The mean over references counts, for questions about documents the best.
"""

import re

from ..task import Record

_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


def cleaned(said: str) -> str:
    """What the official scorer reads: control characters are line breaks, and none stand around the text."""
    return _UNPRINTABLE.sub("\n", said.strip()).strip()


def _inside(reference: str, said: str) -> bool:
    return reference.lower() in said.lower()


def _as_word(reference: str, said: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(reference.lower())}(?![\w-])", said.lower()) is not None


def match_all(said: str, record: Record) -> float:
    """Official rule of all tasks but qa: the share of references found."""
    said = cleaned(said)
    return sum(_inside(target, said) for target in record.targets) / len(record.targets)


def match_all_words(said: str, record: Record) -> float:
    """`match_all` for whole words."""
    said = cleaned(said)
    return sum(_as_word(target, said) for target in record.targets) / len(record.targets)


def match_part(said: str, record: Record) -> float:
    """Official rule of qa: is any reference found?"""
    said = cleaned(said)
    return float(any(_inside(target, said) for target in record.targets))


def match_part_words(said: str, record: Record) -> float:
    """`match_part` for whole words."""
    said = cleaned(said)
    return float(any(_as_word(target, said) for target in record.targets))
