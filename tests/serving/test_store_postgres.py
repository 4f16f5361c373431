"""The store in PostgreSQL: replicas that share it, a server that goes away, damage, and what deletion leaves."""

import os
import shutil
import subprocess
import threading
import time

import pytest

from mnemic.core.errors import ConfigError, FileFormatError
from mnemic.serving.errors import SessionBusy, SessionDamaged, SessionNotFound, StoreUnavailable, VersionConflict
from mnemic.serving.store import open_store

from .store_cases import KEY, new_schema, new_server, the_server

psycopg = pytest.importorskip("psycopg")
pytest.importorskip("psycopg_pool")
from mnemic.serving.store import postgres, postgres_rows  # noqa: E402
from mnemic.serving.store.postgres import PostgresStore  # noqa: E402

T = "tenant"
MARK = b"PLANTED-MARKER-7319"


@pytest.fixture
def url():
    return new_schema()


@pytest.fixture
def stores(url):
    """Two replicas."""
    both = [PostgresStore(url, keep=3), PostgresStore(url, keep=3)]
    yield both
    for store in both:
        store.close()


def commit(store, session_id="s", expected=0, state=b"state", **more):
    return store.commit(T, session_id, expected=expected, state=state, tokens_seen=expected + 1, **more)


def test_replicas_see_each_other(stores):
    one, two = stores
    one.create(T, session_id="s", metadata={"k": "v"})
    record = commit(one)
    assert two.load(T, "s") == (record, b"state")
    with pytest.raises(VersionConflict):
        commit(two)
    commit(two, expected=1)
    two.delete(T, "s")
    with pytest.raises(SessionNotFound):
        commit(one, expected=2)


def test_a_version_that_goes_while_it_is_read(stores, monkeypatch):
    one, two = stores
    one.create(T, session_id="s")
    record = commit(one)
    real = postgres.version_of

    def and_then_others_commit(*arguments):
        found = real(*arguments)
        monkeypatch.undo()
        for version in range(1, 5):
            commit(two, expected=version, state=b"later")
        return found

    monkeypatch.setattr(postgres, "version_of", and_then_others_commit)
    assert one.load(T, "s") == (record, b"state")
    assert one.load(T, "s")[1] == b"later"


def test_leases_hold_across_replicas(stores):
    one, two = stores
    one.create(T, session_id="s")
    lease = one.acquire(T, "s", "replica one", 60)
    for call in (lambda: two.acquire(T, "s", "replica two", 60), lambda: commit(two), lambda: two.rollback(T, "s", 1)):
        with pytest.raises(SessionBusy) as caught:
            call()
        assert "replica" not in str(caught.value)
    # A lease is a value: what it allows, it allows everywhere.
    commit(two, lease=lease)
    two.release(lease)
    two.acquire(T, "s", "replica two", 60)


def test_a_replica_that_was_away_cannot_commit(stores):
    one, two = stores
    one.create(T, session_id="s")
    old = one.acquire(T, "s", "one", 0.05)
    time.sleep(0.1)
    new = two.acquire(T, "s", "two", 60)
    for call in (lambda: commit(one, state=b"late", lease=old), lambda: one.renew(old, 60)):
        with pytest.raises(SessionBusy, match="taken over"):
            call()
    one.release(old)
    commit(two, lease=new)
    assert one.load(T, "s")[1] == b"state"


def test_replicas_race_for_leases(stores):
    """Sixteen threads of two replicas: never two holders, every turn counted once."""
    stores[0].create(T, session_id="s")
    holders, most, turns, errors = set(), [], [], []

    def work(me):
        store = stores[me % 2]
        done = 0
        try:
            while done < 3:
                try:
                    lease = store.acquire(T, "s", f"owner {me}", 60)
                except SessionBusy:
                    time.sleep(0.002)
                    continue
                holders.add(me)
                most.append(len(holders))
                record, state = store.load(T, "s")
                commit(store, expected=record.version, state=state + b"%d;" % me, lease=lease)
                holders.discard(me)
                store.release(lease)
                turns.append(me)
                done += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(most) == {1}
    record, state = stores[0].load(T, "s")
    assert record.version == record.turns == 48
    assert sorted(map(int, state.decode().split(";")[:-1])) == sorted(turns)


