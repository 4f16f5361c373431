"""What every session store does."""

import os
import threading
import time

import pytest

from mnemic.serving.errors import InvalidRequest, SessionBusy, SessionNotFound, StoreUnavailable, VersionConflict
from mnemic.serving.store import Usage, open_store

from .store_cases import KINDS, keys_of, opened, url_of

A, B = "tenant-a", "tenant-b"


@pytest.fixture(params=KINDS)
def store(request, tmp_path):
    with opened(request.param, tmp_path, keep=3) as made:
        yield made


def commit(store, session_id="s", expected=0, state=b"state", tokens=1, **more):
    return store.commit(A, session_id, expected=expected, state=state, tokens_seen=tokens, **more)


def test_create_and_get(store):
    before = time.time()
    made = store.create(A, session_id="s", ttl=60, metadata={"title": "naïve ☃"})
    assert store.get(A, "s") == made
    assert (made.id, made.tenant, made.version, made.turns, made.tokens_seen, made.state_bytes) == ("s", A, 0, 0, 0, 0)
    assert made.metadata == {"title": "naïve ☃"}
    assert made.parent is None
    assert before - 1 <= made.created == made.used <= time.time() + 1
    assert made.expires == pytest.approx(made.created + 60)
    assert store.load(A, "s") == (made, b"")
    assert store.commits(A, "s") == []


def test_ids_are_made_and_taken_once(store):
    ids = {store.create(A).id for _ in range(5)}
    assert len(ids) == 5
    store.create(A, session_id="s")
    with pytest.raises(InvalidRequest, match="choose another id"):
        store.create(A, session_id="s")
    # Of another tenant the same id says nothing.
    assert store.create(B, session_id="s").tenant == B


def test_commit_and_load(store):
    store.create(A, session_id="s")
    one = commit(store, state=b"one", tokens=10, note="first")
    two = commit(store, expected=1, state=b"two two", tokens=25)
    assert (one.version, one.turns, one.tokens_seen) == (1, 1, 10)
    assert (two.version, two.turns, two.tokens_seen) == (2, 2, 25)
    assert store.get(A, "s") == two
    assert store.load(A, "s") == (two, b"two two")
    assert store.load(A, "s", 1) == (two, b"one")
    listed = store.commits(A, "s")
    assert [(c.version, c.tokens_seen, c.note) for c in listed] == [(2, 25, ""), (1, 10, "first")]
    assert listed[0].created == two.used
    assert listed[0].bytes == two.state_bytes == store.usage(A).bytes - listed[1].bytes


def test_commit_of_an_old_version_is_refused(store):
    store.create(A, session_id="s")
    commit(store)
    for expected in (0, 2):
        with pytest.raises(VersionConflict, match="at version 1"):
            commit(store, expected=expected, state=b"other")
    assert store.load(A, "s")[1] == b"state"
    assert store.usage(A).sessions == 1


def test_only_the_newest_versions_are_kept(store):
    store.create(A, session_id="s")
    for version in range(6):
        commit(store, expected=version, state=b"%d" % version * 100)
    assert [c.version for c in store.commits(A, "s")] == [6, 5, 4]
    assert store.load(A, "s", 4)[1] == b"3" * 100
    for version in (3, 0, 7):
        with pytest.raises(InvalidRequest, match="has no version") as caught:
            store.load(A, "s", version)
        assert caught.value.param == "version"
    assert store.usage(A) == Usage(sessions=1, bytes=3 * store.get(A, "s").state_bytes)


def test_rollback_is_a_new_version(store):
    store.create(A, session_id="s")
    for version in range(3):
        commit(store, expected=version, state=b"state %d" % (version + 1), tokens=10 * (version + 1))
    back = store.rollback(A, "s", 1)
    assert (back.version, back.turns, back.tokens_seen) == (4, 1, 10)
    assert store.load(A, "s") == (back, b"state 1")
    # Nothing is lost, not even the version that has to make room for its own copy.
    assert [c.version for c in store.commits(A, "s")] == [4, 3, 2]
    assert store.load(A, "s", 3)[1] == b"state 3"
    assert commit(store, expected=4, state=b"other way").turns == 2
    with pytest.raises(InvalidRequest, match="has no version 1"):
        store.rollback(A, "s", 1)


