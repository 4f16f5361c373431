"""The embedded store: files, disks that fail, damage."""

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from mnemic.core.errors import ConfigError, FileFormatError, MissingExtraError
from mnemic.serving.errors import SessionDamaged, SessionNotFound, StoreUnavailable
from mnemic.serving.store import open_store

from .store_cases import KEY, MARK, T, commit, files, holding


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(folder):
    made = open_store(folder, keep=3)
    yield made
    made.close()


def test_a_deleted_session_leaves_no_byte(store, folder):
    keys = {"metadata": {"title": MARK.decode()}}
    for name in ("s", "other"):
        store.create(T, session_id=name, **keys)
    for version in range(5):
        commit(store, expected=version)
    store.rollback(T, "s", 4)
    store.fork(T, "s", new_id="twin", **keys)
    store.delete(T, "other")
    assert len(holding(folder)) > 4
    store.delete(T, "s")
    assert len(files(folder)) == 1
    store.delete(T, "twin")
    assert files(folder) == holding(folder) == []
    store.close()
    assert holding(folder) == []


def test_an_expired_session_leaves_no_byte(store, folder):
    store.create(T, session_id="s", ttl=1, metadata={"k": MARK.decode()})
    record = commit(store)
    assert store.expire(record.expires) == 1
    assert files(folder) == holding(folder) == []


def test_files_and_folders_are_for_the_owner_only(store, folder):
    store.create(T, session_id="s")
    commit(store)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [folder, folder / "sessions.db", *files(folder)]}
    assert all(mode in (0o700, 0o600) for mode in modes.values()), modes


def test_no_file_is_named_after_what_comes_from_outside(store, folder):
    store.create("tenant-x", session_id="session-y")
    store.commit("tenant-x", "session-y", expected=0, state=b"x", tokens_seen=1)
    assert not [path for path in folder.rglob("*") if "tenant-x" in path.name or "session-y" in path.name]


