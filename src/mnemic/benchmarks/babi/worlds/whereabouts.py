"""qa9 and qa10: where people are, are not, or may be; yes, no and maybe.

Every fact is about one actor, drawn uniformly, who may be at a place that no fact told. MOVE and "is in" name a
new place; "either" means a new place and names a wrong one beside it; a negative fact names the place that was told
last, or the hidden one, and the actor is elsewhere from then on.
"""

import random
from collections.abc import Iterator

from ..sample import FACTS_PER_QUESTION, QUESTIONS_PER_STORY, Asked, pick, pick_recent, pick_weighted
from ..words import ACTORS, MOVE_VERBS, PLACES, TOWN_PLACES, TOWNSPEOPLE

_KINDS = {
    "qa9": {"move": 0.495, "is": 0.24, "no longer": 0.135, "not": 0.13},
    "qa10": {"move": 0.5, "is": 0.26, "either": 0.24},
}
_YES = {"qa9": 0.5, "qa10": 0.53}  # share of the questions about a told place
_EITHER = {"first": 0.36, "second": 0.22, "other": 0.42}


def qa9(rng: random.Random) -> Iterator[Asked]:
    """Simple negation."""
    return _tell("qa9", ACTORS, PLACES, rng)


def qa10(rng: random.Random) -> Iterator[Asked]:
    """Indefinite knowledge."""
    return _tell("qa10", TOWNSPEOPLE, TOWN_PLACES, rng)


def _tell(task: str, actors: tuple[str, ...], places: tuple[str, ...], rng: random.Random) -> Iterator[Asked]:
    at = {actor: pick(rng, places) for actor in actors}
    told: dict[str, tuple[str, tuple[str, ...]]] = {}  # kind and places of the last fact about an actor
    said: dict[str, int] = {}
    facts: list[str] = []
    while len(facts) < FACTS_PER_QUESTION * QUESTIONS_PER_STORY:
        for _ in range(FACTS_PER_QUESTION):
            actor = pick(rng, actors)
            kind = pick_weighted(rng, _KINDS[task])
            here, at[actor] = at[actor], pick(rng, [place for place in places if place != at[actor]])
            sentence, named = _fact(rng, kind, here, at[actor], places)
            said[actor], told[actor] = len(facts), (kind, named)
            facts.append(f"{actor} {sentence}.")
        who = pick_recent(rng, said, len(facts))
        assert who is not None  # the last fact is never out of the window
        asked, answer = _ask(rng, task, *told[who], places)
        yield tuple(facts), f"Is {who} in the {asked}? ", answer, (said[who],)


def _fact(
    rng: random.Random, kind: str, here: str, there: str, places: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:  # fmt: skip
    """The sentence without its actor, who goes from `here` to `there`; and the places it names."""
    if kind == "move":
        return f"{pick(rng, MOVE_VERBS)} to the {there}", (there,)
    if kind == "is":
        return f"is in the {there}", (there,)
    if kind == "either":
        pair = [there, pick(rng, [place for place in places if place != there])]
        first, second = pair if rng.random() < 0.5 else pair[::-1]
        return f"is either in the {first} or the {second}", (first, second)
    return f"is {kind} in the {here}", (here,)


def _ask(
    rng: random.Random, task: str, kind: str, named: tuple[str, ...], places: tuple[str, ...]
) -> tuple[str, str]:  # fmt: skip
    """The place that is asked about, and the answer."""
    others = [place for place in places if place not in named]
    if kind == "either":
        which = pick_weighted(rng, _EITHER)
        if which == "other":
            return pick(rng, others), "no"
        return named[0 if which == "first" else 1], "maybe"
    if kind in ("no longer", "not"):
        return named[0], "no"
    return (named[0], "yes") if rng.random() < _YES[task] else (pick(rng, others), "no")