def test_fork(store):
    store.create(A, session_id="s", ttl=60, metadata={"k": "v"})
    empty = store.fork(A, "s", new_id="early")
    assert (empty.parent, empty.version) == ("s", 0)
    commit(store, state=b"one", tokens=3)
    two = commit(store, expected=1, state=b"two", tokens=5)
    twin = store.fork(A, "s", new_id="twin", metadata={"of": "s"})
    assert (twin.parent, twin.version, twin.turns, twin.tokens_seen, twin.expires) == ("s", 1, 2, 5, None)
    assert twin.metadata == {"of": "s"}
    assert store.load(A, "twin") == (twin, b"two")
    assert store.load(A, store.fork(A, "s", 1).id)[1] == b"one"
    assert store.get(A, "s") == two
    # Each goes its own way, and outlives the other.
    store.commit(A, "twin", expected=1, state=b"three", tokens_seen=6)
    store.delete(A, "s")
    assert store.load(A, "twin")[1] == b"three"
    assert store.load(A, "twin", 1)[1] == b"two"
    with pytest.raises(InvalidRequest, match="choose another id"):
        store.fork(A, "twin", new_id="early")


def test_listing_pages_newest_first(store):
    ids = [store.create(A).id for _ in range(7)]
    store.create(B)
    assert [r.id for r in store.sessions(A)] == ids[::-1]
    pages, after = [], None
    while page := store.sessions(A, after=after, limit=3):
        pages.append([r.id for r in page])
        after = page[-1].id
    assert [i for page in pages for i in page] == ids[::-1]
    assert [len(page) for page in pages] == [3, 3, 1]
    for after in ("nobody", "../x", store.sessions(B)[0].id):
        with pytest.raises(InvalidRequest, match="is no session"):
            store.sessions(A, after=after)
    for limit in (0, 1001, True, "3"):
        with pytest.raises(InvalidRequest, match="limit"):
            store.sessions(A, limit=limit)


def test_usage_counts_every_version_of_one_tenant(store):
    assert store.usage(A) == Usage(sessions=0, bytes=0)
    store.create(A, session_id="s")
    size = commit(store, state=b"x" * 1000).state_bytes
    assert size >= 1000
    store.fork(A, "s")
    store.create(B)
    assert store.usage(A) == Usage(sessions=2, bytes=2 * size)
    store.delete(A, "s")
    assert store.usage(A) == Usage(sessions=1, bytes=size)
    assert store.usage(B) == Usage(sessions=1, bytes=0)


def test_expiry_slides_with_every_change(store):
    store.create(A, session_id="s", ttl=100)
    store.create(A, session_id="stays")
    store.create(B, session_id="s", ttl=50)
    time.sleep(0.01)
    changed = commit(store)
    assert changed.expires == pytest.approx(changed.used + 100)
    assert changed.used > changed.created
    assert store.expire(changed.created) == 0
    assert store.expire(changed.expires - 1) == 1
    with pytest.raises(SessionNotFound):
        store.get(B, "s")
    lease = store.acquire(A, "s", "owner", 60)
    assert store.expire(changed.expires) == 0
    store.release(lease)
    assert store.expire(changed.expires) == 1
    assert [r.id for r in store.sessions(A)] == ["stays"]
    assert store.usage(A).bytes == 0


def test_deleted_is_gone(store):
    store.create(A, session_id="s")
    commit(store)
    store.delete(A, "s")
    with pytest.raises(SessionNotFound):
        store.delete(A, "s")
    # A new session of that name knows nothing of the old one.
    assert store.create(A, session_id="s").version == 0
    assert store.load(A, "s")[1] == b""


def every_call(store, tenant, session_id):
    """All that names a session."""
    return [
        lambda: store.get(tenant, session_id),
        lambda: store.commit(tenant, session_id, expected=1, state=b"x", tokens_seen=1),
        lambda: store.load(tenant, session_id),
        lambda: store.load(tenant, session_id, 1),
        lambda: store.commits(tenant, session_id),
        lambda: store.rollback(tenant, session_id, 1),
        lambda: store.fork(tenant, session_id),
        lambda: store.acquire(tenant, session_id, "owner", 1),
        lambda: store.delete(tenant, session_id),
    ]


