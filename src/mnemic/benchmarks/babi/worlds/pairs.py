"""qa11 to qa13: two facts then a question where somebody is; with pronouns (qa11), in twos (qa12), both (qa13)."""

import random
from collections.abc import Iterator
from functools import partial

from ..sample import FACTS_PER_QUESTION, QUESTIONS_PER_STORY, Asked, World, pick, pick_recent
from ..words import ACTORS, AFTERWARDS, MEN, MOVE_VERBS, PLACES

# Weight of a fact by how far back it is, as counted on the release.
_WINDOWS = {"qa11": (1.0, 0.0, 0.92, 0.0, 0.36), "qa12": (1.0, 0.74, 0.26), "qa13": (1.0, 0.0, 0.22)}


def _tell(task: str, rng: random.Random) -> Iterator[Asked]:
    at = {actor: pick(rng, PLACES) for actor in ACTORS}
    said: dict[str, int] = {}
    facts: list[str] = []
    who: tuple[str, ...] = ()
    while len(facts) < FACTS_PER_QUESTION * QUESTIONS_PER_STORY:
        for half in range(FACTS_PER_QUESTION):
            if half == 0 or task == "qa12":
                who = _group(rng, task)
                subject = " and ".join(who)
            else:
                pronoun = "they" if len(who) == 2 else "he" if set(who) <= set(MEN) else "she"
                subject = f"{pick(rng, AFTERWARDS)} {pronoun}"
            place = pick(rng, [place for place in PLACES if place not in {at[actor] for actor in who}])
            for actor in who:
                at[actor], said[actor] = place, len(facts)
            facts.append(f"{subject} {pick(rng, MOVE_VERBS)} to the {place}.")
        asked = pick_recent(rng, said, len(facts), _WINDOWS[task])
        assert asked is not None  # the last fact is never out of the window
        last = said[asked]
        yield tuple(facts), f"Where is {asked}? ", at[asked], (last,) if task == "qa12" else (last - 1, last)


def _group(rng: random.Random, task: str) -> tuple[str, ...]:
    """One actor, or two in random order."""
    first = pick(rng, ACTORS)
    if task == "qa11":
        return (first,)
    return first, pick(rng, [actor for actor in ACTORS if actor != first])


WORLDS: dict[str, World] = {task: partial(_tell, task) for task in ("qa11", "qa12", "qa13")}
