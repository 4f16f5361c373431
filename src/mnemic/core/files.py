"""Files: safetensors with a JSON header, checksummed, written atomically, never unpickled.

One format serves states, streams and memory weights; the header's `kind` tells them apart. The JSON header sits in
the safetensors metadata under "mnemic". Its `checksum` is the SHA-256 of the rest of the header and of every
tensor, so damage anywhere in the file is found when it is read.
"""

import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor

from .errors import FileFormatError, InputError

FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**30
_STALE_SECONDS = 3600


def write_file(path: str | os.PathLike, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and header to `path`: afterwards the file is the new one, or on any failure still the old one.

    Raises:
        InputError: the folder does not exist, cannot be written, or the disk is full.
    """
    stored, metadata = _packed(kind, header, tensors)
    replace_atomically(Path(path), lambda temporary: save_file(stored, temporary, metadata=metadata))


def to_bytes(kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The content of the file that `write_file` would write."""
    return save_bytes(*_packed(kind, header, tensors))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path near `path`, flush the file to disk, and move it into place in one step."""
    folder = path.parent
    prefix = f".{path.name}.tmp-"
    try:
        # A folder, since safetensors writes through a temporary file of its own beside the one it is given.
        room = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    except OSError as error:
        raise InputError(
            f"Cannot write {path}: {error.strerror} ({folder}). Choose a folder that can be written."
        ) from error
    temporary = room / path.name
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"Could not write {path}: {error}. The previous file, if any, is untouched; free some space or choose "
            "another folder."
        ) from error
    finally:
        shutil.rmtree(room, ignore_errors=True)
        _remove_stale(folder, prefix)


def read_file(
    path: str | os.PathLike, kind: str, *, max_bytes: int = MAX_BYTES, device: str | torch.device = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file written by `write_file`.

    Raises:
        FileFormatError: the file is missing, damaged, foreign, too large, of another kind, or of a newer format.
    """
    path = Path(path)
    expected = f"expected a mnemic {kind} file"
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is no file; {expected}.")
    if path.stat().st_size > max_bytes:
        raise FileFormatError(
            f"{path} has {path.stat().st_size:,} bytes, more than the limit of {max_bytes:,}; raise max_bytes if the "
            "file is yours."
        )
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: _own(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise FileFormatError(f"{path} is damaged or no safetensors file ({error}); {expected}.") from error
    return _checked(str(path), kind, metadata, tensors), tensors


def from_bytes(
    data: bytes, kind: str, *, what: str = "The data", max_bytes: int = MAX_BYTES
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of what `to_bytes` made, or of a file's content; `what` names it in errors.

    Raises:
        FileFormatError: damaged, foreign, too large, of another kind, or of a newer format.
    """
    if len(data) > max_bytes:
        raise FileFormatError(f"{what} has {len(data):,} bytes, more than the limit of {max_bytes:,}.")
    try:
        tensors = {name: _own(tensor) for name, tensor in load_bytes(data).items()}
        # The library hands out tensors alone; it has checked the length that comes first.
        described = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = described.get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise FileFormatError(
            f"{what} is damaged or not in the safetensors format ({error}); expected a mnemic {kind}."
        ) from error
    return _checked(what, kind, metadata, tensors), tensors


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory that PyTorch allocated, on which what is computed does not depend on the file.

    The library's tensors lie in the file's mapping (or in its bytes) at whatever offset they have there, and on some
    CPUs MKL's sums depend in their last bit on the alignment of what is added.
    """
    return tensor.clone() if tensor.device.type == "cpu" else tensor


def _packed(
    kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as the format has them."""
    stored = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    full = {**header, "kind": kind, "format_version": FORMAT_VERSION}
    full["checksum"] = _checksum(full, stored)
    # safetensors refuses tensors that share storage; distinct copies keep the format simple.
    return {name: t.clone() for name, t in stored.items()}, {"mnemic": json.dumps(full, sort_keys=True)}


def _checked(path: str, kind: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header, if all is as it was written. Raises `FileFormatError`."""
    expected = f"expected a mnemic {kind} file"
    if "mnemic" not in metadata:
        raise FileFormatError(f"{path} is a safetensors file that mnemic did not write; {expected}.")
    try:
        header = json.loads(metadata["mnemic"])
        # Several spellings of a number are one number: the text is checked, too.
        intact = metadata["mnemic"] == json.dumps(header, sort_keys=True)
        checksum = header.pop("checksum")
        intact &= checksum == _checksum(header, {name: t.cpu() for name, t in tensors.items()})
        version, found = int(header["format_version"]), header["kind"]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FileFormatError(f"The header of {path} is damaged ({error}); restore the file from a copy.") from error
    if not intact:
        raise FileFormatError(f"{path} is damaged: its checksum does not fit its content; restore it from a copy.")
    if version > FORMAT_VERSION:
        raise FileFormatError(
            f"{path} has format version {version}; this release reads up to {FORMAT_VERSION}. "
            "Upgrade mnemic to read it."
        )
    if found != kind:
        raise FileFormatError(f"{path} holds a mnemic {found}; {expected}.")
    return header


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` last."""
    # The rename itself must reach the disk; folders cannot be opened for this on Windows.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_stale(folder: Path, prefix: str) -> None:
    """Temporary folders of savers that were killed; young ones may belong to a saver at work."""
    for leftover in folder.glob(f"{glob.escape(prefix)}*"):
        try:
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover)
        except OSError:
            continue
