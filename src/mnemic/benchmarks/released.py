"""Released JSON lines, one question a line, read as records."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from .task import Record


def released_records(
    name: str, data: str | Path, source: str, make: Callable[[dict[str, Any], str], Record]
) -> Iterator[Record]:
    """Records of the set `name`.

    Args:
        data: its .jsonl, or the folder with it. source: what to download, and from where.
        make: a line, and how messages name it -> its record.

    Raises:
        DataError: no such file, or another format.
    """
    path = Path(data) / f"{name}.jsonl" if Path(data).is_dir() else Path(data)
    if not path.is_file():
        raise DataError(f"{path} does not exist. Download it from {source} and give its path.")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = make(json.loads(line), where)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise DataError(f"{where}: {error!r}; expected {source}.") from error
            yield record