def test_another_tenants_session_does_not_exist(store):
    record = store.create(A, session_id="s")
    commit(store)
    record = store.get(A, "s")
    messages = set()
    for missing in ("s", "never"):
        for call in every_call(store, B, missing):
            with pytest.raises(SessionNotFound) as caught:
                call()
            messages.add(str(caught.value).replace(repr(missing), "ID"))
    assert len(messages) == 1
    assert store.sessions(B) == []
    assert store.usage(B) == Usage(sessions=0, bytes=0)
    assert store.load(A, "s") == (record, b"state")


WRONG_IDS = [
    "../x", "..", ".", "", "a/b", "a\\b", "/etc/passwd", "C:x", "a\0b", "\0", "x" * 129, "x" * 100_000, "naïve",
    "\u202e", "\ud800", "a b", "s\n", "%2e%2e", "'; DROP TABLE sessions; --", ".hidden", None, 7, b"s", ["s"],
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_IDS, ids=lambda w: ascii(w)[:20])
def test_ids_that_are_none(store, wrong):
    for call in every_call(store, A, wrong):
        with pytest.raises(SessionNotFound) as caught:
            call()
        assert len(str(caught.value)) < 200
    if wrong is not None:
        for call in (
            lambda: store.create(A, session_id=wrong),
            lambda: store.fork(A, "s", new_id=wrong),
        ):
            with pytest.raises(InvalidRequest) as caught:
                call()
            assert caught.value.param == "session_id"
    assert store.sessions(A) == []


@pytest.mark.parametrize("wrong", ["", "x" * 129, "a\0b", "\ud800", None, 3], ids=ascii)
def test_tenants_that_are_none(store, wrong):
    for call in (*every_call(store, wrong, "s"), lambda: store.create(wrong), lambda: store.usage(wrong)):
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert caught.value.param == "tenant"


def test_values_that_cannot_be_used(store):
    store.create(A, session_id="s")
    for ttl in (0, -1, float("nan"), float("inf"), "60", True):
        with pytest.raises(InvalidRequest, match="ttl"):
            store.create(A, ttl=ttl)
    for metadata in ({"k": 1}, {1: "v"}, {"k": "\0"}, {"k": "\ud800"}, ["k"], {"k": "x" * 20_000}):
        with pytest.raises(InvalidRequest, match="metadata"):
            store.create(A, metadata=metadata)
    for values in (
        {"expected": -1}, {"expected": "0"}, {"tokens": -1}, {"tokens": 1.5}, {"state": b""}, {"state": "text"},
        {"note": "\0"}, {"note": None}, {"tokens": 2**80},
    ):  # fmt: skip
        with pytest.raises(InvalidRequest):
            commit(store, **values)
    for owner, seconds in (("", 1), ("o\0", 1), ("o", 0), ("o", float("nan"))):
        with pytest.raises(InvalidRequest):
            store.acquire(A, "s", owner, seconds)
    assert store.get(A, "s").version == 0
    assert len(store.sessions(A)) == 1


def test_one_lease_at_a_time(store):
    store.create(A, session_id="s")
    lease = store.acquire(A, "s", "one", 60)
    for owner in ("one", "two"):
        with pytest.raises(SessionBusy):
            store.acquire(A, "s", owner, 60)
    with pytest.raises(SessionBusy):
        commit(store)
    with pytest.raises(SessionBusy):
        store.rollback(A, "s", 1)
    commit(store, lease=lease)
    assert store.rollback(A, "s", 1, lease=lease).version == 2
    store.release(lease)
    store.release(lease)
    for call in (lambda: commit(store, expected=2, lease=lease), lambda: store.renew(lease, 1)):
        with pytest.raises(SessionBusy, match="taken over or released"):
            call()
    commit(store, expected=2)
    # A session of another tenant with this name is another session.
    store.create(B, session_id="s")
    store.acquire(A, "s", "one", 60)
    store.acquire(B, "s", "two", 60)


