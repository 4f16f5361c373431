"""The folder of a store: one process has it at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ...core.files import flush_folder
from ..errors import StoreUnavailable


def claimed(folder: Path) -> FileLock:
    """The lock of the folder, held; the folder is made, and its name is on the disk."""
    with opening(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in missing:
            flush_folder(path.parent)
        lock = FileLock(folder / "lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreUnavailable(
                f"Another process uses the session store {folder}: stop it, or use PostgreSQL for several."
            ) from error
    return lock


@contextlib.contextmanager
def opening(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError) as error:
        raise StoreUnavailable(f"The session store {folder} cannot be opened ({error}).") from error
