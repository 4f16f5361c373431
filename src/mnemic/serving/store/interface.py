"""What a session store is: records of conversations, the last versions of each one's state, leases, and an audit log.

Stores block, may be called from any thread, and know no model: a state is bytes. Every call names the tenant, and a
session of another tenant does not exist: it is not found, as one that never was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

KEEP = 8


@dataclass(frozen=True, kw_only=True)
class SessionRecord:
    """One session. Times are seconds since 1970.

    used: when it was made or last changed. expires: from when `expire` removes it, `ttl` seconds after `used`; None for
    never. version: of the newest state, 0 before the first. turns: commits so far, less those that were rolled back.
    tokens_seen, state_bytes: of the newest state. parent: the session that it was forked from.
    """

    id: str
    tenant: str
    created: float
    used: float
    expires: float | None
    version: int
    turns: int
    tokens_seen: int
    state_bytes: int
    parent: str | None
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One version that is kept."""

    version: int
    created: float
    tokens_seen: int
    bytes: int
    note: str


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to change one session. token: made anew each time; what a commit is checked against. seconds: for how
    long it holds from when it was given or renewed; afterwards anybody may take it over."""

    tenant: str
    session_id: str
    owner: str
    token: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a tenant has stored. bytes: of every version kept."""

    sessions: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    at: float
    action: str
    session_id: str | None
    detail: str


class SessionStore(Protocol):
    """Every call raises `StoreUnavailable` where the store fails. Then nothing was changed, except where only the
    confirmation got lost: read the record again. A session that was found before and is not found then was deleted."""

    def create(
        self,
        tenant: str,
        *,
        session_id: str | None = None,
        ttl: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SessionRecord:
        """A session without state. ttl: seconds without a change after which it expires.

        Raises:
            InvalidRequest: the id is taken or not 1 to 128 letters, digits and `_ . -` (no dot first), or the others
                cannot be used.
        """
        ...

    def get(self, tenant: str, session_id: str) -> SessionRecord:
        """Raises `SessionNotFound`."""
        ...

    def sessions(self, tenant: str, *, after: str | None = None, limit: int = 100) -> list[SessionRecord]:
        """Newest first; `after`: those that come behind this one.

        Raises:
            InvalidRequest: no such session to start after, or a limit below 1 or above 1000.
        """
        ...

    def commit(
        self,
        tenant: str,
        session_id: str,
        *,
        expected: int,
        state: bytes,
        tokens_seen: int,
        note: str = "",
        lease: Lease | None = None,
    ) -> SessionRecord:
        """Make `state` the session's next version; it is durable when this returns. The newest `keep` versions stay.
        note: why, in the program's words; no user's text.

        Raises:
            SessionNotFound: no such session, or deleted meanwhile.
            VersionConflict: its version is not `expected`.
            SessionBusy: `lease` was released or taken over; or none is given, and somebody holds one.
        """
        ...

    def load(self, tenant: str, session_id: str, version: int | None = None) -> tuple[SessionRecord, bytes]:
        """The record, and the state of its newest or the given version; no bytes where nothing was committed yet.

        Raises:
            SessionNotFound: no such session.
            InvalidRequest: the version is not kept, `param` "version".
            SessionDamaged: the state is not what was written; other versions and sessions can still be read.
        """
        ...

    def commits(self, tenant: str, session_id: str) -> list[Commit]:
        """The versions kept, newest first. Raises `SessionNotFound`."""
        ...

    def rollback(self, tenant: str, session_id: str, version: int, *, lease: Lease | None = None) -> SessionRecord:
        """A new version with the state of an older one. Raises as `load`, without looking at the bytes, and
        as `commit`."""
        ...

    def fork(
        self,
        tenant: str,
        session_id: str,
        version: int | None = None,
        *,
        new_id: str | None = None,
        ttl: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SessionRecord:
        """A new session of the same tenant that starts with this state as version 1. Raises as `load` and `create`."""
        ...

    def delete(self, tenant: str, session_id: str) -> None:
        """Remove the record and every version's bytes, whoever holds a lease. Raises `SessionNotFound`."""
        ...

    def expire(self, now: float) -> int:
        """Delete the sessions of all tenants whose time is over and that nobody has leased. Returns how many."""
        ...

    def usage(self, tenant: str) -> Usage: ...

    def acquire(self, tenant: str, session_id: str, owner: str, seconds: float) -> Lease:
        """Take the session, or take it over where the last lease has run out.

        Raises:
            SessionNotFound: no such session.
            SessionBusy: it is leased, by this owner or another.
        """
        ...

    def renew(self, lease: Lease, seconds: float) -> Lease:
        """From now on for `seconds`, also where it has run out and nobody has taken it over.

        Raises:
            SessionBusy: it was taken over or released, or the session is gone.
        """
        ...

    def release(self, lease: Lease) -> None:
        """Give the session free; nothing happens where the lease is no longer held."""
        ...

    def audit(self, tenant: str, action: str, session_id: str | None = None, detail: str = "") -> None:
        """Add a line to the log. It outlives the session: no user's text belongs into it."""
        ...

    def audited(self, tenant: str, *, limit: int = 100) -> list[AuditEntry]:
        """The last lines of a tenant's log, newest first."""
        ...

    def close(self) -> None:
        """Afterwards every call raises `StoreUnavailable`. Closing twice is no error."""
        ...
