"""Oracle of qa15, qa16 and qa20: what follows from a species or a state."""

import re
from collections.abc import Sequence

from ..words import COLOURS, GET_VERBS, MOVE_VERBS, NEEDS, PLURALS, SPECIES
from .reading import matched, unanswered

_PLURAL = "|".join(PLURALS.values())
_FEAR = re.compile(
    rf"(?P<who>{_PLURAL}|{_PLURAL.title()}) are afraid of (?P<whom>{_PLURAL})\.|(?P<name>\w+) is a (?P<kind>\w+)\."
)
_COLOUR = re.compile(rf"(?P<name>\w+) is (?:a (?P<kind>{'|'.join(SPECIES)})|(?P<colour>{'|'.join(COLOURS)}))\.")
_DEED = re.compile(
    rf"(?P<who>\w+) (?:is (?P<state>{'|'.join(NEEDS)})|(?:{'|'.join(MOVE_VERBS)}) to the \w+"
    rf"|(?:{'|'.join(GET_VERBS)}) the \w+ there)\."
)
_MOTIVE = re.compile(r"Where will (\w+) go\?|Why did (\w+) (?:go to|get) the (\w+)\?")


def fear(task: str, facts: Sequence[str], question: str) -> str:
    """qa15: species of the name, then what that species is afraid of."""
    asked = matched(re.compile(r"What is (\w+) afraid of\?"), question.strip(), task, "a question")
    one = {plural: species for species, plural in PLURALS.items()}
    fears, kinds = {}, {}
    for fact in facts:
        match = matched(_FEAR, fact, task)
        if match["who"]:
            fears[one[match["who"].lower()]] = one[match["whom"]]
        else:
            kinds[match["name"].lower()] = match["kind"]
    if kinds.get(asked[1]) not in fears:
        raise unanswered(question)
    return fears[kinds[asked[1]]]


def colour(task: str, facts: Sequence[str], question: str) -> str:
    """qa16: of those of the same species and told colour, the one that was introduced last."""
    asked = matched(re.compile(r"What color is (\w+)\?"), question.strip(), task, "a question")
    kinds: dict[str, str] = {}
    colours: dict[str, str] = {}
    for fact in facts:
        match = matched(_COLOUR, fact, task)
        if match["kind"]:
            kinds[match["name"]] = match["kind"]
        else:
            colours[match["name"]] = match["colour"]
    for name, kind in reversed(kinds.items()):
        if name in colours and kind == kinds.get(asked[1]):
            return colours[name]
    raise unanswered(question)


def motive(task: str, facts: Sequence[str], question: str) -> str:
    """qa20: the state that was told, or where it sends."""
    asked = matched(_MOTIVE, question.strip(), task, "a question")
    states = {}
    for fact in facts:
        match = matched(_DEED, fact, task)
        if match["state"]:
            states[match["who"].lower()] = match["state"]
    state = states.get(asked[1] or asked[2])
    if state is None or (asked[3] and asked[3] not in NEEDS[state]):
        raise unanswered(question)
    return NEEDS[state][0] if asked[1] else state
