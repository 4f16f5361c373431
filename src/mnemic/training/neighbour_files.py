"""The folder of neighbour targets: raw arrays and a header that names their types, shapes and checksums."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import FileFormatError

FORMAT_VERSION = 1


def read_header(folder: Path) -> dict[str, Any]:
    """The header of an intact folder. Everything but the keys is read once and compared with its checksum.

    Raises:
        FileFormatError: missing, half written, damaged, foreign, or of a newer format.
    """
    if not folder.is_dir():
        raise FileFormatError(f"{folder} is no folder; expected one written by NeighbourTargets.build.")
    if not (folder / "header.json").is_file():
        raise FileFormatError(f"{folder} has no header.json: half written, or no neighbour targets; build it anew.")
    try:
        header = json.loads((folder / "header.json").read_text())
        if header["kind"] != "neighbour targets":
            raise FileFormatError(f"{folder} holds {header['kind']}; expected neighbour targets.")
        version, intact = int(header["format_version"]), header.pop("checksum") == checksum(header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{folder}/header.json is damaged or foreign ({error}); build it anew.") from error
    if version > FORMAT_VERSION:
        raise FileFormatError(
            f"The neighbour targets in {folder} have format version {version}; this release reads up to "
            f"{FORMAT_VERSION}."
        )
    if not intact:
        raise FileFormatError(f"{folder}/header.json is damaged: its checksum does not fit; build it anew.")
    for name, array in header["arrays"].items():
        path, size = folder / f"{name}.bin", int(np.prod(array["shape"])) * np.dtype(array["dtype"]).itemsize
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise FileFormatError(f"{path} has {found:,} bytes of {size:,}: half written or damaged; build it anew.")
        if array["crc32"] is not None and array["crc32"] != crc32_of(path):
            raise FileFormatError(f"{path} is damaged: its checksum does not fit; build it anew.")
    return header


def write_array(room: Path, header: dict[str, Any], name: str, array: np.ndarray) -> None:
    """`array` as `name`.bin in `room`, entered in the header."""
    array.tofile(room / f"{name}.bin")
    crc32 = crc32_of(room / f"{name}.bin")
    header["arrays"][name] = {"dtype": array.dtype.name, "shape": list(array.shape), "crc32": crc32}


def crc32_of(path: Path) -> int:
    """Checksum of a file."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            value = zlib.crc32(chunk, value)
    return value


def checksum(header: dict[str, Any]) -> str:
    """SHA-256 of a header without its checksum."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
