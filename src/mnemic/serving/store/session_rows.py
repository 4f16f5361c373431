"""Rows of sessions and their versions, in SQLite. Each function runs inside a transaction of its caller."""

import time
from sqlite3 import Connection, IntegrityError
from typing import Any

from . import checks
from .interface import Commit, SessionRecord, Usage

# Of a version: tokens_seen, turns, bytes, note, name, digest.
Version = tuple[int, int, int, str, str, bytes]


def find(db: Connection, tenant: Any, session_id: Any) -> tuple[SessionRecord, int, float | None]:
    """Record, number and ttl. Raises `SessionNotFound`."""
    checks.check_tenant(tenant)
    checks.check_session_id(session_id)
    row = db.execute(
        f"SELECT {checks.RECORD}, number, ttl FROM sessions WHERE tenant = ? AND id = ?", (tenant, session_id)
    ).fetchone()
    if row is None:
        raise checks.not_found(session_id)
    *record, number, ttl = row
    return checks.record_of(record), number, ttl


def insert(
    db: Connection, tenant: str, session_id: str, ttl: float | None, metadata: str, parent: str | None = None
) -> tuple[SessionRecord, int]:
    """Record and number. Raises `InvalidRequest`: the id is taken."""
    now = time.time()
    try:
        row = db.execute(
            "INSERT INTO sessions (tenant, id, created, used, ttl, expires, version, turns, tokens_seen, state_bytes, "
            f"parent, metadata) VALUES (?, ?, ?, ?, ?, ?, 0, 0, 0, 0, ?, ?) RETURNING {checks.RECORD}, number",
            (tenant, session_id, now, now, ttl, _end(now, ttl), parent, metadata),
        ).fetchall()[0]
    except IntegrityError as error:
        raise checks.id_taken(session_id) from error
    return checks.record_of(row[:-1]), row[-1]


def listed(db: Connection, tenant: str, after: Any, limit: int) -> list[SessionRecord]:
    where, values = "tenant = ?", [tenant]
    if after is not None:
        found = (
            checks.is_session_id(after)
            and db.execute(
                "SELECT created, number FROM sessions WHERE tenant = ? AND id = ?", (tenant, after)
            ).fetchone()
        )
        if not found:
            raise checks.unknown_after(after)
        where, values = f"{where} AND (created, number) < (?, ?)", [tenant, *found]
    rows = db.execute(
        f"SELECT {checks.RECORD} FROM sessions WHERE {where} ORDER BY created DESC, number DESC LIMIT ?",
        (*values, limit),
    ).fetchall()
    return [checks.record_of(row) for row in rows]


def usage_of(db: Connection, tenant: str) -> Usage:
    sessions = db.execute("SELECT count(*) FROM sessions WHERE tenant = ?", (tenant,)).fetchone()[0]
    stored = db.execute(
        "SELECT coalesce(sum(bytes), 0) FROM commits JOIN sessions ON number = session WHERE tenant = ?", (tenant,)
    ).fetchone()[0]
    return Usage(sessions=sessions, bytes=stored)


def commits_of(db: Connection, number: int) -> list[Commit]:
    rows = db.execute(
        "SELECT version, created, tokens_seen, bytes, note FROM commits WHERE session = ? ORDER BY version DESC",
        (number,),
    ).fetchall()
    return [Commit(version=v, created=c, tokens_seen=t, bytes=b, note=n) for v, c, t, b, n in rows]


def version_of(db: Connection, record: SessionRecord, number: int, version: int | None, keep: int) -> Version | None:
    """A version, by default the newest; None where nothing was committed. Raises `InvalidRequest`: not kept."""
    wanted = record.version if version is None else version
    if wanted == record.version == 0:
        return None
    row = db.execute(
        "SELECT tokens_seen, turns, bytes, note, name, digest FROM commits WHERE session = ? AND version = ?",
        (number, wanted),
    ).fetchone()
    if row is None:
        raise checks.not_kept(record.id, wanted, keep)
    return row


def append(
    db: Connection, record: SessionRecord, number: int, ttl: float | None, row: Version, keep: int
) -> tuple[SessionRecord, list[str]]:
    """Add a version. Returns the record, and the names of the states that are kept no longer."""
    tokens_seen, turns, size, *_ = row
    # Clocks are set back at times; what is newer must not look older.
    now, version = max(time.time(), record.used), record.version + 1
    db.execute("INSERT INTO commits VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (number, version, now, *row))
    changed = db.execute(
        "UPDATE sessions SET used = ?, expires = ?, version = ?, turns = ?, tokens_seen = ?, state_bytes = ? "
        f"WHERE number = ? RETURNING {checks.RECORD}",
        (now, _end(now, ttl), version, turns, tokens_seen, size, number),
    ).fetchall()[0]
    old = db.execute(
        "DELETE FROM commits WHERE session = ? AND version <= ? RETURNING name", (number, version - keep)
    ).fetchall()
    return checks.record_of(changed), [name for (name,) in old]


def drop(db: Connection, number: int) -> list[str]:
    """Remove a session. Returns the names of its states."""
    names = db.execute("SELECT name FROM commits WHERE session = ?", (number,)).fetchall()
    db.execute("DELETE FROM sessions WHERE number = ?", (number,))
    return [name for (name,) in names]


def _end(now: float, ttl: float | None) -> float | None:
    return None if ttl is None else now + ttl
