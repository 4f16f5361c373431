"""qa15 and qa16: species and what follows from them.

A fact about an individual comes after what it needs: "Emily is a wolf" after a fact about wolves (qa15), a colour after
the species of its bearer (qa16).
"""

import random
from collections.abc import Iterator

from ..sample import Asked, pick, pick_weighted, shuffled
from ..words import COLOURED, COLOURS, PETS, PLURALS, SPECIES

_QUESTIONS_QA15 = 4
_SPECIES_FIRST = 2.0  # how much rather a fact about a species comes next than one about an individual
_GROUPS = {(2, 2, 1): 0.598, (2, 1, 1, 1): 0.197, (4, 1): 0.096, (2, 3): 0.096, (5,): 0.013}
"""How many of the five of qa16 share a species: the group of the one asked about, and the others; by their share."""
_SAME_COLOUR = 0.5  # how often a colour is copied from the last of the species, else drawn


def qa15(rng: random.Random) -> Iterator[Asked]:
    """Basic deduction: each species fears another; four individuals."""
    fears = {species: pick(rng, [other for other in PLURALS if other != species]) for species in PLURALS}
    species_left, pets_left = shuffled(rng, list(PLURALS)), shuffled(rng, PETS)
    known: dict[str, int] = {}  # species -> fact
    pets: dict[str, tuple[str, int]] = {}
    facts: list[str] = []
    while species_left or pets_left:
        eager = _SPECIES_FIRST * len(species_left)
        if species_left and (not known or rng.random() * (eager + len(pets_left)) < eager):
            species = species_left.pop()
            known[species] = len(facts)
            facts.append(f"{PLURALS[species].capitalize()} are afraid of {PLURALS[fears[species]]}.")
        else:
            species = pick(rng, list(known))
            pets[pets_left[-1]] = species, len(facts)
            facts.append(f"{pets_left.pop()} is a {species}.")
    for _ in range(_QUESTIONS_QA15):
        pet = pick(rng, PETS)
        species, fact = pets[pet]
        yield tuple(facts), f"What is {pet.lower()} afraid of?", fears[species], (fact, known[species])


def qa16(rng: random.Random) -> Iterator[Asked]:
    """Basic induction: the colour of the one of the same species that was introduced last."""
    sizes = pick_weighted(rng, _GROUPS)
    kinds = [kind for kind, size in zip(shuffled(rng, SPECIES), sizes, strict=False) for _ in range(size)]
    ready = [(name, "species") for name in COLOURED]
    order: list[tuple[str, str]] = []
    while ready:
        order.append(ready.pop(int(rng.random() * len(ready))))
        if order[-1][1] == "species":
            ready.append((order[-1][0], "colour"))
    asked, _ = order.pop()  # the last colour is not told: it is the question
    names = [asked, *shuffled(rng, [name for name in COLOURED if name != asked])]
    species = dict(zip(names, kinds, strict=True))
    said = {what: fact for fact, what in enumerate(order)}
    facts: list[str] = []
    colours: dict[str, str] = {}
    last: dict[str, str] = {}  # species -> colour told last
    for name, what in order:
        kind = species[name]
        if what == "species":
            facts.append(f"{name} is a {kind}.")
            continue
        copied = kind in last and rng.random() < _SAME_COLOUR
        last[kind] = colours[name] = last[kind] if copied else pick(rng, COLOURS)
        facts.append(f"{name} is {colours[name]}.")
    alike = [name for name in colours if species[name] == species[asked]]
    other = max(alike, key=lambda name: said[name, "species"])
    supporting = said[asked, "species"], said[other, "species"], said[other, "colour"]
    yield tuple(facts), f"What color is {asked}?", colours[other], supporting