def test_a_lease_that_ran_out_is_taken_over(store):
    store.create(A, session_id="s")
    first = store.acquire(A, "s", "one", 0.02)
    time.sleep(0.05)
    # Late, but nobody else came.
    commit(store, lease=first)
    first = store.renew(first, 0.02)
    time.sleep(0.05)
    second = store.acquire(A, "s", "two", 60)
    for call in (
        lambda: commit(store, expected=1, state=b"fenced", lease=first),
        lambda: store.rollback(A, "s", 1, lease=first),
        lambda: store.renew(first, 60),
    ):
        with pytest.raises(SessionBusy, match="taken over"):
            call()
    store.release(first)
    with pytest.raises(SessionBusy):
        store.acquire(A, "s", "three", 1)
    commit(store, expected=1, state=b"second", lease=second)
    assert store.load(A, "s")[1] == b"second"


def test_a_lease_ends_with_its_session(store):
    store.create(A, session_id="s")
    lease = store.acquire(A, "s", "one", 60)
    store.delete(A, "s")
    with pytest.raises(SessionNotFound):
        commit(store, lease=lease)
    store.create(A, session_id="s")
    with pytest.raises(SessionBusy):
        commit(store, lease=lease)
    store.acquire(A, "s", "two", 60)


def test_audit(store):
    store.create(A, session_id="s")
    store.audit(A, "create", "s", "by key 7")
    store.audit(A, "login")
    store.audit(B, "create", "t")
    store.delete(A, "s")
    entries = store.audited(A)
    assert [(e.action, e.session_id, e.detail) for e in entries] == [("login", None, ""), ("create", "s", "by key 7")]
    assert entries[1].at <= entries[0].at <= time.time() + 1
    assert len(store.audited(A, limit=1)) == 1
    assert [e.session_id for e in store.audited(B)] == ["t"]
    for wrong in (("",), ("x", "s", "d" * 5000), ("x", 7)):
        with pytest.raises(InvalidRequest):
            store.audit(A, *wrong)


def test_closed(store):
    store.create(A, session_id="s")
    store.close()
    store.close()
    for call in every_call(store, A, "s"):
        with pytest.raises(StoreUnavailable):
            call()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_committed_is_there_when_opened_again(kind, tmp_path):
    url, keys = url_of(kind, tmp_path), keys_of(kind)
    store = open_store(url, keep=3, **keys)
    store.create(A, session_id="s", ttl=60, metadata={"k": "v"})
    # As large as several pieces of a file or a table are.
    large = os.urandom(3_000_000)
    record = commit(store, state=large)
    store.close()
    store = open_store(url, keep=3, **keys)
    try:
        assert store.load(A, "s") == (record, large)
    finally:
        store.close()


def test_threads_on_one_session_never_mix(store):
    store.create(A, session_id="s")
    done, errors = [], []

    def work(me):
        try:
            made = 0
            while made < 5:
                record, _ = store.load(A, "s")
                mine = b"%d:%d;" % (me, record.version + 1) * 500
                try:
                    after = store.commit(A, "s", expected=record.version, state=mine, tokens_seen=record.version + 1)
                except VersionConflict:
                    continue
                made += 1
                done.append((after.version, mine))
        except Exception as error:
            errors.append(error)

    run(work)
    assert errors == []
    assert sorted(version for version, _ in done) == list(range(1, 41))
    states = dict(done)
    record = store.get(A, "s")
    assert (record.version, record.turns, record.tokens_seen) == (40, 40, 40)
    for kept in store.commits(A, "s"):
        assert store.load(A, "s", kept.version)[1] == states[kept.version]


def test_threads_on_their_own_sessions(store):
    errors = []

    def work(me):
        try:
            name, tenant = f"s{me}", f"tenant-{me % 3}"
            store.create(tenant, session_id=name)
            for version in range(6):
                state = b"%d:%d;" % (me, version) * 1000
                store.commit(tenant, name, expected=version, state=state, tokens_seen=version)
                assert store.load(tenant, name)[1] == state
                store.delete(tenant, store.fork(tenant, name).id)
            store.rollback(tenant, name, 5)
        except Exception as error:
            errors.append(error)

    run(work)
    assert errors == []
    for me in range(8):
        record, state = store.load(f"tenant-{me % 3}", f"s{me}")
        assert record.version == 7
        assert state == b"%d:4;" % me * 1000
    assert sum(store.usage(f"tenant-{t}").sessions for t in range(3)) == 8


def run(work):
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
