"""Documents as they arrive: bytes to text, piece by piece."""

import codecs
from collections.abc import AsyncIterator
from typing import Any

from .errors import InvalidRequest

PIECE = 1 << 16
LONGEST = 1 << 20


class Pieces:
    """UTF-8 bytes in, text out, cut behind line ends, else before spaces, so that words stay whole.

    The text of all pieces is the document; a piece has at least `PIECE` characters except for the last, and only a
    word without end is cut, at `LONGEST`. A byte-order mark in front is dropped.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
        self._kept: list[str] = []
        self._length = 0
        self._bytes = 0

    def add(self, data: bytes) -> list[str]:
        """Raises `InvalidRequest`: it is no UTF-8."""
        text = self._decoded(data)
        self._bytes += len(data)
        self._kept.append(text)
        self._length += len(text)
        if self._length < PIECE:
            return []
        text = "".join(self._kept)
        at = text.rfind("\n") + 1 or max(text.rfind(" "), 0)
        if not at and len(text) >= LONGEST:
            at = len(text)
        self._kept, self._length = [text[at:]], len(text) - at
        return [text[i : min(i + LONGEST, at)] for i in range(0, at, LONGEST)]

    def end(self) -> str:
        """What is left. Raises `InvalidRequest`: it ends within a character."""
        return "".join(self._kept) + self._decoded(b"", final=True)

    def _decoded(self, data: bytes, final: bool = False) -> str:
        try:
            return self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            at = self._bytes + error.start
            raise InvalidRequest(f"The document is no UTF-8 text ({error.reason} about byte {at:,}).") from error


async def file_of(parts: AsyncIterator[bytes], boundary: bytes) -> AsyncIterator[bytes]:
    """The content of the one file in a multipart body, as it comes.

    Raises:
        InvalidRequest: no file, several, or no multipart body.
    """
    from python_multipart import MultipartParser
    from python_multipart.exceptions import FormParserError

    found, name, value = _Found(), bytearray(), bytearray()

    def header_end() -> None:
        if bytes(name).lower() == b"content-disposition" and b"filename" in value:
            found.begin()
        name.clear()
        value.clear()

    callbacks: Any = {
        "on_header_field": lambda data, start, end: name.extend(data[start:end]),
        "on_header_value": lambda data, start, end: value.extend(data[start:end]),
        "on_header_end": header_end,
        "on_part_data": lambda data, start, end: found.add(data[start:end]),
        "on_part_end": found.end,
        "on_end": found.close,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        async for part in parts:
            parser.write(part)
            if data := found.take():
                yield data
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"The multipart body cannot be read: {error}") from error
    if not found.closed:
        raise InvalidRequest("The multipart body ends before its last boundary.")
    if not found.count:
        raise InvalidRequest("The multipart body has no file.")


class _Found:
    def __init__(self) -> None:
        self.count, self._inside, self._data, self.closed = 0, False, bytearray(), False

    def begin(self) -> None:
        self.count += 1
        self._inside = True
        if self.count > 1:
            raise InvalidRequest("The multipart body has more than one file; feed them one after another.")

    def add(self, data: bytes) -> None:
        if self._inside:
            self._data += data

    def end(self) -> None:
        self._inside = False

    def close(self) -> None:
        self.closed = True

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data
