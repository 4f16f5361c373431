"""Oracle of the tasks whose people move and carry: qa1 to qa3 and qa5 to qa8."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..words import DROP_VERBS, GET_VERBS, GIVE_VERBS, MOVE_VERBS, NUMBERS
from .reading import matched, unanswered

FACT = re.compile(
    rf"(?P<actor>\w+) (?:(?P<move>{'|'.join(MOVE_VERBS)}) to the (?P<place>\w+)"
    rf"|(?:(?P<get>{'|'.join(GET_VERBS)})|(?P<drop>{'|'.join(DROP_VERBS)})) the (?P<object>\w+)(?: there)?"
    rf"|(?P<give>{'|'.join(GIVE_VERBS)}) the (?P<gift>\w+) to (?P<receiver>\w+))\."
)
_ASKED = {
    "qa1": r"Where is (\w+)\?",
    "qa2": r"Where is the (\w+)\?",
    "qa3": r"Where was the (\w+) before the (\w+)\?",
    "qa5": r"What did (?P<giver>\w+) give to (?P<receiver>\w+)\?|Who gave the (?P<g_thing>\w+)"
    r"(?: to (?P<g_receiver>\w+))?\?|Who received the (?P<r_thing>\w+)\?"
    r"|Who did (?P<d_giver>\w+) give the (?P<d_thing>\w+) to\?",
    "qa6": r"Is (\w+) in the (\w+)\?",
    "qa7": r"How many objects is (\w+) carrying\?",
    "qa8": r"What is (\w+) carrying\?",
}


@dataclass(slots=True)
class _Read:
    """What the facts say."""

    at: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    path: dict[str, list[str]] = field(default_factory=dict)  # object -> distinct consecutive places while carried
    had: dict[str, list[str]] = field(default_factory=dict)  # actor -> objects, in the order first held
    gifts: list[tuple[str, str, str]] = field(default_factory=list)  # giver, object, receiver


def read(task: str, facts: Sequence[str]) -> _Read:
    world = _Read()
    for fact in facts:
        match = matched(FACT, fact, task)
        actor, thing = match["actor"], match["object"] or match["gift"]
        if match["move"]:
            world.at[actor] = match["place"]
            touched = [o for o, who in world.holder.items() if who == actor]
        else:
            world.holder[thing] = actor
            touched = [thing]
        for o in touched:
            seen = world.path.setdefault(o, [])
            if actor in world.at and seen[-1:] != [world.at[actor]]:
                seen.append(world.at[actor])
            if o not in world.had.setdefault(actor, []):
                world.had[actor].append(o)
        if match["drop"]:
            del world.holder[thing]
        if match["give"]:
            receiver = match["receiver"]
            world.holder[thing] = receiver
            world.gifts.append((actor, thing, receiver))
            if thing not in world.had.setdefault(receiver, []):
                world.had[receiver].append(thing)
    return world


def answer(task: str, facts: Sequence[str], question: str) -> str:
    asked = matched(re.compile(_ASKED[task]), question.strip(), task, "a question")
    found = _ANSWERS[task](read(task, facts), asked)
    if found is None:
        raise unanswered(question)
    return found


def _before(world: _Read, asked: re.Match[str]) -> str | None:
    places = world.path.get(asked[1], [])
    hits = [i for i, where in enumerate(places) if where == asked[2] and i > 0]
    return places[hits[-1] - 1] if hits else None


def _gift(world: _Read, asked: re.Match[str]) -> str | None:
    giver = asked["giver"] or asked["d_giver"]
    thing = asked["g_thing"] or asked["r_thing"] or asked["d_thing"]
    receiver = asked["receiver"] or asked["g_receiver"]
    for gift in reversed(world.gifts):
        if all(want in (None, has) for want, has in zip((giver, thing, receiver), gift, strict=True)):
            return gift[1] if thing is None else gift[0] if asked["g_thing"] else gift[2]
    return None


def _whether(world: _Read, asked: re.Match[str]) -> str | None:
    return None if asked[1] not in world.at else "yes" if world.at[asked[1]] == asked[2] else "no"


def _held(world: _Read, actor: str) -> list[str] | None:
    if actor not in world.had:
        return None
    return [thing for thing in world.had[actor] if world.holder.get(thing) == actor]


def _how_many(world: _Read, asked: re.Match[str]) -> str | None:
    held = _held(world, asked[1])
    return None if held is None else NUMBERS[len(held)]


def _which(world: _Read, asked: re.Match[str]) -> str | None:
    held = _held(world, asked[1])
    return None if held is None else ",".join(held) or "nothing"


_ANSWERS: dict[str, Callable[[_Read, re.Match[str]], str | None]] = {
    "qa1": lambda world, asked: world.at.get(asked[1]),
    "qa2": lambda world, asked: next(reversed(world.path.get(asked[1], [])), None),
    "qa3": _before, "qa5": _gift, "qa6": _whether, "qa7": _how_many, "qa8": _which,
}  # fmt: skip
