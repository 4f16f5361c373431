"""Headers of the files that a store keeps: JSON with the kind, the version of the format and a checksum of itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..core.errors import FileFormatError

FORMAT_VERSION = 1


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_text(kind: str, header: dict[str, Any]) -> str:
    """What `read_header` reads back."""
    full = {**header, "kind": kind, "format_version": FORMAT_VERSION}
    full["checksum"] = hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()
    return json.dumps(full, indent=1, sort_keys=True)


def read_header(path: Path, kind: str, way_out: str) -> dict[str, Any]:
    """The header in `path`.

    Raises:
        FileFormatError: damaged, of another kind or a newer format; `way_out` says what to do about damage.
    """
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        checksum = header.pop("checksum")
        intact = checksum == hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
        found, version = header["kind"], int(header["format_version"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged or no header of a {kind} ({error!r}); {way_out}.") from error
    if not intact:
        raise FileFormatError(f"{path} is damaged: its checksum does not fit its content; {way_out}.")
    if version > FORMAT_VERSION:
        raise FileFormatError(
            f"{path} has format version {version}; this release reads up to {FORMAT_VERSION}. Upgrade mnemic."
        )
    if found != kind:
        raise FileFormatError(f"{path} is the header of a {found}; expected a {kind}.")
    return header
