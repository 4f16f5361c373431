"""qa14: who was where yesterday, this morning, this afternoon and this evening, told out of order.

Actors take their next place in time, in random turns; what is told between two questions is shuffled. So at a question
each actor's times are told without gaps.
"""

import random
from collections.abc import Iterator
from itertools import combinations

from ..sample import FACTS_PER_QUESTION, QUESTIONS_PER_STORY, Asked, pick, pick_weighted, shuffled
from ..words import MOVE_VERBS, TIMES, TOWN_PLACES, TOWNSPEOPLE

_RECENCY = (1.0, 0.7, 0.25)  # weight of an actor's last, second last, ... change of place


def qa14(rng: random.Random) -> Iterator[Asked]:
    """Time reasoning."""
    day: dict[str, list[tuple[str, int]]] = {actor: [] for actor in TOWNSPEOPLE}  # places in time, with their facts
    facts: list[str] = []
    pending: list[tuple[str, int]] = []  # actor and time, not yet told
    questions = 0
    while questions < QUESTIONS_PER_STORY:
        for _ in range(FACTS_PER_QUESTION):
            actor = pick(rng, [name for name in TOWNSPEOPLE if len(day[name]) < len(TIMES)])
            last = day[actor][-1][0] if day[actor] else None
            pending.append((actor, len(day[actor])))
            day[actor].append((pick(rng, [place for place in TOWN_PLACES if place != last]), -1))
        if all(len(places) < 2 for places in day.values()):
            continue
        told = shuffled(rng, pending)
        if any(a == b and earlier < later for (a, earlier), (b, later) in combinations(told, 2)):
            told = shuffled(rng, pending)  # the release seldom tells in order
        for actor, time in told:
            place = day[actor][time][0]
            day[actor][time] = (place, len(facts))
            move = f"{actor} {pick(rng, MOVE_VERBS)} to the {place}"
            at = TIMES[time]
            facts.append(f"{at.capitalize()} {move}." if rng.random() < 0.5 else f"{move} {at}.")
        pending = []
        questions += 1
        yield (tuple(facts), *_ask(rng, day))


def _ask(rng: random.Random, day: dict[str, list[tuple[str, int]]]) -> tuple[str, str, tuple[int, ...]]:
    """The place before the last visit of a place; earlier visits of it are not asked about."""
    actor = pick(rng, [name for name in TOWNSPEOPLE if len(day[name]) > 1])
    places = day[actor]
    times = [
        time for time in range(1, len(places)) if places[time][0] not in {place for place, _ in places[time + 1 :]}
    ]
    time = pick_weighted(rng, {time: _RECENCY[len(places) - 1 - time] for time in times})
    (before, earlier), (place, fact) = places[time - 1], places[time]
    return f"Where was {actor} before the {place}? ", before, (fact, earlier)
