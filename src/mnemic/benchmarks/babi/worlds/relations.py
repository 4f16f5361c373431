"""qa4, qa17 and qa19: things on a grid; what is beside what, and how to get there.

In qa4 and qa17 two facts tie two things to a third, which is the object (qa4) or subject (qa17) of a fact two times out
of three, as in the release.
"""

import random
from collections.abc import Iterator

from ..sample import Asked, pick, pick_weighted, shuffled
from ..words import OPPOSITE, PLACES, SHAPES

_Point = tuple[int, int]
_COMPASS: dict[str, _Point] = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
_ON_PAPER: dict[str, _Point] = {
    "above": (0, 1), "below": (0, -1), "to the right of": (1, 0), "to the left of": (-1, 0),
}  # fmt: skip
_MIDDLE_SHARE = 2 / 3
_QUESTIONS_QA17 = 8
_STEPS, _DECOYS = 2, 3
_PATH_LAST = 0.3  # how often a step of the path is made the last fact
_END_WEIGHT = 3.0  # how much rather a decoy lies beside an end of the path of qa19 than elsewhere


def _add(point: _Point, step: _Point) -> _Point:
    return point[0] + step[0], point[1] + step[1]


def qa4(rng: random.Random) -> Iterator[Asked]:
    """Two-argument relations: three places on a line; the object of a fact is asked about."""
    first, middle, last = shuffled(rng, PLACES)[:3]
    direction = pick(rng, list(_COMPASS))
    relations = []
    for subject, towards, other in ((first, direction, middle), (last, OPPOSITE[direction], middle)):
        if rng.random() >= _MIDDLE_SHARE:
            subject, towards, other = other, OPPOSITE[towards], subject
        relations.append((subject, towards, other))
    relations = shuffled(rng, relations)
    fact = int(rng.random() * 2)
    answer, towards, other = relations[fact]
    question = f"What is {towards} of the {other}?"
    if rng.random() < 0.5:
        question = f"What is the {other} {OPPOSITE[towards]} of?"
    yield tuple(f"The {x} is {way} of the {y}." for x, way, y in relations), question, answer, (fact,)


def qa17(rng: random.Random) -> Iterator[Asked]:
    """Positional reasoning: eight times, how the two outer of three shapes lie to each other."""
    middle, *outer = shuffled(rng, SHAPES)[:3]
    sides = shuffled(rng, list(_ON_PAPER.values()))[:2]
    at = {middle: (0, 0), outer[0]: sides[0], outer[1]: sides[1]}
    facts = []
    for shape in outer:
        subject, other = (middle, shape) if rng.random() < _MIDDLE_SHARE else (shape, middle)
        facts.append(f"The {subject} is {_relation(at[subject], at[other])} the {other}.")
    statements: dict[bool, list[tuple[str, str, str]]] = {True: [], False: []}
    for subject, other in (outer, outer[::-1]):
        for relation in _ON_PAPER:
            statements[_holds(at[subject], relation, at[other])].append((subject, relation, other))
    for _ in range(_QUESTIONS_QA17):
        true = rng.random() < 0.5
        subject, relation, other = pick(rng, statements[true])
        supporting = (0, 1) if subject == outer[0] else (1, 0)
        yield tuple(facts), f"Is the {subject} {relation} the {other}?", "yes" if true else "no", supporting


def _relation(point: _Point, other: _Point) -> str:
    return next(name for name in _ON_PAPER if _holds(point, name, other))


def _holds(point: _Point, relation: str, other: _Point) -> bool:
    (x, y), (dx, dy) = point, _ON_PAPER[relation]
    return (x - other[0]) * dx + (y - other[1]) * dy > 0


def qa19(rng: random.Random) -> Iterator[Asked]:
    """Path finding: two steps between six places that form a tree on a grid."""
    places = shuffled(rng, PLACES)
    at: dict[str, _Point] = {places[0]: (0, 0)}
    links: list[tuple[str, str, str]] = []
    way: list[str] = []
    for step in range(_STEPS):
        here, new = places[step], places[step + 1]
        direction = pick(rng, [d for d in _COMPASS if not way or d != OPPOSITE[way[-1]]])
        way.append(direction)
        at[new] = _add(at[here], _COMPASS[direction])
        links.append((new, direction, here))
    ends = (places[0], places[_STEPS])
    for new in places[_STEPS + 1 : _STEPS + 1 + _DECOYS]:
        free = {
            (here, direction): _END_WEIGHT if here in ends else 1.0
            for here in at
            for direction in _COMPASS
            if _add(at[here], _COMPASS[direction]) not in at.values()
        }
        here, direction = pick_weighted(rng, free)
        at[new] = _add(at[here], _COMPASS[direction])
        links.append((new, direction, here))
    order = shuffled(rng, range(len(links)))
    if rng.random() < _PATH_LAST:
        at_end = order.index(int(rng.random() * _STEPS))
        order[at_end], order[-1] = order[-1], order[at_end]
    facts = []
    for link in order:
        new, direction, here = links[link]
        if rng.random() < 0.5:
            new, direction, here = here, OPPOSITE[direction], new
        facts.append(f"The {new} is {direction} of the {here}.")
    question = f"How do you go from the {ends[0]} to the {ends[1]}?"
    supporting = tuple(order.index(step) for step in range(_STEPS))
    yield tuple(facts), question, ",".join(direction[0] for direction in way), supporting
