"""Tables of the store in PostgreSQL."""

from typing import Any

from ...core.errors import FileFormatError

_FORMAT = 1
# Of the lock under which tables are made: any number that other programs are unlikely to use.
_LOCK = 0x6D6E656D

_TABLES = """
CREATE TABLE mnemic_format (version integer NOT NULL);
CREATE TABLE mnemic_sessions (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant text NOT NULL, id text NOT NULL,
    created float8 NOT NULL, used float8 NOT NULL, ttl float8, expires float8, version bigint NOT NULL,
    turns bigint NOT NULL, tokens_seen bigint NOT NULL, state_bytes bigint NOT NULL, parent text,
    metadata text NOT NULL, lease_token text, lease_owner text, lease_until float8, UNIQUE (tenant, id)
);
CREATE INDEX mnemic_sessions_by_age ON mnemic_sessions (tenant, created, number);
CREATE INDEX mnemic_sessions_by_end ON mnemic_sessions (expires) WHERE expires IS NOT NULL;
CREATE TABLE mnemic_commits (
    session bigint NOT NULL REFERENCES mnemic_sessions (number) ON DELETE CASCADE, version bigint NOT NULL,
    created float8 NOT NULL, tokens_seen bigint NOT NULL, turns bigint NOT NULL, bytes bigint NOT NULL,
    note text NOT NULL, digest bytea NOT NULL, PRIMARY KEY (session, version)
);
CREATE TABLE mnemic_states (
    session bigint NOT NULL, version bigint NOT NULL, part integer NOT NULL, data bytea NOT NULL,
    PRIMARY KEY (session, version, part),
    FOREIGN KEY (session, version) REFERENCES mnemic_commits ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED
);
ALTER TABLE mnemic_states ALTER COLUMN data SET STORAGE EXTERNAL;
CREATE TABLE mnemic_audit (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at float8 NOT NULL, tenant text NOT NULL,
    action text NOT NULL, session_id text, detail text NOT NULL
);
CREATE INDEX mnemic_audit_by_tenant ON mnemic_audit (tenant, number);
"""


def prepare(db: Any) -> None:
    """Make the tables where there are none, whoever else starts at the same moment.

    Raises:
        FileFormatError: they are of another format.
    """
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        if db.execute("SELECT to_regclass('mnemic_format')").fetchall()[0][0] is None:
            db.execute(_TABLES)
            db.execute("INSERT INTO mnemic_format VALUES (%s)", (_FORMAT,))
        version = db.execute("SELECT version FROM mnemic_format").fetchall()[0][0]
    if version != _FORMAT:
        raise FileFormatError(
            f"The database holds sessions in format {version}, this release reads {_FORMAT}: use the release of mnemic "
            "that wrote them, or another database."
        )
