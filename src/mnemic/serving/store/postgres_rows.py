"""Rows of sessions, versions and states, in PostgreSQL. Each function runs inside a transaction of its caller."""

from dataclasses import dataclass
from typing import Any

from . import checks
from .interface import Commit, Lease, SessionRecord

NOW = "extract(epoch FROM clock_timestamp())::float8"
# A state is stored in parts: one value takes at most 1 GiB, and is held in memory several times on its way.
PART = 16 * 2**20

# Of a version: tokens_seen, turns, bytes, note, digest.
Version = tuple[int, int, int, str, bytes]


@dataclass(frozen=True)
class Row:
    """leased: by anybody, now."""

    record: SessionRecord
    number: int
    lease_token: str | None
    leased: bool


def find(db: Any, tenant: Any, session_id: Any, lock: bool = False) -> Row:
    """Raises `SessionNotFound`."""
    checks.check_tenant(tenant)
    checks.check_session_id(session_id)
    row = db.execute(
        f"SELECT {checks.RECORD}, number, lease_token, coalesce(lease_until > {NOW}, false) FROM mnemic_sessions "
        f"WHERE tenant = %s AND id = %s {'FOR UPDATE' if lock else ''}",
        (tenant, session_id),
    ).fetchone()
    if row is None:
        raise checks.not_found(session_id)
    *record, number, token, leased = row
    return Row(checks.record_of(record), number, token, leased)


def insert(
    db: Any, tenant: str, session_id: str, ttl: float | None, metadata: str, parent: str | None = None
) -> tuple[SessionRecord, int]:
    """Record and number. Raises `InvalidRequest`: the id is taken."""
    row = db.execute(
        "INSERT INTO mnemic_sessions (tenant, id, created, used, ttl, expires, version, turns, tokens_seen, "
        "state_bytes, parent, metadata) SELECT %(tenant)s, %(id)s, now, now, %(ttl)s::float8, now + %(ttl)s::float8, "
        f"0, 0, 0, 0, %(parent)s::text, %(metadata)s FROM (SELECT {NOW} AS now) AS clock ON CONFLICT DO NOTHING "
        f"RETURNING {checks.RECORD}, number",
        {"tenant": tenant, "id": session_id, "ttl": ttl, "parent": parent, "metadata": metadata},
    ).fetchone()
    if row is None:
        raise checks.id_taken(session_id)
    return checks.record_of(row[:-1]), row[-1]


def listed(db: Any, tenant: str, after: Any, limit: int) -> list[SessionRecord]:
    where, values = "tenant = %s", [tenant]
    if after is not None:
        found = (
            checks.is_session_id(after)
            and db.execute(
                "SELECT created, number FROM mnemic_sessions WHERE tenant = %s AND id = %s", (tenant, after)
            ).fetchone()
        )
        if not found:
            raise checks.unknown_after(after)
        where, values = f"{where} AND (created, number) < (%s, %s)", [tenant, *found]
    rows = db.execute(
        f"SELECT {checks.RECORD} FROM mnemic_sessions WHERE {where} ORDER BY created DESC, number DESC LIMIT %s",
        (*values, limit),
    ).fetchall()
    return [checks.record_of(row) for row in rows]


def version_of(db: Any, row: Row, version: int | None, keep: int) -> Version | None:
    """A version, by default the newest; None where nothing was committed. Raises `InvalidRequest`: not kept."""
    wanted = row.record.version if version is None else version
    if wanted == row.record.version == 0:
        return None
    found = db.execute(
        "SELECT tokens_seen, turns, bytes, note, digest FROM mnemic_commits WHERE session = %s AND version = %s",
        (row.number, wanted),
    ).fetchone()
    if found is None:
        raise checks.not_kept(row.record.id, wanted, keep)
    return found


def append(db: Any, row: Row, version: Version, keep: int) -> SessionRecord:
    """Add a version; its bytes come separately, in the same transaction."""
    tokens_seen, turns, size, _, _ = version
    number = row.record.version + 1
    changed = db.execute(
        "UPDATE mnemic_sessions SET used = now, expires = now + ttl, version = %s, turns = %s, tokens_seen = %s, "
        f"state_bytes = %s FROM (SELECT greatest({NOW}, %s) AS now) AS clock WHERE number = %s "
        f"RETURNING {checks.RECORD}",
        (number, turns, tokens_seen, size, row.record.used, row.number),
    ).fetchall()[0]
    record = checks.record_of(changed)
    db.execute(
        "INSERT INTO mnemic_commits (session, version, created, tokens_seen, turns, bytes, note, digest) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
        (row.number, number, record.used, *version),
    )
    db.execute("DELETE FROM mnemic_commits WHERE session = %s AND version <= %s", (row.number, number - keep))
    return record


def commits_of(db: Any, number: int) -> list[Commit]:
    rows = db.execute(
        "SELECT version, created, tokens_seen, bytes, note FROM mnemic_commits WHERE session = %s "
        "ORDER BY version DESC",
        (number,),
    ).fetchall()
    return [Commit(version=v, created=c, tokens_seen=t, bytes=b, note=n) for v, c, t, b, n in rows]


def write_state(db: Any, number: int, version: int, state: bytes) -> None:
    view = memoryview(state).cast("B")
    for part, start in enumerate(range(0, len(view), PART)):
        db.execute(
            "INSERT INTO mnemic_states VALUES (%s, %s, %s, %b)", (number, version, part, view[start : start + PART])
        )


def copy_state(db: Any, number: int, version: int, to: int, to_version: int) -> None:
    db.execute(
        "INSERT INTO mnemic_states SELECT %s, %s, part, data FROM mnemic_states WHERE session = %s AND version = %s",
        (to, to_version, number, version),
    )


def read_state(db: Any, number: int, version: int) -> bytes:
    """What is there: the caller compares it with the digest."""
    parts: list[bytes] = []
    while True:
        row = db.execute(
            "SELECT data FROM mnemic_states WHERE session = %s AND version = %s AND part = %s",
            (number, version, len(parts)),
            binary=True,
        ).fetchone()
        if row is None:
            return b"".join(parts)
        parts.append(row[0])


def find_leased(db: Any, lease: Lease) -> int | None:
    """Number of the session, locked, if `lease` is the last one."""
    row = db.execute(
        "SELECT number FROM mnemic_sessions WHERE tenant = %s AND id = %s AND lease_token = %s FOR UPDATE",
        (lease.tenant, lease.session_id, lease.token),
    ).fetchone()
    return None if row is None else row[0]


def set_lease(db: Any, number: int, lease: Lease | None) -> None:
    values = (None, None, None) if lease is None else (lease.token, lease.owner, lease.seconds)
    db.execute(
        f"UPDATE mnemic_sessions SET lease_token = %s, lease_owner = %s, lease_until = {NOW} + %s::float8 "
        "WHERE number = %s",
        (*values, number),
    )
