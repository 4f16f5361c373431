"""Files of states: one a version, written once, under names that come from nobody outside."""

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...core.files import flush_folder
from ..errors import SessionDamaged, StoreUnavailable

_NAME = re.compile(r"[0-9a-f]{32}")


class StateFiles:
    """A folder of files that nobody sees before a record names them: what a crash leaves half written stays unknown.

    Every method raises `StoreUnavailable` where the disk fails or is full.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with _disk("be opened"):
            folder.mkdir(mode=0o700, exist_ok=True)
            flush_folder(folder)
            # Folders known to be on the disk: the flush was for those that a killed process left.
            self._durable = {path.name for path in folder.iterdir()}

    def write(self, data: bytes) -> str:
        """A new file with this content, durable. Returns its name."""
        name = secrets.token_hex(16)
        with _disk("be written"):
            path = self._place(name)
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
                try:
                    left = memoryview(data).cast("B")
                    while left:
                        left = left[os.write(handle, left) :]
                    os.fsync(handle)
                finally:
                    os.close(handle)
                flush_folder(path.parent)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return name

    def again(self, name: str) -> str:
        """A second name for the same content, which stays when the first is removed."""
        path, other = self._path(name), secrets.token_hex(16)
        with _disk("be written"):
            target = self._place(other)
            try:
                os.link(path, target)
            except FileNotFoundError as error:
                raise SessionDamaged("A state of this session is missing; roll back to another version.") from error
            except OSError:
                # Not every file system links, and none without end.
                return self.write(path.read_bytes())
            try:
                flush_folder(target.parent)
            except BaseException:
                target.unlink(missing_ok=True)
                raise
        return other

    def read(self, name: str, size: int, digest: bytes, what: str) -> bytes:
        """Raises `FileNotFoundError`: not there; `SessionDamaged`: not what was written."""
        try:
            data = self._path(name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise SessionDamaged(f"{what} cannot be read ({error.strerror}); roll back to another version.") from error
        check_state(data, size, digest, what)
        return data

    def remove(self, names: Iterable[str], *, durably: bool = False) -> None:
        """durably: also where the machine stops right afterwards; else the next start may have to do it again."""
        with _disk("be cleaned"):
            paths = [self._path(name) for name in names]
            for path in paths:
                path.unlink(missing_ok=True)
            if durably:
                for folder in {path.parent for path in paths}:
                    with contextlib.suppress(FileNotFoundError):
                        flush_folder(folder)

    def names(self) -> Iterator[str]:
        with _disk("be listed"):
            for folder in self.folder.iterdir():
                if folder.is_dir():
                    yield from (path.name for path in folder.iterdir() if _NAME.fullmatch(path.name))

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _place(self, name: str) -> Path:
        path = self._path(name)
        if path.parent.name not in self._durable:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            flush_folder(self.folder)
            self._durable.add(path.parent.name)
        return path


def digest_of(state: bytes) -> bytes:
    return hashlib.sha256(state).digest()


def check_state(data: bytes, size: int, digest: bytes, what: str) -> None:
    """Raises `SessionDamaged`."""
    if len(data) != size or digest_of(data) != digest:
        raise SessionDamaged(
            f"{what} is damaged ({len(data):,} bytes, written were {size:,}); roll back to another version."
        )


@contextlib.contextmanager
def _disk(verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"The folder of states cannot {verb} ({error.strerror}).") from error
