"""Stores against a dictionary: random calls of random tenants."""

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mnemic.serving.errors import InvalidRequest, SessionBusy, SessionNotFound, VersionConflict
from mnemic.serving.store import open_store

from .store_cases import KINDS, fast_folder, keys_of, opened, url_of

KEEP = 3
TENANTS = ("a", "b")
IDS = ("one", "two", "three")


@dataclass
class Session:
    """What a session should be. versions: number -> (state, tokens, turns)."""

    metadata: dict
    parent: str | None = None
    version: int = 0
    versions: dict = field(default_factory=dict)
    lease: object = None

    def append(self, state, tokens, turns):
        self.version += 1
        self.versions[self.version] = (state, tokens, turns)
        self.versions.pop(self.version - KEEP, None)

    @property
    def newest(self):
        return self.versions.get(self.version, (b"", 0, 0))


class StoreMachine(RuleBasedStateMachine):
    """Every call on the store and on a dictionary: the same answers, the same errors."""

    kind = "embedded"

    @initialize()
    def begin(self):
        self.room = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.url = url_of(self.kind, Path(self.room.name))
        self.store = open_store(self.url, keep=KEEP, **keys_of(self.kind))
        self.model: dict[tuple[str, str], Session] = {}

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.room.cleanup()

    def expect(self, error, call):
        with pytest.raises(error):
            call()

    @rule(tenant=st.sampled_from(TENANTS), name=st.sampled_from(IDS), value=st.text(max_size=5))
    def create(self, tenant, name, value):
        def call(metadata):
            return self.store.create(tenant, session_id=name, metadata=metadata)

        metadata = {"key": value}
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value) or (tenant, name) in self.model:
            self.expect(InvalidRequest, lambda: call(metadata))
        else:
            assert call(metadata).version == 0
            self.model[tenant, name] = Session(metadata)

    @rule(
        tenant=st.sampled_from(TENANTS),
        name=st.sampled_from(IDS),
        state=st.binary(min_size=1, max_size=50),
        off=st.sampled_from([0, 0, 0, 1, -1]),
        with_lease=st.booleans(),
    )
    def commit(self, tenant, name, state, off, with_lease):
        session = self.model.get((tenant, name))
        lease = session.lease if session and with_lease else None
        expected = max(0, (session.version if session else 0) + off)

        def call():
            return self.store.commit(tenant, name, expected=expected, state=state, tokens_seen=len(state), lease=lease)

        if session is None:
            self.expect(SessionNotFound, call)
        elif session.lease is not None and lease is None:
            self.expect(SessionBusy, call)
        elif expected != session.version:
            self.expect(VersionConflict, call)
        else:
            call()
            session.append(state, len(state), session.newest[2] + 1)

    @rule(tenant=st.sampled_from(TENANTS), name=st.sampled_from(IDS), back=st.integers(0, KEEP + 1))
    def rollback(self, tenant, name, back):
        session = self.model.get((tenant, name))
        version = max(0, session.version - back) if session else 1

        def call():
            return self.store.rollback(tenant, name, version, lease=session.lease if session else None)

        if session is None:
            self.expect(SessionNotFound, call)
        elif version not in session.versions:
            self.expect(InvalidRequest, call)
        else:
            call()
            session.append(*session.versions[version])

    @rule(
        tenant=st.sampled_from(TENANTS),
        name=st.sampled_from(IDS),
        twin=st.sampled_from(IDS),
        back=st.none() | st.integers(0, KEEP),
    )
    def fork(self, tenant, name, twin, back):
        session = self.model.get((tenant, name))
        version = None if back is None or session is None else max(0, session.version - back)

        def call():
            return self.store.fork(tenant, name, version, new_id=twin)

        if session is None:
            self.expect(SessionNotFound, call)
            return
        wanted = session.version if version is None else version
        empty = wanted == session.version == 0
        if (tenant, twin) in self.model or not (empty or wanted in session.versions):
            self.expect(InvalidRequest, call)
        else:
            assert call().parent == name
            made = self.model[tenant, twin] = Session({}, parent=name)
            if not empty:
                made.append(*session.versions[wanted])

    @rule(tenant=st.sampled_from(TENANTS), name=st.sampled_from(IDS))
    def delete(self, tenant, name):
        if self.model.pop((tenant, name), None) is None:
            self.expect(SessionNotFound, lambda: self.store.delete(tenant, name))
        else:
            self.store.delete(tenant, name)

    @rule(tenant=st.sampled_from(TENANTS), name=st.sampled_from(IDS))
    def lease(self, tenant, name):
        session = self.model.get((tenant, name))
        if session is None:
            self.expect(SessionNotFound, lambda: self.store.acquire(tenant, name, "owner", 100))
        elif session.lease is None:
            session.lease = self.store.acquire(tenant, name, "owner", 100)
        else:
            self.expect(SessionBusy, lambda: self.store.acquire(tenant, name, "owner", 100))
            self.store.release(session.lease)
            session.lease = None

    @precondition(lambda self: not any(session.lease for session in self.model.values()))
    @rule()
    def open_again(self):
        self.store.close()
        self.store = open_store(self.url, keep=KEEP, **keys_of(self.kind))

    @invariant()
    def same(self):
        if not hasattr(self, "store"):
            return
        for tenant in TENANTS:
            mine = {name: session for (owner, name), session in self.model.items() if owner == tenant}
            records = {record.id: record for record in self.store.sessions(tenant)}
            assert records.keys() == mine.keys()
            kept = 0
            for name, session in mine.items():
                record, state = self.store.load(tenant, name)
                assert record == records[name]
                assert (record.metadata, record.parent) == (session.metadata, session.parent)
                assert (state, record.tokens_seen, record.turns) == session.newest
                assert record.version == session.version
                commits = self.store.commits(tenant, name)
                kept += sum(commit.bytes for commit in commits)
                assert [c.version for c in commits] == sorted(session.versions, reverse=True)
                for version, (old, tokens, _) in session.versions.items():
                    assert self.store.load(tenant, name, version)[1] == old
                    assert next(c for c in commits if c.version == version).tokens_seen == tokens
            usage = self.store.usage(tenant)
            assert (usage.sessions, usage.bytes) == (len(mine), kept)