def test_replicas_that_start_together(url):
    stores, errors = [], []

    def start():
        try:
            stores.append(PostgresStore(url, connections=1))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.close()
    assert errors == []
    assert len(stores) == 6


def test_a_state_in_several_parts(stores, monkeypatch):
    monkeypatch.setattr(postgres_rows, "PART", 1000)
    one, two = stores
    one.create(T, session_id="s")
    for version, size in enumerate((1, 999, 1000, 1001, 12_345)):
        state = os.urandom(size)
        commit(one, expected=version, state=state)
        assert two.load(T, "s")[1] == state
    assert two.load(T, two.fork(T, "s").id)[1] == state
    two.rollback(T, "s", 3)
    assert len(one.load(T, "s")[1]) == 1000


def test_a_damaged_state_is_said_and_others_go_on(stores, url):
    one, _ = stores
    for name in ("s", "t"):
        one.create(T, session_id=name)
    for version in range(3):
        commit(one, expected=version, state=b"state %d" % version)
    commit(one, "t")
    with psycopg.connect(url) as db:
        db.execute("UPDATE mnemic_states SET data = 'other' WHERE version = 3")
        db.execute("DELETE FROM mnemic_states WHERE version = 2")
    for version in (2, 3, None):
        with pytest.raises(SessionDamaged, match="session s, version"):
            one.load(T, "s", version)
    assert one.load(T, "s", 1)[1] == b"state 0"
    assert one.load(T, "t")[1] == b"state"
    assert one.rollback(T, "s", 1).version == 4
    assert one.load(T, "s")[1] == b"state 0"


def rows_with(db, mark):
    """Tables in which a text or some bytes hold the mark."""
    found = []
    tables = (
        "SELECT table_name, column_name, data_type FROM information_schema.columns "
        "WHERE table_name LIKE 'mnemic%' AND table_schema = current_schema()"
    )
    for table, column, kind in db.execute(tables).fetchall():
        as_bytes = column if kind == "bytea" else f"convert_to({column}::text, 'UTF8')"
        if db.execute(f"SELECT count(*) FROM {table} WHERE position(%s::bytea IN {as_bytes}) > 0", (mark,)).fetchone()[
            0
        ]:
            found.append(f"{table}.{column}")
    return sorted(found)


def files_with(folder, mark):
    """But for the write-ahead log."""
    paths = [path for path in folder.rglob("*") if path.is_file() and mark in path.read_bytes()]
    return [path for path in paths if "pg_wal" not in path.parts]


def test_a_deleted_session_leaves_no_byte():
    """No row at once; no byte in any file once the tables are rewritten and the log is recycled."""
    server = new_server()
    try:
        store = PostgresStore(server.url(), keep=3)
        for name in ("s", "expires"):
            store.create(T, session_id=name, ttl=1, metadata={"k": MARK.decode()})
            for version in range(5):
                commit(store, name, expected=version, state=MARK * 500)
        store.rollback(T, "s", 4)
        store.delete(T, store.fork(T, "s", metadata={"k": MARK.decode()}).id)
        with psycopg.connect(server.url(), autocommit=True) as db:
            assert rows_with(db, MARK) == ["mnemic_sessions.metadata", "mnemic_states.data"]
            db.execute("CHECKPOINT")
            assert files_with(server.data, MARK)
            store.delete(T, "s")
            assert store.expire(time.time() + 100) == 1
            assert rows_with(db, MARK) == []
            store.close()
            for table in ("sessions", "commits", "states", "audit"):
                db.execute(f"VACUUM FULL mnemic_{table}")
            db.execute("CHECKPOINT")
        server.stop("fast")
        assert files_with(server.data, MARK) == []
    finally:
        server.close()


def test_a_server_that_goes_away_and_comes_back():
    server = new_server()
    try:
        store = PostgresStore(server.url(), wait=0.2)
        store.create(T, session_id="s")
        record = commit(store)
        server.stop("immediate")
        for call in (lambda: store.get(T, "s"), lambda: commit(store, expected=1)):
            with pytest.raises(StoreUnavailable):
                call()
        with pytest.raises(StoreUnavailable):
            PostgresStore(server.url(), wait=0.2)
        server.start()
        end = time.monotonic() + 30
        while True:
            try:
                assert store.load(T, "s") == (record, b"state")
                break
            except StoreUnavailable:
                assert time.monotonic() < end
        assert commit(store, expected=1).version == 2
        store.close()
    finally:
        server.close()


