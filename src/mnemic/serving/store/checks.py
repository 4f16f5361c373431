"""Checks of what callers hand to a store, before any of it reaches a file or a database."""

import json
import math
import re
import uuid
from collections.abc import Mapping
from typing import Any

from ...core.errors import ConfigError
from ..errors import InvalidRequest, SessionDamaged, SessionNotFound, VersionConflict
from .interface import SessionRecord

MAX_METADATA = 16_384
MAX_LIST = 1000

# No file is ever named after an id; the pattern also keeps ids fit for addresses and logs.
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}", re.ASCII)


def new_session_id(given: str | None) -> str:
    if given is None:
        return uuid.uuid4().hex
    if not is_session_id(given):
        raise InvalidRequest(
            f"session id {_shown(given)}: expected 1 to 128 letters, digits and _ . - (no dot first).",
            param="session_id",
        )
    return given


def is_session_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def check_session_id(value: Any) -> None:
    """What is no id is the id of no session. Raises `SessionNotFound`."""
    if not is_session_id(value):
        raise not_found(value)


def check_text(name: str, value: Any, most: int, least: int = 0) -> None:
    """Raises `InvalidRequest`: no string, too long, or what not every database can hold."""
    if not isinstance(value, str) or not least <= len(value) <= most or "\0" in value or not _encodable(value):
        raise InvalidRequest(
            f"{name} = {_shown(value)}, expected {least} to {most} characters, none of them NUL.", param=name
        )


def check_tenant(value: Any) -> None:
    check_text("tenant", value, 128, 1)


def packed_metadata(metadata: Mapping[str, str] | None) -> str:
    """As JSON. Raises `InvalidRequest`."""
    if not isinstance(metadata := {} if metadata is None else metadata, Mapping):
        raise InvalidRequest("metadata: expected an object of strings.", param="metadata")
    for key, value in metadata.items():
        if not all(isinstance(part, str) and "\0" not in part and _encodable(part) for part in (key, value)):
            raise InvalidRequest("metadata: expected an object of strings without NUL.", param="metadata")
    text = json.dumps(dict(metadata), ensure_ascii=False)
    if (size := len(text.encode())) > MAX_METADATA:
        raise InvalidRequest(
            f"metadata has {size:,} bytes as JSON, expected at most {MAX_METADATA:,}.", param="metadata"
        )
    return text


def check_seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not value > 0:
        raise InvalidRequest(f"{name} = {_shown(value)}, expected seconds above 0.", param=name)


def check_ttl(value: Any) -> None:
    if value is not None:
        check_seconds("ttl", value)


def check_count(name: str, value: Any, low: int = 0, high: int = 2**62) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{name} = {_shown(value)}, expected an integer from {low} to {high}.", param=name)


def checked_keep(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"keep = {_shown(value)}, expected an integer of at least 1.")
    return value


def check_version(value: Any) -> None:
    if value is not None:
        check_count("version", value)


def check_commit(expected: Any, state: Any, tokens_seen: Any, note: Any) -> None:
    check_count("expected", expected)
    check_count("tokens_seen", tokens_seen)
    check_text("note", note, 1024)
    if not isinstance(state, bytes | bytearray | memoryview) or not len(state):
        raise InvalidRequest("state: expected bytes, at least one.", param="state")


def check_expected(session_id: str, version: int, expected: int) -> None:
    if version != expected:
        raise VersionConflict(
            f"Session {session_id} is at version {version}, not at {expected}: load it again and repeat the turn."
        )


def check_audit(action: Any, session_id: Any, detail: Any) -> None:
    check_text("action", action, 64, 1)
    check_text("detail", detail, 4096)
    if session_id is not None:
        check_text("session_id", session_id, 128)


def not_found(session_id: Any) -> SessionNotFound:
    return SessionNotFound(f"No session is called {_shown(session_id)}.")


def id_taken(session_id: str) -> InvalidRequest:
    return InvalidRequest(f"There is a session {session_id} already: choose another id.", param="session_id")


def not_kept(session_id: str, version: int, keep: int) -> InvalidRequest:
    return InvalidRequest(
        f"Session {session_id} has no version {version}: the newest {keep} are kept, see its commits.", param="version"
    )


def unknown_after(session_id: Any) -> InvalidRequest:
    return InvalidRequest(
        f"after = {_shown(session_id)} is no session (it may be deleted): begin at the start.", param="after"
    )


def record_of(row: Any) -> SessionRecord:
    """From the columns `RECORD`, in their order. Raises `SessionDamaged`."""
    *fields, packed = row
    try:
        metadata = json.loads(packed)
    except ValueError as error:
        raise SessionDamaged(f"The metadata of session {_shown(row[0])} is damaged: restore a copy.") from error
    return SessionRecord(**dict(zip(_FIELDS, fields, strict=True)), metadata=metadata)


_FIELDS = (
    "id",
    "tenant",
    "created",
    "used",
    "expires",
    "version",
    "turns",
    "tokens_seen",
    "state_bytes",
    "parent",
)
RECORD = ", ".join((*_FIELDS, "metadata"))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = ascii(value) if isinstance(value, str | int | float | bytes | None) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
