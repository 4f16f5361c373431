"""qa5 to qa8: people move, get, drop and give; who gave what, who is where, who holds how many or which objects.

Everybody and everything has a place that is not told at first, as in qa1 to qa3; GIVE needs giver and receiver at one
place. What happens next is drawn among all that can happen, with a weight of its kind; the weights are fitted to the
shares of the release. A question concerns one of the last five facts; in qa5 always the last GIVE, so that no question
has two answers (the release asks about an older one in 1.6% of its questions).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from ..sample import (
    FACTS_PER_QUESTION,
    QUESTIONS_PER_STORY,
    WINDOW,
    Asked,
    World,
    pick,
    pick_recent,
    pick_weighted,
)
from ..words import ACTORS, DROP_VERBS, GET_VERBS, GIVE_VERBS, GIVERS, MOVE_VERBS, NUMBERS, OBJECTS, PLACES

_GET, _DROP, _GIVE = 0.24, 0.28, 1.0  # weight of each possible action; all moves together have 1
_DROP_THERE = 0.2
_EMPTY_HANDS = 0.7  # qa7: how often a holder is passed over once, so that "none" has its share
_GIVE_FORMS = {
    "What did {giver} give to {receiver}? ": 0.35, "Who gave the {thing}? ": 0.17,
    "Who did {giver} give the {thing} to? ": 0.17, "Who received the {thing}? ": 0.16,
    "Who gave the {thing} to {receiver}? ": 0.15,
}  # fmt: skip


@dataclass(slots=True)
class _World:
    """Hidden truth, and which facts told what."""

    place: dict[str, str]
    lying: dict[str, str]  # free object -> place
    holder: dict[str, str] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)  # actor -> last MOVE
    handled: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # actor -> (fact, object), oldest first
    given: tuple[int, str, str, str] | None = None  # fact, giver, object, receiver of the last GIVE
    facts: list[str] = field(default_factory=list)

    def options(self, giving: bool) -> dict[tuple[str, str, str], float]:
        """(kind, actor, object or receiver) -> weight."""
        found = {("move", "", ""): 1.0}
        for thing, where in self.lying.items():
            found |= {("get", actor, thing): _GET for actor in self.place if self.place[actor] == where}
        for thing, actor in self.holder.items():
            found["drop", actor, thing] = _DROP
            for other in self.place:
                if giving and other != actor and self.place[other] == self.place[actor]:
                    found[f"give {thing}", actor, other] = _GIVE
        return found

    def act(self, rng: random.Random, giving: bool) -> None:
        kind, actor, thing = pick_weighted(rng, self.options(giving))
        now = len(self.facts)
        if kind == "move":
            actor = pick(rng, list(self.place))
            self.place[actor] = pick(rng, [place for place in PLACES if place != self.place[actor]])
            self.moved[actor] = now
            self.facts.append(f"{actor} {pick(rng, MOVE_VERBS)} to the {self.place[actor]}.")
        elif kind == "get":
            del self.lying[thing]
            self.holder[thing] = actor
            self.handled.setdefault(actor, []).append((now, thing))
            self.facts.append(f"{actor} {pick(rng, GET_VERBS)} the {thing} there.")
        elif kind == "drop":
            del self.holder[thing]
            self.lying[thing] = self.place[actor]
            self.handled[actor].append((now, thing))
            there = " there" if rng.random() < _DROP_THERE else ""
            self.facts.append(f"{actor} {pick(rng, DROP_VERBS)} the {thing}{there}.")
        else:
            receiver, thing = thing, kind.removeprefix("give ")
            self.holder[thing] = receiver
            self.given = (now, actor, thing, receiver)
            for one in (actor, receiver):
                self.handled.setdefault(one, []).append((now, thing))
            self.facts.append(f"{actor} {pick(rng, GIVE_VERBS)} the {thing} to {receiver}.")


_Question = Callable[[random.Random, _World], tuple[str, str, tuple[int, ...]] | None]


def _tell(ask: _Question, actors: tuple[str, ...], giving: bool, rng: random.Random) -> Iterator[Asked]:
    world = _World({actor: pick(rng, PLACES) for actor in actors}, {thing: pick(rng, PLACES) for thing in OBJECTS})
    questions = 0
    while questions < QUESTIONS_PER_STORY:
        for _ in range(FACTS_PER_QUESTION):
            world.act(rng, giving)
        asked = ask(rng, world)
        if asked is not None:
            questions += 1
            yield (tuple(world.facts), *asked)


def _who_gave(rng: random.Random, world: _World) -> tuple[str, str, tuple[int, ...]] | None:
    if world.given is None or len(world.facts) - world.given[0] > len(WINDOW):
        return None
    fact, giver, thing, receiver = world.given
    form = pick_weighted(rng, _GIVE_FORMS)
    answer = thing if form.startswith("What") else giver if form.startswith("Who gave") else receiver
    return form.format(giver=giver, thing=thing, receiver=receiver), answer, (fact,)


def _is_in(rng: random.Random, world: _World) -> tuple[str, str, tuple[int, ...]] | None:
    actor = pick_recent(rng, world.moved, len(world.facts))
    if actor is None:
        return None
    where = world.place[actor]
    right = rng.random() < 0.5
    asked = where if right else pick(rng, [place for place in PLACES if place != where])
    return f"Is {actor} in the {asked}? ", "yes" if right else "no", (world.moved[actor],)


def _holding(rng: random.Random, world: _World) -> tuple[str, list[str]] | None:
    """Somebody who handled an object lately, and what they hold, in the order in which they first had it."""
    lately = {actor: events[-1][0] for actor, events in world.handled.items()}
    actor = pick_recent(rng, lately, len(world.facts))
    if actor is None:
        return None
    return actor, [thing for thing in _in_order(world, actor) if world.holder.get(thing) == actor]


def _in_order(world: _World, actor: str) -> list[str]:
    return list(dict.fromkeys(thing for _, thing in world.handled[actor]))


def _how_many(rng: random.Random, world: _World) -> tuple[str, str, tuple[int, ...]] | None:
    found = _holding(rng, world)
    if found is not None and found[1] and rng.random() < _EMPTY_HANDS:
        found = _holding(rng, world)
    if found is None:
        return None
    actor, held = found
    supporting = tuple(fact for fact, _ in world.handled[actor])
    return f"How many objects is {actor} carrying? ", NUMBERS[len(held)], supporting


def _which(rng: random.Random, world: _World) -> tuple[str, str, tuple[int, ...]] | None:
    found = _holding(rng, world)
    if found is None:
        return None
    actor, held = found
    # The release lists the facts object by object.
    supporting = tuple(fact for thing in _in_order(world, actor) for fact, of in world.handled[actor] if of == thing)
    return f"What is {actor} carrying? ", ",".join(held) or "nothing", supporting


WORLDS: dict[str, World] = {
    "qa5": partial(_tell, _who_gave, GIVERS, True),
    "qa6": partial(_tell, _is_in, ACTORS, False),
    "qa7": partial(_tell, _how_many, ACTORS, True),
    "qa8": partial(_tell, _which, ACTORS, False),
}
