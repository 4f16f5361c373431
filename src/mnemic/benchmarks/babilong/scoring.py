"""The published scoring rule of BABILong, and the same with whole words."""

import re
from collections.abc import Callable

from ...core.errors import UnknownNameError
from .. import babi

_PLACES = frozenset(babi.PLACES)
_YES_NO = frozenset({"no", "yes"})
LABELS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _PLACES),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), _YES_NO),
    "qa5": frozenset({"Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"}),
    "qa7": frozenset({"none", "one", "three", "two"}),
    "qa8": frozenset({"apple", "football", "milk", "nothing"}),
    "qa10": _YES_NO | {"maybe"},
    "qa14": frozenset({"bedroom", "cinema", "kitchen", "office", "park", "school"}),
    "qa15": frozenset({"cat", "mouse", "sheep", "wolf"}),
    "qa16": frozenset({"gray", "green", "white", "yellow"}),
    "qa19": frozenset({"e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"}),
    "qa20": frozenset({"bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"}),
}
"""Possible answers of each task, as the scorer looks for them."""


def compare_answers(target: str, output: str, question: str, task: str) -> bool:
    """The official rule, bit for bit: the target is the only label in the first sentence that the question lacks.

    Labels are looked for as substrings. So in qa7 the right answer "none" also contains "one" and counts as wrong;
    `compare_answers_fixed` repairs that. Tables must say which rule they use.

    Raises:
        UnknownNameError: unknown task.
    """
    return _compare(target, output, question, task, lambda label, text: label in text)


def compare_answers_fixed(target: str, output: str, question: str, task: str) -> bool:
    """As `compare_answers`, but labels are looked for as whole words."""
    return _compare(target, output, question, task, _has_word)


def _has_word(label: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text) is not None


def _compare(target: str, output: str, question: str, task: str, has: Callable[[str, str], bool]) -> bool:
    if task not in LABELS:
        raise UnknownNameError.of("BABILong task", task, LABELS)
    labels = {label.lower() for label in LABELS[task]}
    target, question, output = target.lower(), question.lower(), output.lower()
    for end in (".", "<context>", "<example>"):
        output = output.split(end)[0]
    found = {label for label in labels if has(label, output)} - {label for label in labels if has(label, question)}
    wanted = set(target.split(",")) if "," in target and len(target) > 3 else {target}
    return found == wanted
