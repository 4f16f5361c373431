"""The simulated worlds that tell the stories, by kind of world."""

from ..sample import World
from . import carrying, days, handing, logic, needs, pairs, relations, sizes, whereabouts

WORLDS: dict[str, World] = {
    **carrying.WORLDS, "qa4": relations.qa4, **handing.WORLDS, "qa9": whereabouts.qa9, "qa10": whereabouts.qa10,
    **pairs.WORLDS, "qa14": days.qa14, "qa15": logic.qa15, "qa16": logic.qa16, "qa17": relations.qa17,
    "qa18": sizes.qa18, "qa19": relations.qa19, "qa20": needs.qa20,
}  # fmt: skip
"""Task -> story teller."""
