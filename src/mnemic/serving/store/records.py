"""Records in SQLite: one connection, one transaction at a time, each on the disk when it ends."""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from ...core.errors import FileFormatError
from ..errors import ServingError, StoreUnavailable

_FORMAT = 1
_APPLICATION = 0x6D6E656D

_TABLES = """
CREATE TABLE sessions (
    number INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, id TEXT NOT NULL, created REAL NOT NULL,
    used REAL NOT NULL, ttl REAL, expires REAL, version INTEGER NOT NULL, turns INTEGER NOT NULL,
    tokens_seen INTEGER NOT NULL, state_bytes INTEGER NOT NULL, parent TEXT, metadata TEXT NOT NULL,
    UNIQUE (tenant, id)
);
CREATE INDEX sessions_by_age ON sessions (tenant, created, number);
CREATE INDEX sessions_by_end ON sessions (expires) WHERE expires IS NOT NULL;
CREATE TABLE commits (
    session INTEGER NOT NULL REFERENCES sessions (number) ON DELETE CASCADE, version INTEGER NOT NULL,
    created REAL NOT NULL, tokens_seen INTEGER NOT NULL, turns INTEGER NOT NULL, bytes INTEGER NOT NULL,
    note TEXT NOT NULL, name TEXT NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (session, version)
) WITHOUT ROWID;
CREATE TABLE audit (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, tenant TEXT NOT NULL, action TEXT NOT NULL,
    session_id TEXT, detail TEXT NOT NULL
);
CREATE INDEX audit_by_tenant ON audit (tenant, number);
"""


class Records:
    """The database. All transactions go one after another, under `lock`. may_be_new: whether it may be made.

    Raises:
        StoreUnavailable: from every method, where the database is damaged or cannot be written.
        FileFormatError: it is of another program or a newer version.
    """

    def __init__(self, path: Path, may_be_new: bool):
        self.lock = threading.RLock()
        self._may_be_new = may_be_new
        self._db = None
        with _database():
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
            try:
                self._prepare(db, path)
            except BaseException:
                db.close()
                raise
        self._db = db

    def _prepare(self, db: sqlite3.Connection, path: Path) -> None:
        owner = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and (owner != _APPLICATION or version != _FORMAT):
            raise FileFormatError(
                f"{path} is no session database of format {_FORMAT} (it says {owner:#x}, {version}): use the release "
                "of mnemic that wrote it, or another folder."
            )
        if not tables and not self._may_be_new:
            raise StoreUnavailable(f"{path} is missing or empty, but not the states beside it: restore a copy.")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        # What is deleted is overwritten in the database itself too.
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA temp_store = MEMORY")
        if not tables:
            db.executescript(
                f"BEGIN; {_TABLES} PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_FORMAT}; COMMIT;"
            )
        said = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if said != "ok":
            raise sqlite3.DatabaseError(said)
        path.chmod(0o600)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing. What is changed is on the disk when the block is left.

        A failure while the transaction ends leaves open how it went, until the next one ends well; see `Unsettled`.
        """
        with self.lock:
            db = self._open()
            with _database():
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                except BaseException:
                    _roll_back(db)
                    raise
            with _database(Unsettled):
                try:
                    db.execute("COMMIT")
                except sqlite3.Error:
                    _roll_back(db)
                    raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self.lock, _database():
            yield self._open()

    def scrub(self) -> None:
        """Empty the write-ahead log: it holds what pages looked like before."""
        with self.reading() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        with self.lock:
            db, self._db = self._db, None
            if db is not None:
                with _database():
                    db.close()

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise StoreUnavailable("The session store is closed.")
        return self._db


class Unsettled(StoreUnavailable):
    """A transaction failed as it ended: on the disk it may be there, or not."""


def _roll_back(db: sqlite3.Connection) -> None:
    if db.in_transaction:
        # Where even this fails, SQLite has rolled back on its own.
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")


@contextlib.contextmanager
def _database(kind: type[StoreUnavailable] = StoreUnavailable) -> Iterator[None]:
    try:
        yield
    except ServingError:
        raise
    except sqlite3.Error as error:
        hint = ""
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            hint = "; where it is damaged, restore the folder from a copy"
        raise kind(f"The database of sessions fails ({error}){hint}.") from error
    except OSError as error:
        raise kind(f"The database of sessions fails ({error.strerror}).") from error
