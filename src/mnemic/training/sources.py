"""Sources: documents out of text, JSON lines, parquet, and data sets of the `datasets` library, one after another.

A source is a file, a folder (all such files below it, by name), a pattern with `*`, a folder that `datasets` saved, or
`hf:OWNER/NAME[:CONFIG[:SPLIT]]` on the hub, streamed. A text file is one document; elsewhere a row is.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import ConfigError, DataError, MissingExtraError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
HUB = "hf:"
SAVED = ("dataset_dict.json", "state.json")
ON_ERROR = ("stop", "skip")


class Row(NamedTuple):
    """A document as found: its text or what is wrong with it, and where it stands (file and line)."""

    text: Any
    where: str
    fault: str | None = None


@dataclass
class Faults:
    """What to do with bad rows, and what was done: on_error "stop" raises at the first, "skip" counts them."""

    on_error: str = "stop"
    count: int = 0
    first: str | None = None

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"on_error = {self.on_error!r}, expected {' or '.join(ON_ERROR)}.")

    def add(self, row: Row, fault: str) -> None:
        message = f"{row.where}: {fault}"
        if self.on_error == "stop":
            raise DataError(f"{message} Correct it, or leave such rows out with --on-error skip.")
        self.count, self.first = self.count + 1, self.first or message


def expand(sources: Iterable[str]) -> list[str]:
    """Sources -> files and data sets, in order; folders and patterns by name.

    Raises:
        DataError: a source that leads nowhere, or to a file of another kind.
    """
    found: list[str] = []
    for source in sources:
        path = Path(source)
        if source.startswith(HUB) or _saved(path):
            found.append(source)
        elif path.is_dir():
            inside = sorted(str(p) for p in path.rglob("*") if p.is_file() and _suffix(p))
            if not inside:
                raise DataError(f"{source} holds no file that ends in {', '.join(SUFFIXES)}.")
            found += inside
        else:
            matches = [source] if path.is_file() else sorted(glob.glob(source, recursive=True))
            if not matches:
                raise DataError(
                    f"{source} does not exist; expected files, folders, patterns such as 'texts/*.txt', or "
                    f"{HUB}OWNER/NAME for a data set of the Hugging Face hub."
                )
            found += matches
            for match in matches:
                if not _suffix(Path(match)):
                    raise DataError(f"{match}: expected a file that ends in {', '.join(SUFFIXES)}.")
    if not found:
        raise DataError("No sources given; name files, folders or data sets.")
    doubled = sorted({one for one in found if found.count(one) > 1})
    if doubled:
        raise DataError(f"{doubled[0]} is given twice; its documents would count double.")
    return found


def texts(sources: Iterable[str], column: str, faults: Faults) -> Iterator[tuple[str, str]]:
    """(text, place) of every good document of expanded sources, in order; others go to `faults`.

    Raises:
        DataError: a bad row (unless skipped), or a source that cannot be opened. MissingExtraError: no `datasets`.
    """
    for source in sources:
        rows = 0
        for row in _reader(source)(source, column):
            rows += 1
            if row.fault is not None:
                faults.add(row, row.fault)
            elif not isinstance(row.text, str):
                kind = "null" if row.text is None else type(row.text).__name__
                faults.add(row, f"column {column!r} holds {kind}, expected text.")
            elif not row.text.strip():
                faults.add(row, "the text is empty.")
            elif (at := _surrogate(row.text)) is not None:
                faults.add(row, f"half a surrogate pair at character {at}, which is no text.")
            else:
                yield row.text, row.where
        if not rows:
            faults.add(Row(None, source), "no rows.")


def _reader(source: str) -> Callable[[str, str], Iterator[Row]]:
    if source.startswith(HUB) or _saved(Path(source)):
        return _dataset
    readers = {".txt": _text, ".jsonl": _json_lines, ".jsonl.gz": _json_lines, ".parquet": _parquet}
    return readers[_suffix(Path(source)) or SUFFIXES[0]]


def _text(source: str, column: str) -> Iterator[Row]:
    content = Path(source).read_bytes()
    try:
        yield Row(content.decode("utf-8-sig").replace("\r\n", "\n"), source)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Row(None, f"{source}, line {line}", f"no UTF-8 (byte {content[error.start]:#04x}).")


def _json_lines(source: str, column: str) -> Iterator[Row]:
    number = 0
    try:
        with gzip.open(source) if source.lower().endswith(".gz") else open(source, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _json_row(line, f"{source}, line {number}", column)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        # What follows is lost, so this is never a row to skip.
        raise DataError(f"{source}: damaged after line {number} ({error}). Restore it from a copy.") from error


def _json_row(line: bytes, where: str, column: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Row(None, where, f"no UTF-8 (byte {line[error.start]:#04x}).")
    except (ValueError, RecursionError) as error:
        return Row(None, where, f"no JSON ({error}).")
    if not isinstance(row, dict):
        return Row(None, where, f"a JSON {type(row).__name__}, expected an object with the column {column!r}.")
    if column not in row:
        return Row(None, where, _missing(column, row))
    return Row(row[column], where)


def _parquet(source: str, column: str) -> Iterator[Row]:
    parquet = _optional("pyarrow.parquet")
    from pyarrow.lib import ArrowException

    try:
        file = parquet.ParquetFile(source)
        names = file.schema_arrow.names
        if column not in names:
            raise DataError(f"{source}: {_missing(column, names)}")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0):
                number += 1
                yield _parquet_row(value, f"{source}, row {number}")
    except (ArrowException, OSError) as error:
        raise DataError(f"{source} is damaged or no parquet file ({error}). Restore it from a copy.") from error


def _parquet_row(value: Any, where: str) -> Row:
    try:
        return Row(value.as_py(), where)
    except UnicodeDecodeError as error:
        return Row(None, where, f"no UTF-8 (byte {error.object[error.start]:#04x}).")


def _dataset(source: str, column: str) -> Iterator[Row]:
    datasets = _optional("datasets")
    try:
        if source.startswith(HUB):
            name, _, rest = source.removeprefix(HUB).partition(":")
            config, _, split = rest.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        else:
            loaded = datasets.load_from_disk(source)
            rows = loaded["train"] if isinstance(loaded, dict) else loaded
        for number, row in enumerate(rows, 1):
            where = f"{source}, row {number}"
            yield Row(row[column], where) if column in row else Row(None, where, _missing(column, row))
    except DataError:
        raise
    except Exception as error:
        # The library raises what its back ends raise: connection, HTTP, file and value errors of many packages.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{source} cannot be read: {reason}. Expected {HUB}OWNER/NAME[:CONFIG[:SPLIT]] and a connection to the "
            "Hugging Face hub, or a folder that datasets saved; without a connection, give local files."
        ) from error


def _optional(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"This source needs the package {name.split('.')[0]}: pip install 'mnemic[train]'."
        ) from error


def _missing(column: str, names: Iterable[str]) -> str:
    return f"no column {column!r} (there are: {', '.join(map(str, names)) or 'none'}); name it with --column."


def _saved(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in SAVED)


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((suffix for suffix in reversed(SUFFIXES) if name.endswith(suffix)), None)


def _surrogate(text: str) -> int | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None
