"""qa20: why people go where they go. Each has a state, goes where it sends, and fetches what is still there."""

import random
from collections.abc import Iterator

from ..sample import Asked, pick
from ..words import GET_VERBS, MOVE_VERBS, NEEDS, NEEDY


def qa20(rng: random.Random) -> Iterator[Asked]:
    """Agents' motivations: a question after each fact, until nobody has anything left to do."""
    state = {actor: pick(rng, list(NEEDS)) for actor in NEEDY}
    done: dict[str, int] = dict.fromkeys(NEEDY, 0)
    taken: set[str] = set()
    said: dict[str, int] = {}
    facts: list[str] = []
    while True:
        able = [a for a in NEEDY if done[a] < 2 or (done[a] == 2 and NEEDS[state[a]][1] not in taken)]
        if not able:
            return
        actor = pick(rng, able)
        place, thing = NEEDS[state[actor]]
        name = actor.lower()
        if done[actor] == 0:
            said[actor] = len(facts)
            facts.append(f"{actor} is {state[actor]}.")
            question, answer = f"Where will {name} go?", place
        elif done[actor] == 1:
            facts.append(f"{actor} {pick(rng, MOVE_VERBS)} to the {place}.")
            question, answer = f"Why did {name} go to the {place}?", state[actor]
        else:
            taken.add(thing)
            facts.append(f"{actor} {pick(rng, GET_VERBS)} the {thing} there.")
            question, answer = f"Why did {name} get the {thing}?", state[actor]
        done[actor] += 1
        yield tuple(facts), question, answer, (said[actor],)