SETTINGS = settings(
    max_examples=12, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_is_a_dictionary(kind, tmp_path):
    with opened(kind, tmp_path):
        # Skips here where it cannot be opened, not inside.
        pass
    machine = type("Machine", (StoreMachine,), {"kind": kind})
    run_state_machine_as_test(machine, settings=SETTINGS)


@pytest.mark.parametrize(
    "kind, calls",
    [("embedded", 10_000), ("postgres", 2_000), pytest.param("postgres", 10_000, marks=pytest.mark.slow)],
)
def test_random_calls_leak_nothing(kind, calls, tmp_path):
    """Everything that comes back names the tenant that asked: states, records, metadata, lists, sums, errors."""
    rng = random.Random(3)
    tenants = [f"tenant-{i}" for i in range(6)]
    names = [f"id{i}" for i in range(12)]
    alive: dict[tuple[str, str], int] = {}
    seen = dict.fromkeys(("found", "missing"), 0)
    missing, refused = set(), set()
    with opened(kind, fast_folder(tmp_path), keep=2) as store:
        for _ in range(calls):
            tenant, name = rng.choice(tenants), rng.choice(names)
            action = rng.choice(["create", "get", "get", "load", "load", "commits", "list", "usage", "write", "other"])
            try:
                if action == "create" and rng.random() < 0.5:
                    record = store.create(tenant, session_id=name, metadata={"of": tenant})
                    alive[tenant, name] = 0
                    results = [record]
                elif action == "get":
                    results = [store.get(tenant, name)]
                elif action == "load":
                    record, state = store.load(tenant, name)
                    assert state == (b"state of " + tenant.encode() if record.version else b"")
                    results = [record]
                elif action == "commits":
                    store.commits(tenant, name)
                    results = []
                elif action == "list":
                    results = store.sessions(tenant, after=name if rng.random() < 0.5 else None, limit=5)
                elif action == "usage":
                    assert store.usage(tenant).sessions == sum(owner == tenant for owner, _ in alive)
                    results = []
                else:
                    results = change(store, rng, tenant, name, alive)
                for record in results:
                    assert record.tenant == tenant
                    assert (tenant, record.id) in alive
                    assert record.metadata == {"of": tenant}
                seen["found"] += 1
            except SessionNotFound as error:
                missing.add((tenant, name, (tenant, name) in alive, str(error)))
                seen["missing"] += 1
            except InvalidRequest as error:
                refused.add(str(error))
        assert not any(there or "tenant" in message for *_, there, message in missing)
        assert not any("tenant" in message for message in refused)
        for tenant in tenants:
            assert {r.id for r in store.sessions(tenant)} == {name for owner, name in alive if owner == tenant}
    assert min(seen.values()) > calls // 10


def change(store, rng, tenant, name, alive):
    state = b"state of " + tenant.encode()
    kind = rng.choice(["commit", "commit", "fork", "delete", "rollback"])
    if kind == "commit":
        record = store.commit(tenant, name, expected=alive.get((tenant, name), 0), state=state, tokens_seen=1)
    elif kind == "rollback":
        record = store.rollback(tenant, name, alive.get((tenant, name), 1))
    elif kind == "fork":
        twin = f"id{rng.randrange(12)}"
        record = store.fork(tenant, name, new_id=twin, metadata={"of": tenant})
    else:
        store.delete(tenant, name)
        del alive[tenant, name]
        return []
    alive[tenant, record.id] = record.version
    return [record]
