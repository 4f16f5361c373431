"""Drawings: figures that are made when they are needed, as files or inside a page. Equal data give equal files."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, MissingExtraError
from ..core.files import replace_atomically

_SUFFIXES = (".pdf", ".png", ".svg")


@dataclass(frozen=True)
class Drawing:
    """A figure, not drawn yet. section: its heading on the page. draw: makes the matplotlib figure."""

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[[], Any]


def check_plots() -> None:
    """Raises `MissingExtraError` where figures cannot be drawn; better before long work than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("Figures need matplotlib: pip install 'mnemic[plots]'.") from error


def check_suffix(suffix: str) -> None:
    """Raises `ConfigError` for a kind of file that figures are not written as."""
    if suffix not in _SUFFIXES:
        raise ConfigError(f"suffix = {suffix!r}; expected {', '.join(_SUFFIXES)}.")


def save_drawings(drawings: Sequence[Drawing], folder: str | Path, suffix: str = ".png") -> list[Path]:
    """One file a figure, as .png, .pdf or .svg.

    Raises:
        ConfigError: another suffix. MissingExtraError: no matplotlib.
    """
    check_plots()
    check_suffix(suffix)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for drawing in drawings:
        name = re.sub(r"[^\w.-]+", "-", drawing.name)
        while (path := folder / f"{name}{suffix}") in paths:
            name += "-2"
        paths.append(path)
        replace_atomically(path, lambda temporary, drawing=drawing: save(drawing, temporary, suffix[1:]))
    return paths


def save(drawing: Drawing, target: Any, kind: str) -> None:
    """Draw into a path or a binary file; kind: "png", "pdf" or "svg"."""
    dates: dict[str, dict[str, Any]] = {
        "pdf": {"CreationDate": None},
        "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    }
    with style():
        drawing.draw().savefig(target, format=kind, dpi=200, metadata=dates.get(kind))


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's defaults, whatever the user's are; text is text in SVG, and a dollar in a name is no formula."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.fonttype": "none", "svg.hashsalt": "mnemic", "text.parse_math": False, "font.size": 8}
        )
        yield
