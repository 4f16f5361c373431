"""Catalogue: what is known of every published system that has a card, built or not.

Facts only, from `catalogue.toml` beside this file. What is built is read from the registry: a memory carries the
name of its entry.
"""

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files


@dataclass(frozen=True)
class Entry:
    """One published system.

    Attributes:
        name: name of its card and, once built, of its memory: "gated-deltanet".
        system: how its paper writes it: "Gated DeltaNet".
        title: title of the paper.
        year: year of the first version.
        arxiv: arXiv number: "2412.06464".
        family: family of its card: "recurrent", "online", "benchmarks", ...
        note: companion papers and earlier titles, or "".
    """

    name: str
    system: str
    title: str
    year: int
    arxiv: str
    family: str
    note: str = ""


def catalogue() -> dict[str, Entry]:
    """Every entry by its name, in the order of the cards."""
    return dict(_entries())


@lru_cache(maxsize=1)
def _entries() -> dict[str, Entry]:
    facts = tomllib.loads(files("mnemic.core").joinpath("catalogue.toml").read_text(encoding="utf-8"))
    return {name: Entry(name=name, **fields) for name, fields in facts.items()}
