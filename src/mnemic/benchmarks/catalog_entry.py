"""What the catalog says of a task, and what a cell of it is opened with."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError, UnknownNameError
from .cell import Cell
from .prompts import Prompting

RELEASED = "released"
"""The length of files that fix their samples."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A cell that is asked for; see `open_cell`. size: the length as a number, 0 for released files."""

    name: str
    length: str
    size: int
    seed: int
    tokenizer: Any
    segment: int
    options: Mapping[str, Any]
    data: str | Path | None
    split: str
    prompting: Prompting

    def checked(self, known: Collection[str]) -> dict[str, Any]:
        """The options.

        Raises:
            ConfigError: one that is not among `known`.
        """
        if self.options and not known:
            raise ConfigError(f"{self.name} has no option {min(self.options)!r}; it has none at all.")
        ConfigError.check_names(f"option of {self.name}", self.options, known)
        return dict(self.options)

    def place(self, reads: str, source: str) -> Path:
        """Where the released files are said to be.

        Raises:
            DataError: nowhere.
        """
        given = self.data if self.data is not None else os.environ.get("MNEMIC_DATA") or None
        if given is None:
            raise DataError(
                f"{self.name} reads {reads}. Download it ({source}) and name its folder with data, or set MNEMIC_DATA."
            )
        return Path(given)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A task of the catalog.

    Attributes:
        name: of the task. kind: "words", "tokens" or "text", which has perplexities instead of scores.
        unit: what its lengths count; "released" where files fix them.
        lengths: those of a report that names none; of released files all there are.
        source: paper, or where the file is from.
        needs: file or extra that it reads, "" for none.
        names: official names of lengths.
    """

    name: str
    kind: str
    unit: str
    lengths: tuple[str, ...]
    source: str
    needs: str = ""
    names: Mapping[str, int] = field(default_factory=dict)
    make: Callable[[Request], Cell] = field(repr=False)

    def size(self, length: str) -> int:
        """The number that a length stands for.

        Raises:
            UnknownNameError: neither a number nor an official name.
        """
        if self.unit == RELEASED:
            if length not in self.lengths:
                raise UnknownNameError.of(f"length of {self.name}, which is of files,", length, self.lengths)
            return 0
        if length in self.names:
            return self.names[length]
        if length.isascii() and length.isdigit() and str(int(length)) == length:
            return int(length)
        kind = f"length of {self.name} (a number of {self.unit}, or an official name)"
        if self.names:
            raise UnknownNameError.of(kind, length, self.names)
        raise UnknownNameError(f"{self.name} has no length {length!r}; give a number of {self.unit}.")