def test_a_connection_that_is_cut_in_a_transaction(stores, url):
    one, two = stores
    one.create(T, session_id="s")
    commit(one)
    with one._transaction() as db:
        pid = db.info.backend_pid
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("SELECT pg_terminate_backend(%s)", (pid,))
    time.sleep(0.05)
    # The pool notices before it lends it.
    assert commit(one, expected=1).version == 2

    def is_cut():
        with one._transaction() as held:
            held.execute("UPDATE mnemic_sessions SET version = 99")
            with psycopg.connect(url, autocommit=True) as db:
                db.execute("SELECT pg_terminate_backend(%s)", (held.info.backend_pid,))
            held.execute("SELECT 1")

    with pytest.raises(StoreUnavailable):
        is_cut()
    assert two.get(T, "s").version == 2


def test_somebody_who_never_ends_a_transaction(url):
    store = PostgresStore(url, wait=0.3)
    try:
        store.create(T, session_id="s")
        with psycopg.connect(url) as db:
            db.execute("SELECT * FROM mnemic_sessions FOR UPDATE")
            with pytest.raises(SessionBusy):
                commit(store)
            assert store.get(T, "s").version == 0
        assert commit(store).version == 1
    finally:
        store.close()


def test_more_threads_than_connections(url):
    store = PostgresStore(url, connections=2)
    try:
        store.create(T, session_id="s")
        records = []
        threads = [threading.Thread(target=lambda: records.append(store.get(T, "s"))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(records) == 20
    finally:
        store.close()


def test_no_secret_in_errors(caplog):
    with pytest.raises(StoreUnavailable) as caught:
        PostgresStore("postgresql://user:secret-word@127.0.0.1:1/nothing", wait=0.2)
    assert "secret-word" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        PostgresStore("postgresql://user:secret-word@[broken", wait=0.2)
    assert "secret-word" not in str(caught.value)
    assert "secret-word" not in caplog.text


def test_commits_wait_for_the_disk_whatever_the_server_says():
    store = PostgresStore(new_schema(synchronous_commit="off"))
    try:
        with store._transaction() as db:
            assert db.execute("SHOW synchronous_commit").fetchone()[0] == "on"
    finally:
        store.close()


def test_tables_of_a_newer_release(url):
    PostgresStore(url).close()
    with psycopg.connect(url) as db:
        db.execute("UPDATE mnemic_format SET version = 2")
    with pytest.raises(FileFormatError, match="format 2"):
        PostgresStore(url)


def test_encrypted(url):
    pytest.importorskip("cryptography")
    store = open_store(url, keys=[KEY])
    try:
        store.create(T, session_id="s", metadata={"k": MARK.decode()})
        commit(store, state=MARK * 100)
        with psycopg.connect(url) as db:
            assert rows_with(db, MARK) == []
            assert rows_with(db, b"mnemicE1") == ["mnemic_states.data"]
        assert store.load(T, "s")[1] == MARK * 100
        assert store.get(T, "s").metadata == {"k": MARK.decode()}
    finally:
        store.close()


def test_a_disk_that_runs_full():
    """Tables on a small file system of their own; the log is elsewhere."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system can only be mounted as root")
    server = the_server()
    place = server.folder / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        shutil.chown(place, server.folder.owner(), server.folder.group())
        with psycopg.connect(server.url(), autocommit=True) as db:
            db.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
        store = PostgresStore(new_schema(default_tablespace="small"), keep=3)
        store.create(T, session_id="s")
        record = commit(store, state=b"good" * 1000)
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="DiskFull"):
                commit(store, expected=1, state=os.urandom(8_000_000))
        assert store.load(T, "s") == (record, b"good" * 1000)
        assert commit(store, expected=1, state=b"small").version == 2
        store.close()
    finally:
        with psycopg.connect(server.url(), autocommit=True) as db:
            for schema in db.execute("SELECT DISTINCT schemaname FROM pg_tables WHERE tablespace = 'small'").fetchall():
                db.execute(f"DROP SCHEMA {schema[0]} CASCADE")
            db.execute("DROP TABLESPACE IF EXISTS small")
        subprocess.run(["umount", "-l", str(place)], check=True)
