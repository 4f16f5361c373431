"""Processes that are killed in the middle of their work: what was acknowledged is there, whole and in its place."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from mnemic.serving.errors import SessionBusy, SessionNotFound
from mnemic.serving.store import open_store

from .store_cases import fast_folder, new_schema, new_server

TENANT = "tenant"
SESSIONS = ("s0", "s1", "s2")
KEEP = 3

if hasattr(os, "fork"):
    # Children begin with everything imported: they live for a moment only.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["mnemic.serving.store", "mnemic.serving.store.embedded", __name__])
else:
    pytest.skip("processes are killed by POSIX signals here", allow_module_level=True)


def state_of(session_id, version):
    """A state that tells whose it is, of a size that differs from version to version."""
    seed = hashlib.sha256(f"{session_id}/{version}".encode()).digest()
    return json.dumps({"session": session_id, "version": version}).encode() + b"\n" + seed * (version % 7 * 300 + 1)


def whose(state):
    """Session and version of a state. Fails where it is not whole."""
    said = json.loads(state.split(b"\n", 1)[0])
    assert state == state_of(said["session"], said["version"])
    return said["session"], said["version"]


def work(url, log):
    """Commit without end, and say so after each one; now and then roll back, fork, and delete."""
    store = open_store(url, keep=KEEP)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(*words):
        os.write(handle, " ".join(map(str, words)).encode() + b"\n")

    def go_on(session_id):
        version = store.get(TENANT, session_id).version
        while True:
            version += 1
            if version % 11 == 0:
                version = store.rollback(TENANT, session_id, version - 2).version
            else:
                state = state_of(session_id, version)
                store.commit(TENANT, session_id, expected=version - 1, state=state, tokens_seen=version)
            say("commit", session_id, version)
            if version % 7 == 0:
                twin = store.fork(TENANT, session_id).id
                say("fork", twin, version)
                say("try", twin)
                store.delete(TENANT, twin)
                say("delete", twin)

    for name in SESSIONS:
        threading.Thread(target=go_on, args=(name,), daemon=True).start()
    say("ready")
    time.sleep(60)


class Killed:
    """Rounds of work that end by SIGKILL, with all that was acknowledged."""

    def __init__(self, url, folder):
        self.url, self.log = url, folder / "log"
        self.random = random.Random(7)
        self.versions = dict.fromkeys(SESSIONS, 0)
        self.forks: dict[str, int] = {}
        self.tried: set[str] = set()
        self.deleted: set[str] = set()
        store = open_store(url, keep=KEEP)
        for name in SESSIONS:
            store.create(TENANT, session_id=name)
        store.close()

    def round(self, during=None):
        self.log.unlink(missing_ok=True)
        child = processes.Process(target=work, args=(self.url, self.log), daemon=True)
        child.start()
        try:
            end = time.monotonic() + 30
            while not self.log.exists() or b"ready" not in self.log.read_bytes():
                assert child.is_alive()
                assert time.monotonic() < end
                time.sleep(0.005)
            time.sleep(self.random.uniform(0.005, 0.12))
            if during is not None:
                during()
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        self.read_log()

    def read_log(self):
        for line in self.log.read_text().splitlines():
            match line.split():
                case ["commit", name, version]:
                    self.versions[name] = int(version)
                case ["fork", name, version]:
                    self.forks[name] = int(version)
                case ["try", name]:
                    self.tried.add(name)
                case ["delete", name]:
                    self.deleted.add(name)

    def check(self):
        store = open_store(self.url, keep=KEEP)
        try:
            for name in SESSIONS:
                record, state = store.load(TENANT, name)
                # The one on its way may have arrived, or not.
                assert self.versions[name] <= record.version <= self.versions[name] + 1
                self.versions[name] = record.version
                if record.version:
                    self.check_versions(store, name)
                    assert len(state) == record.state_bytes
            for name in self.deleted:
                with pytest.raises(SessionNotFound):
                    store.get(TENANT, name)
            for name in self.forks.keys() - self.tried:
                assert store.get(TENANT, name).version == 1
            for record in store.sessions(TENANT, limit=1000):
                if record.id not in SESSIONS:
                    # Killed before it was deleted: as whole as before, and its bytes too.
                    assert record.parent in SESSIONS
                    if record.version:
                        assert whose(store.load(TENANT, record.id)[1])[0] == record.parent
                    store.delete(TENANT, record.id)
            self.forks.clear()
            self.check_room(store)
        finally:
            store.close()

    def check_versions(self, store, name):
        kept = store.commits(TENANT, name)
        newest = self.versions[name]
        assert [c.version for c in kept] == list(range(newest, max(0, newest - KEEP), -1))
        for commit in kept:
            owner, version = whose(store.load(TENANT, name, commit.version)[1])
            assert owner == name
            assert version == (commit.version - 2 if commit.version % 11 == 0 else commit.version)

    def check_room(self, store):
        """No file without a record, and none missing."""
        states = Path(self.url) / "states"
        if states.exists():
            kept = sum(len(store.commits(TENANT, name)) for name in SESSIONS)
            assert sum(1 for path in states.rglob("*") if path.is_file()) == kept


def kill_often(url, folder, times, during=None, afterwards=None):
    """So many times, and on a slow machine more, until every session has been written more often than that."""
    killed = Killed(url, folder)
    for done in range(1, 5 * times + 1):
        killed.round(during)
        if afterwards is not None:
            afterwards()
        killed.check()
        if done >= times and min(killed.versions.values()) > times:
            return killed
    raise AssertionError(f"After {5 * times} rounds the sessions stand at {killed.versions}.")


def test_20_kills_embedded(tmp_path):
    assert kill_often(str(tmp_path / "store"), tmp_path, 20).deleted


def test_20_kills_of_a_client_of_postgres(tmp_path):
    assert kill_often(new_schema(), fast_folder(tmp_path), 20).deleted


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_100_kills_embedded(tmp_path):
    assert kill_often(str(tmp_path / "store"), tmp_path, 100).deleted


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_100_kills_of_a_client_of_postgres(tmp_path):
    assert kill_often(new_schema(), fast_folder(tmp_path), 100).deleted


def hold(url, log):
    store = open_store(url, keep=KEEP)
    lease = store.acquire(TENANT, "s0", "the one that is killed", 1.0)
    with open(log, "a", buffering=1) as file:
        for version in range(1, 10_000):
            lease = store.renew(lease, 1.0)
            store.commit(
                TENANT, "s0", expected=version - 1, state=state_of("s0", version), tokens_seen=version, lease=lease
            )
            print(version, file=file)


def test_a_replica_takes_over_from_one_that_is_killed(tmp_path):
    url, log = new_schema(), tmp_path / "log"
    store = open_store(url, keep=KEEP)
    try:
        store.create(TENANT, session_id="s0")
        child = processes.Process(target=hold, args=(url, log), daemon=True)
        child.start()
        end = time.monotonic() + 30
        while not log.exists() or log.read_text().count("\n") < 5:
            assert time.monotonic() < end
            time.sleep(0.005)
        with pytest.raises(SessionBusy):
            store.acquire(TENANT, "s0", "the other", 60)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        acknowledged = log.read_text().count("\n")
        while True:
            try:
                lease = store.acquire(TENANT, "s0", "the other", 60)
                break
            except SessionBusy:
                assert time.monotonic() < end
                time.sleep(0.02)
        record, state = store.load(TENANT, "s0")
        assert acknowledged <= record.version <= acknowledged + 1
        assert whose(state) == ("s0", record.version)
        state = state_of("s0", record.version + 1)
        store.commit(TENANT, "s0", expected=record.version, state=state, tokens_seen=1, lease=lease)
    finally:
        store.close()


def test_a_postgres_server_that_is_killed(tmp_path):
    """All its processes at once, under load; it recovers from its log when it is started again."""
    psycopg = pytest.importorskip("psycopg")
    server = new_server()
    try:
        with psycopg.connect(server.url(), autocommit=True) as db:
            db.execute("CREATE SCHEMA crash")
        url = server.url(search_path="crash")
        kill_often(url, fast_folder(tmp_path), 3, during=lambda: server.stop("immediate"), afterwards=server.start)
    finally:
        server.close()
