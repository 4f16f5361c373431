"""Oracle of the tasks about pairs of things: qa4, qa17, qa18, qa19."""

import re
from collections import deque
from collections.abc import Sequence

from ..words import CONTAINERS, OPPOSITE, SHAPES
from .reading import matched, unanswered

_WAY = "|".join(OPPOSITE)
_BESIDE = re.compile(rf"The (\w+) is ({_WAY}) of the (\w+)\.")
_SIDES = {"above": (0, 1), "below": (0, -1), "to the right of": (1, 0), "to the left of": (-1, 0)}
_SHAPED = rf"({'|'.join(SHAPES)}) (IS)({'|'.join(_SIDES)}) the ({'|'.join(SHAPES)})"
_THING = "|".join(("box of chocolates", "chocolate", *CONTAINERS))


def beside(task: str, facts: Sequence[str], question: str) -> str:
    """qa4: what a fact, or its reverse, says."""
    pattern = re.compile(rf"What is (?:({_WAY}) of the (\w+)|the (\w+) ({_WAY}) of)\?")
    asked = matched(pattern, question.strip(), task, "a question")
    wanted = (asked[2], asked[1]) if asked[1] else (asked[3], OPPOSITE[asked[4]])
    for fact in facts:
        subject, way, other = matched(_BESIDE, fact, task).groups()
        if (other, way) == wanted:
            return subject
        if (subject, OPPOSITE[way]) == wanted:
            return other
    raise unanswered(question)


def position(task: str, facts: Sequence[str], question: str) -> str:
    """qa17: coordinates from the facts, compared along the axis of the question."""
    told = re.compile(f"The {_SHAPED.replace('IS', 'is ')}\\.")
    asked = matched(re.compile(f"Is the {_SHAPED.replace('(IS)', '()')}\\?"), question.strip(), task, "a question")
    links = [matched(told, fact, task).group(1, 3, 4) for fact in facts]
    at = {links[0][0]: (0, 0)} if links else {}
    for _ in links:
        for subject, side, other in links:
            dx, dy = _SIDES[side]
            if other in at:
                at.setdefault(subject, (at[other][0] + dx, at[other][1] + dy))
            if subject in at:
                at.setdefault(other, (at[subject][0] - dx, at[subject][1] - dy))
    if asked[1] not in at or asked[4] not in at:
        raise unanswered(question)
    (x, y), (u, v), (dx, dy) = at[asked[1]], at[asked[4]], _SIDES[asked[3]]
    return "yes" if (x - u) * dx + (y - v) * dy > 0 else "no"


def size(task: str, facts: Sequence[str], question: str) -> str:
    """qa18: transitive closure of what fits into what."""
    told = re.compile(rf"The ({_THING}) (?:is (bigger) than|fits inside) the ({_THING})\.")
    pattern = re.compile(rf"Is the ({_THING}) bigger than the ({_THING})\?|Does the ({_THING}) fit in the ({_THING})\?")
    asked = matched(pattern, question.strip(), task, "a question")
    small, big = (asked[2], asked[1]) if asked[1] else (asked[3], asked[4])
    fits: dict[str, set[str]] = {}
    for fact in facts:
        one, bigger, other = matched(told, fact, task).groups()
        low, high = (other, one) if bigger else (one, other)
        fits.setdefault(low, set()).add(high)
    if big in _above(fits, small):
        return "yes"
    if small in _above(fits, big):
        return "no"
    raise unanswered(question)


def _above(fits: dict[str, set[str]], thing: str) -> set[str]:
    found: set[str] = set()
    todo = [thing]
    while todo:
        new = fits.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def path(task: str, facts: Sequence[str], question: str) -> str:
    """qa19: the shortest way, breadth first."""
    asked = matched(re.compile(r"How do you go from the (\w+) to the (\w+)\?"), question.strip(), task, "a question")
    steps: dict[str, list[tuple[str, str]]] = {}
    for fact in facts:
        subject, way, other = matched(_BESIDE, fact, task).groups()
        steps.setdefault(other, []).append((way, subject))
        steps.setdefault(subject, []).append((OPPOSITE[way], other))
    ways: dict[str, tuple[str, ...]] = {asked[1]: ()}
    todo = deque(ways)
    while todo:
        here = todo.popleft()
        for way, there in steps.get(here, []):
            if there not in ways:
                ways[there] = (*ways[here], way[0])
                todo.append(there)
    if not ways.get(asked[2]):
        raise unanswered(question)
    return ",".join(ways[asked[2]])
