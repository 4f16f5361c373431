"""Recipes: one comparison a system and scale, beside this file, so that an installed command has them.

A recipe is a file of `mnemic compare` with one table more, `[reproduction]`:

    main = "main"                     # the board of the main table
    model, others = "lm2", ["rmt"]    # margins are of this entry over those
    compared = ["0k", "1k"]           # lengths over which they are taken
    besides = ["tasks"]               # boards whose margins are taken as well
    curves = ["blocks"]               # boards whose training loss is drawn against tokens
    ship, ship_board = "lm2", "main"  # the entry and board (or the main one) whose best model is exported
    gpu = true                        # too much for a CPU: there it is counted, and not run
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, UnknownNameError
from ..comparison import Comparison

SYSTEMS = ("lm2",)
SCALES = ("smoke", "cpu", "gpu")
_FOLDER = Path(__file__).parent
_KEYS = ("main", "model", "others", "compared", "besides", "curves", "ship", "ship_board", "gpu")


@dataclass(frozen=True)
class Recipe:
    """comparison: all boards. The other fields are those of [reproduction]; text: the file."""

    comparison: Comparison
    main: str
    model: str
    others: tuple[str, ...]
    compared: tuple[str, ...]
    besides: tuple[str, ...]
    curves: tuple[str, ...]
    ship: str | None
    ship_board: str
    gpu: bool
    text: str


def recipe(system: str, scale: str) -> Recipe:
    """
    Raises:
        UnknownNameError: a system or scale without a recipe.
    """
    for kind, name, known in (("system to reproduce", system, SYSTEMS), ("scale", scale, SCALES)):
        if name not in known:
            raise UnknownNameError.of(kind, name, known)
    return parse((_FOLDER / f"{system}-{scale}.toml").read_text(encoding="utf-8"))


def full_text(system: str) -> str:
    """The paper's own configuration as a file of `mnemic train`."""
    if system not in SYSTEMS:
        raise UnknownNameError.of("system to reproduce", system, SYSTEMS)
    return (_FOLDER / f"{system}-full.toml").read_text(encoding="utf-8")


def parse(text: str) -> Recipe:
    """
    Raises:
        ConfigError: no TOML, or settings that cannot be.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The recipe is no valid TOML: {error}.") from error
    told: Mapping[str, Any] = values.pop("reproduction", {})
    ConfigError.check_names("setting of [reproduction]", told, _KEYS)
    missing = [key for key in ("main", "model", "others", "compared") if key not in told]
    if missing:
        raise ConfigError(f"[reproduction] has no {', '.join(missing)}.")
    comparison = Comparison.from_dict(values)
    boards = {job.board for job in comparison.jobs}
    ship_board = told.get("ship_board", told["main"])
    besides = told.get("besides", ())
    for board in (told["main"], *besides, *told.get("curves", ()), ship_board):
        if board not in boards:
            raise UnknownNameError.of("board of [reproduction]", board, boards)
    shipped = [(told["ship"], ship_board)] if "ship" in told else []
    compared = [(entry, board) for board in (told["main"], *besides) for entry in (told["model"], *told["others"])]
    for entry, board in (*compared, *shipped):
        entries = {job.entry for job in comparison.jobs if job.board == board}
        if entry not in entries:
            raise UnknownNameError.of(f"entry of board {board}", entry, entries)
    return Recipe(
        comparison, told["main"], told["model"], tuple(told["others"]), tuple(told["compared"]),
        tuple(besides), tuple(told.get("curves", ())), told.get("ship"), ship_board, told.get("gpu", False), text,
    )  # fmt: skip
