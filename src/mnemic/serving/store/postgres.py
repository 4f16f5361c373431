"""The store of many machines: records, states and leases in PostgreSQL."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ...core.errors import ConfigError, MissingExtraError
from ..errors import ServingError, SessionBusy, StoreUnavailable
from . import checks, postgres_rows
from .interface import KEEP, AuditEntry, Commit, Lease, SessionRecord, Usage
from .leases import busy, lost, new_lease, renewed
from .postgres_rows import append, find, insert, read_state, version_of, write_state
from .postgres_tables import prepare
from .states import check_state, digest_of

try:
    import psycopg
    from psycopg import IsolationLevel
    from psycopg.conninfo import conninfo_to_dict
    from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests
except ImportError as error:
    raise MissingExtraError(
        "A store in PostgreSQL needs psycopg with its pool: pip install 'mnemic[serve-postgres]'."
    ) from error


class PostgresStore:
    """Sessions in a PostgreSQL database that any number of processes share; see `SessionStore` for the methods.

    Times are those of the database's clock. A deleted session can be read by nobody from then on; its bytes leave the
    server's files as PostgreSQL cleans them (VACUUM FULL at once, otherwise as new rows take their place, and the
    write-ahead log as it is recycled). Where that is too late, encrypt the store.

    Args:
        url: `postgresql://...`; tables are made in the first schema of its search path.
        keep: versions of each session that are kept.
        connections: at most.
        wait: seconds for a connection, or for a row that somebody else is writing.

    Raises:
        StoreUnavailable: the database does not answer.
        FileFormatError: its tables are of a newer version.
        ConfigError: an address or a number that cannot be used.
    """

    def __init__(self, url: str, *, keep: int = KEEP, connections: int = 8, wait: float = 10.0):
        self.keep = checks.checked_keep(keep)
        try:
            conninfo_to_dict(url)
        except psycopg.Error:
            # Not as the cause: it quotes the address, password and all.
            raise ConfigError(
                "store: the address cannot be read; expected postgresql://user:password@machine/database."
            ) from None

        def configure(db: psycopg.Connection) -> None:
            db.execute("SELECT set_config('lock_timeout', %s, false)", (str(int(wait * 1000)),))
            # A replica that vanished in a transaction must not hold its rows for ever.
            db.execute("SET idle_in_transaction_session_timeout = '60s'")
            db.execute("SET tcp_keepalives_idle = 15")
            if db.execute("SHOW synchronous_commit").fetchall()[0][0] == "off":
                db.execute("SET synchronous_commit = on")

        with _database():
            self._pool = ConnectionPool(
                url,
                min_size=1,
                max_size=connections,
                timeout=wait,
                configure=configure,
                check=ConnectionPool.check_connection,
                kwargs={"connect_timeout": max(2, int(wait)), "autocommit": True},
                open=True,
            )
            try:
                self._pool.wait(wait)
                with self._pool.connection() as db:
                    prepare(db)
            except BaseException:
                self._pool.close()
                raise

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
        with self._transaction() as db:
            return insert(db, tenant, session_id, ttl, packed)[0]

    def get(self, tenant: str, session_id: str) -> SessionRecord:
        with self._connection() as db:
            return find(db, tenant, session_id).record

    def sessions(self, tenant: str, *, after: str | None = None, limit: int = 100) -> list[SessionRecord]:
        checks.check_tenant(tenant)
        checks.check_count("limit", limit, 1, checks.MAX_LIST)
        with self._connection() as db:
            return postgres_rows.listed(db, tenant, after, limit)

    def usage(self, tenant: str) -> Usage:
        checks.check_tenant(tenant)
        with self._connection() as db:
            row = db.execute(
                "SELECT (SELECT count(*) FROM mnemic_sessions WHERE tenant = %(t)s), (SELECT coalesce(sum(bytes), 0) "
                "FROM mnemic_commits JOIN mnemic_sessions ON number = session WHERE tenant = %(t)s)",
                {"t": tenant},
            ).fetchall()[0]
        return Usage(sessions=row[0], bytes=int(row[1]))

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
        digest = digest_of(state)
        with self._transaction() as db:
            # The row stays locked until the end: whoever takes the lease over waits for this commit, or comes first.
            row = find(db, tenant, session_id, lock=True)
            _check_lease(row, lease)
            checks.check_expected(session_id, row.record.version, expected)
            version = (tokens_seen, row.record.turns + 1, len(state), note, digest)
            record = append(db, row, version, self.keep)
            write_state(db, row.number, record.version, state)
        return record

    def load(self, tenant: str, session_id: str, version: int | None = None) -> tuple[SessionRecord, bytes]:
        checks.check_version(version)
        # One view of all rows, whatever others commit or delete meanwhile.
        with self._transaction(IsolationLevel.REPEATABLE_READ) as db:
            row = find(db, tenant, session_id)
            found = version_of(db, row, version, self.keep)
            if found is None:
                return row.record, b""
            wanted = version or row.record.version
            state = read_state(db, row.number, wanted)
        check_state(state, found[2], found[4], f"The state of session {session_id}, version {wanted},")
        return row.record, state

    def commits(self, tenant: str, session_id: str) -> list[Commit]:
        with self._transaction(IsolationLevel.REPEATABLE_READ) as db:
            return postgres_rows.commits_of(db, find(db, tenant, session_id).number)

    def rollback(self, tenant: str, session_id: str, version: int, *, lease: Lease | None = None) -> SessionRecord:
        checks.check_count("version", version)
        with self._transaction() as db:
            row = find(db, tenant, session_id, lock=True)
            _check_lease(row, lease)
            found = version_of(db, row, version, self.keep)
            if found is None:
                raise checks.not_kept(session_id, version, self.keep)
            tokens_seen, turns, size, _, digest = found
            # First the bytes: the version may be the one that is dropped now.
            postgres_rows.copy_state(db, row.number, version, row.number, row.record.version + 1)
            return append(db, row, (tokens_seen, turns, size, f"rollback to {version}", digest), self.keep)

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
        with self._transaction() as db:
            parent = find(db, tenant, session_id, lock=True)
            found = version_of(db, parent, version, self.keep)
            record, number = insert(db, tenant, new_id, ttl, packed, session_id)
            if found is not None:
                tokens_seen, turns, size, _, digest = found
                wanted = version or parent.record.version
                note = f"fork of {session_id}, version {wanted}"
                row = find(db, tenant, new_id)
                record = append(db, row, (tokens_seen, turns, size, note, digest), self.keep)
                postgres_rows.copy_state(db, parent.number, wanted, number, record.version)
        return record

    # Ends

    def delete(self, tenant: str, session_id: str) -> None:
        with self._transaction() as db:
            number = find(db, tenant, session_id, lock=True).number
            db.execute("DELETE FROM mnemic_sessions WHERE number = %s", (number,))

    def expire(self, now: float) -> int:
        with self._connection() as db:
            return db.execute(
                "DELETE FROM mnemic_sessions WHERE number IN (SELECT number FROM mnemic_sessions WHERE expires <= %s "
                f"AND NOT coalesce(lease_until > {postgres_rows.NOW}, false) FOR UPDATE SKIP LOCKED)",
                (now,),
            ).rowcount

    # Leases

    def acquire(self, tenant: str, session_id: str, owner: str, seconds: float) -> Lease:
        checks.check_text("owner", owner, 128, 1)
        checks.check_seconds("seconds", seconds)
        lease = new_lease(tenant, session_id, owner, seconds)
        with self._transaction() as db:
            row = find(db, tenant, session_id, lock=True)
            if row.leased:
                raise busy(session_id)
            postgres_rows.set_lease(db, row.number, lease)
        return lease

    def renew(self, lease: Lease, seconds: float) -> Lease:
        checks.check_seconds("seconds", seconds)
        lease = renewed(lease, seconds)
        with self._transaction() as db:
            row = postgres_rows.find_leased(db, lease)
            if row is None:
                raise lost(lease.session_id)
            postgres_rows.set_lease(db, row, lease)
        return lease

    def release(self, lease: Lease) -> None:
        with self._transaction() as db:
            row = postgres_rows.find_leased(db, lease)
            if row is not None:
                postgres_rows.set_lease(db, row, None)

    # Audit

    def audit(self, tenant: str, action: str, session_id: str | None = None, detail: str = "") -> None:
        checks.check_tenant(tenant)
        checks.check_audit(action, session_id, detail)
        with self._connection() as db:
            db.execute(
                f"INSERT INTO mnemic_audit (at, tenant, action, session_id, detail) VALUES ({postgres_rows.NOW}, "
                "%s, %s, %s, %s)",
                (tenant, action, session_id, detail),
            )

    def audited(self, tenant: str, *, limit: int = 100) -> list[AuditEntry]:
        checks.check_tenant(tenant)
        checks.check_count("limit", limit, 1, checks.MAX_LIST)
        with self._connection() as db:
            rows = db.execute(
                "SELECT at, action, session_id, detail FROM mnemic_audit WHERE tenant = %s ORDER BY number DESC "
                "LIMIT %s",
                (tenant, limit),
            ).fetchall()
        return [AuditEntry(at=a, action=b, session_id=c, detail=d) for a, b, c, d in rows]

    def close(self) -> None:
        self._pool.close()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        """Every statement for itself."""
        with _database(), self._pool.connection() as db:
            yield db

    @contextlib.contextmanager
    def _transaction(self, level: Any = IsolationLevel.READ_COMMITTED) -> Iterator[Any]:
        with self._connection() as db:
            db.isolation_level = level
            with db.transaction():
                yield db


def _check_lease(row: postgres_rows.Row, lease: Lease | None) -> None:
    if lease is not None:
        if row.lease_token != lease.token:
            raise lost(row.record.id)
    elif row.leased:
        raise busy(row.record.id)


@contextlib.contextmanager
def _database() -> Iterator[None]:
    try:
        yield
    except ServingError:
        raise
    except psycopg.errors.LockNotAvailable as error:
        raise SessionBusy("Somebody else is writing to this session: try again when they are done.") from error
    except (psycopg.Error, PoolTimeout, PoolClosed, TooManyRequests) as error:
        # Messages of the driver name machines and users.
        raise StoreUnavailable(f"The database of sessions fails ({type(error).__name__}).") from error
