"""Room set aside on the disk: without it, a full disk could not even record that something is deleted."""

import contextlib
import os
from pathlib import Path

_BYTES = 2**20


class Reserve:
    """A file that is given up when the disk is full, and made again when there is room."""

    def __init__(self, path: Path):
        self.path = path

    def fill(self) -> None:
        """Nothing happens where there is no room: the store works without."""
        if self.path.exists():
            return
        try:
            # Not zeros, which some file systems keep without room.
            self.path.write_bytes(os.urandom(_BYTES))
        except OSError:
            self.give_up()

    def give_up(self) -> bool:
        """Whether there was something to give up."""
        with contextlib.suppress(OSError):
            self.path.unlink()
            return True
        return False
