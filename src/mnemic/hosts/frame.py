"""The frame of the running step, where every part of the host can find it.

It travels through the host as the keyword argument `memory_frame`, in a `Carried`, so that a layer replayed by
activation checkpointing meets the same values again; each layer makes it current for its own parts, because
feed-forward modules and linear layers are not handed keyword arguments.
"""

import threading
from typing import Any

from ..core.step import Frame

KEYWORD = "memory_frame"

# Not a ContextVar: torch.compile cannot trace one being set.
_current = threading.local()


def current() -> Frame | None:
    """The frame of the step that runs in this thread, if any."""
    return getattr(_current, "frame", None)


class Carried:
    """A frame on its way through the host. FSDP2 copies the dataclasses among a layer's arguments, and what a layer
    left in a copy would be lost; this it hands on as it is."""

    __slots__ = ("frame",)

    def __init__(self, frame: Frame):
        self.frame = frame


class running:
    """Makes a frame current. Not contextlib: torch.compile traces plain methods best."""

    def __init__(self, frame: Frame | None):
        self.frame, self.before = frame, None

    def __enter__(self) -> None:
        self.before = current()
        _current.frame = self.frame

    def __exit__(self, *error: Any) -> None:
        _current.frame = self.before
