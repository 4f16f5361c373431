"""qa1 to qa3: people move and carry; where somebody or something is or was.

Mary, John, Daniel and Sandra, six places, three objects. People move to a place where they are not; they get an object
that lies free where they are; they drop what they hold. Everybody and everything has a place from the start that is
never told.

Choices where the rules leave room, fitted to the released files:

- The next fact is a MOVE with probability 0.6; otherwise one of the possible GETs and DROPs, all equally likely, or
  again a MOVE if there is none. This yields the released shares (qa2: MOVE .64, GET .20, DROP .16).
- A held object is asked about only if it was carried somewhere since the last GET, and qa3 asks only about places of
  that last carry: in the release the supporting moves of qa3 all follow the last GET.
- A question considers only the object handled last (qa2 half of the time, qa3 mostly) or all answerable ones. Measured
  means of facts before a question: qa2 14 (release 15), qa3 about 50 (51); about the object handled last: .75 (.76)
  and .7 (.72); about a dropped one: .64 (.68) and .6 (.79, not reached).
- As in the release, the nearest fact that a question needs is one of the last five; how far back it is has the weights
  of `WINDOW` in qa1.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from ..sample import FACTS_PER_QUESTION, QUESTIONS_PER_STORY, WINDOW, Asked, World, pick, pick_recent
from ..words import ACTORS, DROP_VERBS, GET_VERBS, MOVE_VERBS, OBJECTS, PLACES

_MOVE_SHARE = 0.6
_LAST_HANDLED_SHARE = {"qa2": 0.5, "qa3": 0.8}  # how often only the object handled last is considered
_LAST_PLACE_SHARE = 0.7  # qa3: how often the final place is considered; otherwise all places of the carry alike
_GET_THERE = {"qa2": 1.0, "qa3": 0.2}  # share of GETs that end in "there"
_DROP_THERE = 0.2


@dataclass(slots=True)
class _Thing:
    """An object of the world: where it really is, and what the told facts say about it."""

    place: str
    holder: str | None = None
    handled: int = -1  # fact of the last GET or DROP
    told: tuple[str, int] | None = None  # known place and the MOVE that told it, once GET or DROP made it known
    carry: list[tuple[str, int]] = field(default_factory=list)  # MOVEs of the holder since the last GET


def _story(task: str, rng: random.Random) -> Iterator[Asked]:
    """Facts, question, answer and supporting facts of the questions of one story."""
    place = {actor: pick(rng, PLACES) for actor in ACTORS}
    told: dict[str, tuple[str, int]] = {}  # last told place of an actor and the index of that fact
    things = {name: _Thing(pick(rng, PLACES)) for name in OBJECTS}
    facts: list[str] = []
    questions = 0
    while questions < QUESTIONS_PER_STORY:
        for _ in range(FACTS_PER_QUESTION):
            facts.append(_act(task, rng, place, told, things, len(facts)))
        asked = _ask_actor(rng, told, len(facts)) if task == "qa1" else _ask_object(task, rng, things, len(facts))
        if asked is not None:
            questions += 1
            yield (tuple(facts), *asked)


def _act(
    task: str, rng: random.Random, place: dict[str, str], told: dict[str, tuple[str, int]], things: dict[str, _Thing],
    now: int,
) -> str:  # fmt: skip
    """Changes the world by one action and returns the sentence that tells it."""
    options = []
    if task != "qa1" and rng.random() >= _MOVE_SHARE:
        options = [(thing.holder, "drop", name) for name, thing in things.items() if thing.holder is not None]
        options += [
            (actor, "get", name)
            for name, thing in things.items()
            for actor in ACTORS
            if thing.holder is None and thing.place == place[actor]
        ]
    if not options:
        actor = pick(rng, ACTORS)
        place[actor] = pick(rng, [other for other in PLACES if other != place[actor]])
        told[actor] = (place[actor], now)
        for thing in things.values():
            if thing.holder == actor:
                thing.place = place[actor]
                thing.carry.append(told[actor])
        return f"{actor} {pick(rng, MOVE_VERBS)} to the {place[actor]}."
    actor, kind, name = pick(rng, options)
    thing = things[name]
    thing.handled = now
    thing.told = told.get(actor)
    if kind == "get":
        thing.holder, thing.carry = actor, []
        there = " there" if rng.random() < _GET_THERE[task] else ""
        return f"{actor} {pick(rng, GET_VERBS)} the {name}{there}."
    thing.holder = None
    there = " there" if rng.random() < _DROP_THERE else ""
    return f"{actor} {pick(rng, DROP_VERBS)} the {name}{there}."


def _ask_actor(
    rng: random.Random, told: dict[str, tuple[str, int]], now: int
) -> tuple[str, str, tuple[int, ...]] | None:  # fmt: skip
    actor = pick_recent(rng, {name: told[name][1] for name in sorted(told)}, now)
    if actor is None:
        return None
    return f"Where is {actor}? ", told[actor][0], (told[actor][1],)


def _ask_object(
    task: str, rng: random.Random, things: dict[str, _Thing], now: int
) -> tuple[str, str, tuple[int, ...]] | None:  # fmt: skip
    """A question about one object, or None if what was considered cannot be answered from the told facts, or only from
    those that are too far back."""
    known = {name: where for name in OBJECTS if (where := _known(task, things[name])) is not None}
    answerable = list(known)
    if rng.random() < _LAST_HANDLED_SHARE[task]:
        last = max(things, key=lambda key: things[key].handled)
        answerable = [name for name in answerable if name == last]
    if not answerable:
        return None
    name = pick(rng, answerable)
    thing = things[name]
    if task == "qa2":
        where, line = known[name]
        return _near((f"Where is the {name}? ", where, (thing.handled, line)), now)
    asked = thing.carry[-1][0]
    if rng.random() >= _LAST_PLACE_SHARE:
        asked = pick(rng, thing.carry[1:])[0]
    at = max(i for i, (where, _) in enumerate(thing.carry) if where == asked)
    answer, before = thing.carry[at - 1]
    question = f"Where was the {name} before the {asked}? "
    return _near((question, answer, (thing.handled, thing.carry[at][1], before)), now)


def _near(asked: tuple[str, str, tuple[int, ...]], now: int) -> tuple[str, str, tuple[int, ...]] | None:
    """The question, unless even the last fact that it needs is out of the window."""
    return asked if now - max(asked[2]) <= len(WINDOW) else None


def _known(task: str, thing: _Thing) -> tuple[str, int] | None:
    """Place and line that a question about the object can use: the told place (qa2), the end of a path (qa3)."""
    if task == "qa2" and thing.holder is None:
        return thing.told
    return thing.carry[-1] if len(thing.carry) >= (1 if task == "qa2" else 2) else None


WORLDS: dict[str, World] = {task: partial(_story, task) for task in ("qa1", "qa2", "qa3")}
