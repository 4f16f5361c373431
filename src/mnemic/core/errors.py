"""Every error mnemic raises on purpose.

All of them derive from `MnemicError`, so one `except` catches what the library has to say and nothing else.
Each also derives from the built-in that the situation would usually raise. Messages name the thing, what was
expected, and the way out. The command line prints them without a traceback and exits with code 2.
"""

import difflib
from collections.abc import Iterable


class MnemicError(Exception):
    """Base of the hierarchy."""


class ConfigError(MnemicError, ValueError):
    """A configuration key or value that cannot be used."""

    @classmethod
    def check_names(cls, kind: str, given: Iterable[str], known: Iterable[str]) -> None:
        """Raises the error for the first of `given` that is not known, with the closest known names as suggestions."""
        known = set(known)
        for name in given:
            if name not in known:
                raise cls(str(UnknownNameError.of(kind, name, known)))


class UnknownNameError(MnemicError, KeyError):
    """A name that no registry holds: a memory, preset, task or host."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0])

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> "UnknownNameError":
        """The error for `name`, with the closest known names as suggestions."""
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known: {', '.join(known)}."
        return cls(f"No {kind} is called {name!r}. {hint}")


class HostError(MnemicError, TypeError):
    """A host that does not offer what the memory needs."""


class InputError(MnemicError, ValueError):
    """Token ids, masks, text or states of the wrong kind, shape or range."""


class StateError(MnemicError, ValueError):
    """A state that belongs to another memory, host or width."""


class FileFormatError(MnemicError, ValueError):
    """A file that is damaged, foreign, or of a format version this release cannot read."""


class DataError(MnemicError, FileNotFoundError):
    """Data files that are missing or not what they should be."""


class UnsupportedError(MnemicError, NotImplementedError):
    """An operation that the memory declares it cannot do."""


class MissingExtraError(MnemicError, ImportError):
    """An optional dependency that is not installed."""


class TrainingError(MnemicError, RuntimeError):
    """A training run that cannot go on: a loss that is no number, or no memory left."""
