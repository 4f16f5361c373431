"""The store of one process: records in SQLite, states in files beside it.

A state is on the disk before the record that names it, and a record is gone before its file is: a crash in between
leaves a file that no record names, and the next start removes it.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from sqlite3 import Connection
from typing import TypeVar

from ...core.files import flush_folder
from ..errors import SessionDamaged, StoreUnavailable
from . import checks
from .folders import claimed, opening
from .interface import KEEP, AuditEntry, Commit, Lease, SessionRecord, Usage
from .leases import Leases
from .records import Records, Unsettled
from .reserve import Reserve
from .session_rows import append, commits_of, drop, find, insert, listed, usage_of, version_of
from .states import StateFiles, digest_of

Result = TypeVar("Result")


class EmbeddedStore:
    """Sessions in a folder on a local disk; see `SessionStore` for the methods.

    Leases live in memory: the folder belongs to one process at a time, and ends with it. A deleted session's bytes are
    gone from every file; what the disk underneath keeps of removed files is not the store's.

    Args:
        folder: made where there is none.
        keep: versions of each session that are kept.

    Raises:
        StoreUnavailable: another process has it, it cannot be written, or its database is damaged or missing.
        FileFormatError: its database is of another program or a newer version.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = KEEP):
        self.keep = checks.checked_keep(keep)
        folder = Path(folder)
        self._lock = claimed(folder)
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.release)
            self._states = StateFiles(folder / "states")
            self._records = Records(folder / "sessions.db", may_be_new=next(self._states.names(), None) is None)
            undo.callback(self._records.close)
            self._leases = Leases()
            # Names of states that go with the next success: nobody knows yet whether a record of theirs is on the disk,
            # or the disk would not remove them.
            self._doubtful: list[str] = []
            self._sweep()
            self._reserve = Reserve(folder / "reserve")
            self._reserve.fill()
            with opening(folder):
                flush_folder(folder)
            undo.pop_all()

    # Records

    def create(
        self,
        tenant: str,
        *,
        session_id: str | None = None,
        ttl: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SessionRecord:
        checks.check_tenant(tenant)
        checks.check_ttl(ttl)
        session_id, packed = checks.new_session_id(session_id), checks.packed_metadata(metadata)
        with self._changing() as db:
            return insert(db, tenant, session_id, ttl, packed)[0]

    def get(self, tenant: str, session_id: str) -> SessionRecord:
        with self._records.reading() as db:
            return find(db, tenant, session_id)[0]

    def sessions(self, tenant: str, *, after: str | None = None, limit: int = 100) -> list[SessionRecord]:
        checks.check_tenant(tenant)
        checks.check_count("limit", limit, 1, checks.MAX_LIST)
        with self._records.reading() as db:
            return listed(db, tenant, after, limit)

    def usage(self, tenant: str) -> Usage:
        checks.check_tenant(tenant)
        with self._records.reading() as db:
            return usage_of(db, tenant)

    # States

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
        checks.check_commit(expected, state, tokens_seen, note)
        # Asked before the disk is: a state may be large.
        with self._records.reading() as db:
            self._may_change(db, tenant, session_id, lease, expected)
        name, digest = self._states.write(state), digest_of(state)
        with self._naming([name]), self._changing() as db:
            record, number, ttl = self._may_change(db, tenant, session_id, lease, expected)
            row = (tokens_seen, record.turns + 1, len(state), note, name, digest)
            record, old = append(db, record, number, ttl, row, self.keep)
        self._forget(old)
        return record

    def load(self, tenant: str, session_id: str, version: int | None = None) -> tuple[SessionRecord, bytes]:
        checks.check_version(version)
        for last in (False, False, True):
            with self._records.reading() as db:
                record, number, _ = find(db, tenant, session_id)
                row = version_of(db, record, number, version, self.keep)
            if row is None:
                return record, b""
            _, _, size, _, name, digest = row
            what = f"The state of session {session_id}, version {version or record.version},"
            try:
                return record, self._states.read(name, size, digest, what)
            except FileNotFoundError as error:
                # A newer commit may have taken its place since the record was read.
                if last:
                    raise SessionDamaged(f"{what} is missing; roll back to another version.") from error
        raise AssertionError

    def commits(self, tenant: str, session_id: str) -> list[Commit]:
        with self._records.reading() as db:
            return commits_of(db, find(db, tenant, session_id)[1])

    def rollback(self, tenant: str, session_id: str, version: int, *, lease: Lease | None = None) -> SessionRecord:
        checks.check_count("version", version)
        names: list[str] = []
        with self._naming(names), self._changing() as db:
            record, number, ttl = self._may_change(db, tenant, session_id, lease)
            row = version_of(db, record, number, version, self.keep)
            if row is None:
                raise checks.not_kept(session_id, version, self.keep)
            tokens_seen, turns, size, _, name, digest = row
            names.append(self._states.again(name))
            row = (tokens_seen, turns, size, f"rollback to {version}", names[0], digest)
            record, old = append(db, record, number, ttl, row, self.keep)
        self._forget(old)
        return record

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
        checks.check_version(version)
        checks.check_ttl(ttl)
        new_id, packed = checks.new_session_id(new_id), checks.packed_metadata(metadata)
        names: list[str] = []
        with self._naming(names), self._changing() as db:
            parent, number, _ = find(db, tenant, session_id)
            row = version_of(db, parent, number, version, self.keep)
            record, number = insert(db, tenant, new_id, ttl, packed, parent.id)
            if row is not None:
                tokens_seen, turns, size, _, name, digest = row
                names.append(self._states.again(name))
                note = f"fork of {parent.id}, version {version or parent.version}"
                record, _ = append(
                    db, record, number, ttl, (tokens_seen, turns, size, note, names[0], digest), self.keep
                )
        return record

    # Ends

    def delete(self, tenant: str, session_id: str) -> None:
        self._erase(self._freeing(lambda: self._delete(tenant, session_id)))

    def expire(self, now: float) -> int:
        count, names = self._freeing(lambda: self._expire(now))
        if count:
            self._erase(names)
        return count

    def _delete(self, tenant: str, session_id: str) -> list[str]:
        # Under one lock: the next session of this name has leases of its own.
        with self._records.lock:
            with self._changing() as db:
                names = drop(db, find(db, tenant, session_id)[1])
            self._leases.drop(tenant, session_id)
        return names

    def _expire(self, now: float) -> tuple[int, list[str]]:
        names: list[str] = []
        count = 0
        with self._changing() as db:
            rows = db.execute("SELECT number, tenant, id FROM sessions WHERE expires <= ?", (now,)).fetchall()
            for number, tenant, session_id in rows:
                if self._leases.holder(tenant, session_id) is None:
                    names += drop(db, number)
                    count += 1
        return count, names

    def _freeing(self, work: Callable[[], Result]) -> Result:
        """Deleting needs room too, for the records of it."""
        try:
            return work()
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, sqlite3.Error) or not self._reserve.give_up():
                raise
            return work()
        finally:
            self._reserve.fill()

    def _erase(self, names: list[str]) -> None:
        self._forget(names, durably=True)
        self._freeing(self._records.scrub)

    # Leases

    def acquire(self, tenant: str, session_id: str, owner: str, seconds: float) -> Lease:
        checks.check_text("owner", owner, 128, 1)
        checks.check_seconds("seconds", seconds)
        with self._records.reading() as db:
            find(db, tenant, session_id)
            return self._leases.take(tenant, session_id, owner, seconds)

    def renew(self, lease: Lease, seconds: float) -> Lease:
        checks.check_seconds("seconds", seconds)
        with self._records.reading():
            return self._leases.renew(lease, seconds)

    def release(self, lease: Lease) -> None:
        with self._records.reading():
            self._leases.release(lease)

    # Audit

    def audit(self, tenant: str, action: str, session_id: str | None = None, detail: str = "") -> None:
        checks.check_tenant(tenant)
        checks.check_audit(action, session_id, detail)
        with self._changing() as db:
            db.execute(
                "INSERT INTO audit (at, tenant, action, session_id, detail) VALUES (?, ?, ?, ?, ?)",
                (time.time(), tenant, action, session_id, detail),
            )

    def audited(self, tenant: str, *, limit: int = 100) -> list[AuditEntry]:
        checks.check_tenant(tenant)
        checks.check_count("limit", limit, 1, checks.MAX_LIST)
        with self._records.reading() as db:
            rows = db.execute(
                "SELECT at, action, session_id, detail FROM audit WHERE tenant = ? ORDER BY number DESC LIMIT ?",
                (tenant, limit),
            ).fetchall()
        return [AuditEntry(at=a, action=b, session_id=c, detail=d) for a, b, c, d in rows]

    def close(self) -> None:
        try:
            self._records.close()
        finally:
            self._lock.release()

    # Inside

    def _may_change(
        self, db: Connection, tenant: str, session_id: str, lease: Lease | None, expected: int | None = None
    ) -> tuple[SessionRecord, int, float | None]:
        record, number, ttl = find(db, tenant, session_id)
        self._leases.check(tenant, session_id, lease)
        if expected is not None:
            checks.check_expected(session_id, record.version, expected)
        return record, number, ttl

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Connection]:
        with self._records.lock:
            with self._records.transaction() as db:
                before = db.total_changes
                yield db
                changed = db.total_changes > before
            names: list[str] = []
            if changed:
                # What was written has taken the place of whatever failed before.
                names, self._doubtful = self._doubtful, []
        self._forget(names)

    @contextlib.contextmanager
    def _naming(self, names: list[str]) -> Iterator[None]:
        """Around a transaction that names new states: they go where it fails."""
        try:
            yield
        except Unsettled:
            with self._records.lock:
                self._doubtful += names
            raise
        except BaseException:
            with contextlib.suppress(StoreUnavailable):
                self._states.remove(names)
            raise

    def _forget(self, names: list[str], durably: bool = False) -> None:
        """Remove states that no record names. Raises `StoreUnavailable` where it must be durable and is not."""
        try:
            self._states.remove(names, durably=durably)
        except StoreUnavailable:
            with self._records.lock:
                self._doubtful += names
            if durably:
                raise

    def _sweep(self) -> None:
        with self._records.reading() as db:
            named = {name for (name,) in db.execute("SELECT name FROM commits")}
        self._states.remove([name for name in self._states.names() if name not in named])
