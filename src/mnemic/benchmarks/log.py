"""The log of an evaluation: one line a batch, appended and flushed to disk, so that a killed run goes on where it was.

The first line names the settings and the model; a log is continued only with the same ones. Each line carries a CRC-32
of its content. What a kill left of the last line is dropped and measured again.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from ..core.errors import FileFormatError, InputError

FORMAT_VERSION = 1
_BEGUN = re.compile(rb"[0-9a-f]{1,8}\Z|[0-9a-f]{8} (\Z|\{)")


class Log:
    """An append-only file of JSON lines, of one writer at a time.

    Args:
        path: the file; made where there is none.
        identity: what the log is of, as JSON.

    Raises:
        InputError: the file is the log of something else, another process writes it, or it cannot be written.
        FileFormatError: no such log, damage before the last line, or a newer format.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]):
        self.path = Path(path)
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        if not self.path.parent.is_dir():
            raise InputError(f"Cannot write {self.path}: {self.path.parent} is no folder.")
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"Another process is writing {self.path}; wait for it, or write elsewhere.") from None
        except OSError as error:
            raise InputError(
                f"Cannot write {self.path}: {error.strerror}. Choose a folder that can be written."
            ) from error
        try:
            self.lines = self._open(json.loads(json.dumps(identity)))
        except BaseException:
            self._lock.release()
            raise

    def _open(self, identity: dict[str, Any]) -> list[dict[str, Any]]:
        lines, good = read(self.path) if self.path.exists() else ([], 0)
        if lines:
            changed = _differences(lines[0].get("identity", {}), identity)
            if changed:
                raise InputError(
                    f"{self.path} is the log of another evaluation: {'; '.join(changed)}. Give the settings that it "
                    "was begun with, or write elsewhere."
                )
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        self._file.truncate(good)
        if not lines:
            self.append({"format_version": FORMAT_VERSION, "identity": identity})
        return lines[1:]

    def append(self, content: Mapping[str, Any]) -> None:
        """Add a line; when this returns it is on the disk.

        Raises:
            InputError: the disk is full or gone.
        """
        try:
            self._file.write(_line(content))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"Could not write {self.path}: {error}. Free some space and run the same command; it goes on."
            ) from error

    def close(self) -> None:
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The good lines of a log, and the byte at which the last of them ends. An unfinished last line is left out.

    Raises:
        FileFormatError: no such log, damage before the last line, or a newer format.
    """
    lines: list[dict[str, Any]] = []
    content, good = Path(path).read_bytes(), 0
    for raw in content.splitlines(keepends=True):
        line = _parsed(raw)
        if line is None:
            if lines and good + len(raw) < len(content):
                raise FileFormatError(
                    f"{path}, line {len(lines) + 1}, is damaged, and lines follow it: this is no work of a kill. "
                    "Restore the file, or delete it to measure anew."
                )
            break
        lines.append(line)
        good += len(raw)
    # A kill may have left part of the first line; anything else is somebody's file, and must not be cut.
    if not lines and content and (b"\n" in content or not _BEGUN.match(content)):
        raise FileFormatError(f"{path} is no log of an evaluation; write elsewhere.")
    if lines and lines[0].get("format_version") != FORMAT_VERSION:
        raise FileFormatError(
            f"{path} has format version {lines[0].get('format_version')!r}; this release reads {FORMAT_VERSION}."
        )
    return lines, good


def batches(path: str | Path) -> Iterator[dict[str, Any]]:
    """What `Log.append` wrote into a log, in order."""
    yield from read(path)[0][1:]


def _line(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    checksum, _, text = raw.partition(b" ")
    if not raw.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
        return None
    return json.loads(text)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {before.get(key)!r:.200} and is {now.get(key)!r:.200}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
