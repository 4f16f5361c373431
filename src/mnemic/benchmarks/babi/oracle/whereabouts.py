"""Oracle of qa9 to qa14: where people are, are not, may be, and were."""

import re
from collections.abc import Sequence

from ..words import AFTERWARDS, MOVE_VERBS, TIMES
from .reading import matched, unanswered

_MOVE = rf"(?:{'|'.join(MOVE_VERBS)}) to the"
_STATED = re.compile(
    rf"(?P<who>\w+) (?:(?:{_MOVE}|is in the) (?P<place>\w+)|is (?:no longer|not) in the (?P<left>\w+)"
    r"|is either in the (?P<one>\w+) or the (?P<two>\w+))\."
)
_GONE = re.compile(
    rf"(?:(?P<who>\w+)(?: and (?P<other>\w+))?|(?:{'|'.join(AFTERWARDS)}) (?:he|she|they)) {_MOVE} (?P<place>\w+)\."
)
_TIME = "|".join((*TIMES, *(time.capitalize() for time in TIMES)))
_TIMED = re.compile(rf"(?:(?P<first>{_TIME}) )?(?P<who>\w+) {_MOVE} (?P<place>\w+)(?: (?P<last>{_TIME}))?\.")


def whether(task: str, facts: Sequence[str], question: str) -> str:
    """qa9, qa10: the last fact about a person decides."""
    asked = matched(re.compile(r"Is (\w+) in the (\w+)\?"), question.strip(), task, "a question")
    for fact in reversed(facts):
        stated = matched(_STATED, fact, task)
        if stated["who"] != asked[1]:
            continue
        if stated["place"]:
            return "yes" if stated["place"] == asked[2] else "no"
        if stated["one"]:
            return "maybe" if asked[2] in (stated["one"], stated["two"]) else "no"
        if stated["left"] == asked[2]:
            return "no"
        break
    raise unanswered(question)


def where(task: str, facts: Sequence[str], question: str) -> str:
    """qa11 to qa13: a pronoun means whoever the sentence before is about."""
    asked = matched(re.compile(r"Where is (\w+)\?"), question.strip(), task, "a question")
    at: dict[str, str] = {}
    people: list[str] = []
    for fact in facts:
        gone = matched(_GONE, fact, task)
        if gone["who"]:
            people = [name for name in (gone["who"], gone["other"]) if name]
        at |= dict.fromkeys(people, gone["place"])
    if asked[1] not in at:
        raise unanswered(question)
    return at[asked[1]]


def before(task: str, facts: Sequence[str], question: str) -> str:
    """qa14: the told place before the last told visit, in time."""
    asked = matched(re.compile(r"Where was (\w+) before the (\w+)\?"), question.strip(), task, "a question")
    visits: dict[int, str] = {}
    for fact in facts:
        timed = matched(_TIMED, fact, task)
        if timed["who"] == asked[1]:
            visits[TIMES.index((timed["first"] or timed["last"]).lower())] = timed["place"]
    places = [visits[time] for time in sorted(visits)]
    for i in range(len(places) - 1, 0, -1):
        if places[i] == asked[2]:
            return places[i - 1]
    raise unanswered(question)