@pytest.mark.parametrize("folders", ["there", "made"])
@pytest.mark.parametrize("call", ["write", "fsync", "open", "link"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_a_disk_that_fails_loses_nothing(store, folder, monkeypatch, call, code, folders):
    if folders == "there":
        for number in range(256):
            (folder / "states" / f"{number:02x}").mkdir()
            store._states._durable.add(f"{number:02x}")
    store.create(T, session_id="s")
    one = commit(store)
    before = sorted(files(folder))

    real = getattr(os, call)

    def fails(first, *rest, **named):
        if call in ("open", "link") and "states" not in str(first):
            return real(first, *rest, **named)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        if call == "link":
            # It is copied then.
            assert store.rollback(T, "s", 1).version == 2
            assert store.load(T, "s")[1] == MARK * 100
            return
        attempts = [lambda: commit(store, expected=1)] * 2
        if call != "write":
            # These write no bytes of their own.
            attempts += [lambda: store.rollback(T, "s", 1), lambda: store.fork(T, "s")]
        for attempt in attempts:
            with pytest.raises(StoreUnavailable, match=os.strerror(code)):
                attempt()
    assert store.load(T, "s") == (one, MARK * 100)
    assert sorted(files(folder)) == before
    assert [r.id for r in store.sessions(T)] == ["s"]
    assert commit(store, expected=1).version == 2


def test_old_states_that_cannot_be_removed(store, folder, monkeypatch):
    store.create(T, session_id="s")
    for version in range(3):
        commit(store, expected=version)

    def fails(path, missing_ok=False):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fails)
        # The new state is durable, so it is acknowledged.
        assert commit(store, expected=3).version == 4
        assert len(files(folder)) == 4
        with pytest.raises(StoreUnavailable):
            store.delete(T, "s")
        with pytest.raises(SessionNotFound):
            store.get(T, "s")
    store.create(T)
    assert files(folder) == []


def test_a_write_that_stops_in_the_middle(store, folder, monkeypatch):
    store.create(T, session_id="s")
    real, left = os.write, [3000]

    def some(handle, data):
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(handle, data[: min(1000, left[0])])
        left[0] -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", some)
        with pytest.raises(StoreUnavailable):
            commit(store, state=b"x" * 5000)
        assert files(folder) == []
        # In pieces, but all of it.
        left[0] = 10_000
        commit(store, state=b"y" * 5500)
    assert store.load(T, "s")[1] == b"y" * 5500


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = os.geteuid() == 0 and shutil.which("mount") is not None
    made = (
        made
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True
        ).returncode
    )
    if not made:
        pytest.skip("a small file system can only be mounted as root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_runs_full(small_disk):
    store = open_store(small_disk / "store", keep=3)
    try:
        store.create(T, session_id="s")
        good = b"good" * 50_000
        one = store.commit(T, "s", expected=0, state=good, tokens_seen=1)
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="No space left"):
                store.commit(T, "s", expected=1, state=b"x" * 5_000_000, tokens_seen=2)
        assert store.load(T, "s") == (one, good)
        # To the last byte, so that the database cannot be written either.
        with open(small_disk / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(b"\0" * 4096)
            except OSError:
                pass
        refused = 0
        for number in range(200):
            try:
                store.create(T, session_id=f"more{number}", metadata={"k": "v" * 10_000})
            except StoreUnavailable:
                refused += 1
        assert refused
        listed = {record.id for record in store.sessions(T, limit=1000)}
        assert len(listed) == 201 - refused
        assert store.load(T, "s") == (one, good)
        # Room can be made from within.
        store.delete(T, "s")
        assert store.usage(T).bytes == 0
        store.create(T, session_id="s")
        listed |= {"s"}
        (small_disk / "filler").unlink()
        assert store.commit(T, "s", expected=0, state=good, tokens_seen=2).version == 1
        store.close()
        store = open_store(small_disk / "store", keep=3)
        assert {record.id for record in store.sessions(T, limit=1000)} == listed
        assert store.load(T, "s")[1] == good
    finally:
        store.close()


class FailingCommits:
    """A connection whose COMMIT fails while `on`, as it does where the log cannot be flushed."""

    def __init__(self, db, statement="COMMIT"):
        self.db, self.on, self.statement = db, True, statement

    def __getattr__(self, name):
        return getattr(self.db, name)

    def execute(self, statement, *values):
        if self.on and statement.startswith(self.statement):
            raise sqlite3.OperationalError("disk I/O error")
        return self.db.execute(statement, *values)


def test_a_record_that_cannot_be_written(store, folder):
    store.create(T, session_id="s")
    one = commit(store)
    failing = store._records._db = FailingCommits(store._records._db)
    for call in (
        lambda: commit(store, expected=1),
        lambda: store.rollback(T, "s", 1),
        lambda: store.fork(T, "s"),
        lambda: store.create(T, session_id="t"),
        lambda: store.delete(T, "s"),
        lambda: store.expire(1e12),
    ):
        with pytest.raises(StoreUnavailable, match="disk I/O error"):
            call()
    assert store.load(T, "s") == (one, MARK * 100)
    assert [r.id for r in store.sessions(T)] == ["s"]
    failing.on = False
    # With the next success it is known that the states before it belong to nothing.
    assert commit(store, expected=1).version == 2
    assert len(files(folder)) == 2


def test_a_log_that_cannot_be_emptied(store, folder):
    """The session is deleted once, and its bytes are gone from the log with the next deletion."""
    for name in ("s", "t"):
        store.create(T, session_id=name, metadata={"k": MARK.decode()})
        commit(store, name)
    failing = store._records._db = FailingCommits(store._records._db, "PRAGMA wal_checkpoint")
    with pytest.raises(StoreUnavailable, match="disk I/O error"):
        store.delete(T, "s")
    assert [r.id for r in store.sessions(T)] == ["t"]
    assert len(files(folder)) == 1
    failing.on = False
    store.delete(T, "t")
    assert holding(folder) == []


def test_a_success_that_wrote_nothing_settles_nothing(store, folder):
    store.create(T, session_id="s")
    failing = store._records._db = FailingCommits(store._records._db)
    with pytest.raises(StoreUnavailable):
        commit(store)
    failing.on = False
    assert store.expire(1.0) == 0
    assert len(files(folder)) == 1
    store.create(T)
    assert files(folder) == []


@pytest.mark.parametrize("how", ["flipped", "shorter", "longer", "missing", "folder"])
def test_a_damaged_state_is_said_and_others_go_on(store, folder, how):
    for name in ("s", "t"):
        store.create(T, session_id=name)
    commit(store, "t", 0, b"of t")
    commit(store, "s", 0, b"one")
    two = commit(store, "s", 1, b"two of s")
    (path,) = [p for p in files(folder) if p.read_bytes() == b"two of s"]
    damage(path, how)
    with pytest.raises(SessionDamaged, match=r"session s, version 2.*roll back"):
        store.load(T, "s")
    assert store.load(T, "t")[1] == b"of t"
    assert store.load(T, "s", 1) == (two, b"one")
    assert store.rollback(T, "s", 1).version == 3
    assert store.load(T, "s")[1] == b"one"
    if how != "folder":
        store.delete(T, "s")
        with pytest.raises(SessionNotFound):
            store.get(T, "s")


def damage(path, how):
    data = path.read_bytes()
    path.unlink()
    if how == "flipped":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif how == "shorter":
        path.write_bytes(data[:-1])
    elif how == "longer":
        path.write_bytes(data + b"\0")
    elif how == "folder":
        path.mkdir()


@pytest.mark.parametrize("how", ["noise", "empty", "missing", "foreign", "newer", "half", "page"])
def test_a_damaged_database_is_said_and_no_state_is_touched(store, folder, how):
    store.create(T, session_id="s")
    for version in range(3):
        commit(store, expected=version)
    store.close()
    path, states = folder / "sessions.db", sorted(files(folder))
    if how == "noise":
        path.write_bytes(os.urandom(8192))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "half":
        # The pages of some tables are gone.
        path.write_bytes(path.read_bytes()[:12_288])
    elif how == "page":
        # One that nothing needs at the start.
        db = sqlite3.connect(path)
        page, size = db.execute(
            "SELECT rootpage, page_size FROM sqlite_master, pragma_page_size WHERE name = 'sessions'"
        ).fetchone()
        db.close()
        with open(path, "r+b") as file:
            file.seek((page - 1) * size)
            file.write(os.urandom(size))
    else:
        with sqlite3.connect(path) as db:
            db.execute(f"PRAGMA {'user_version = 2' if how == 'newer' else 'application_id = 5'}")
        db.close()
    for _ in range(2):
        with pytest.raises((StoreUnavailable, FileFormatError), match=r"cop(y|ies)|release"):
            open_store(folder)
    assert sorted(files(folder)) == states


def test_damage_while_it_runs(store, folder):
    store.create(T, session_id="s")
    commit(store)
    store._records.scrub()
    store._records._db.execute("PRAGMA cache_size = 0")
    with open(folder / "sessions.db", "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(100_000))
    with pytest.raises(StoreUnavailable, match="restore the folder from a copy"):
        store.get(T, "s")


def test_what_a_crash_left_is_removed_at_the_start(store, folder):
    store.create(T, session_id="s")
    commit(store)
    stray = folder / "states" / "ab"
    stray.mkdir(exist_ok=True)
    (stray / ("ab" + "0" * 30)).write_bytes(b"never acknowledged")
    (stray / "note.txt").write_text("not ours")
    store.close()
    again = open_store(folder)
    try:
        assert again.load(T, "s")[1] == MARK * 100
        assert holding(folder, b"never acknowledged") == []
        assert (stray / "note.txt").exists()
    finally:
        again.close()


def test_a_version_that_goes_while_it_is_read(store, monkeypatch):
    store.create(T, session_id="s")
    commit(store)
    real = store._states.read

    def after_others_committed(*arguments):
        monkeypatch.undo()
        for version in range(1, 5):
            commit(store, expected=version, state=b"later")
        return real(*arguments)

    monkeypatch.setattr(store._states, "read", after_others_committed)
    assert store.load(T, "s") == (store.get(T, "s"), b"later")


def test_one_process_at_a_time(store, folder):
    with pytest.raises(StoreUnavailable, match="Another process"):
        open_store(folder)
    script = (
        f"from mnemic.serving.store import open_store\n"
        f"try:\n    open_store({str(folder)!r})\nexcept Exception as e:\n    print(type(e).__name__)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert said.stdout.strip() == "StoreUnavailable", said.stderr
    store.close()
    open_store(folder).close()


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StoreUnavailable, match="cannot be opened"):
            open_store(folder)


@pytest.mark.parametrize(
    "url, message",
    [
        ("", "begins no address"),
        ("redis://x", "'redis'"),
        ("sqlite://x", "begins no address"),
        ("sqlite:///", "begins"),
    ],
)
def test_addresses_that_are_none(url, message):
    with pytest.raises(ConfigError, match=message):
        open_store(url)


def test_extras_that_are_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(MissingExtraError, match=r"mnemic\[encryption\]"):
        open_store(folder, keys=[KEY])
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "mnemic.serving.store.postgres", raising=False)
    with pytest.raises(MissingExtraError, match=r"mnemic\[serve-postgres\]"):
        open_store("postgresql:///x")
    assert not folder.exists()


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url, place in (("plain", "plain"), ("sqlite:///relative", "relative"), (f"sqlite:///{tmp_path}/a%20b", "a b")):
        open_store(url).close()
        assert (tmp_path / place / "sessions.db").exists()
    for keep in (0, -1, True, "8"):
        with pytest.raises(ConfigError, match="keep"):
            open_store(tmp_path / "plain", keep=keep)
