"""The faster store: commits return at once, and everything else is as if they had been written then."""

import threading

import pytest

from mnemic.serving.errors import SessionBusy, StoreUnavailable, VersionConflict
from mnemic.serving.store import open_store
from mnemic.serving.write_behind import WriteBehind
from tests.serving.http_tests import client_of, complete, ids, new_session, refused
from tests.serving.serving_models import served_model


class Gate:
    """A store whose commits wait, or fail."""

    def __init__(self, store):
        self.store, self.open, self.failing = store, threading.Event(), False

    def __getattr__(self, name):
        return getattr(self.store, name)

    def commit(self, *args, **options):
        assert self.open.wait(10)
        if self.failing:
            raise StoreUnavailable("The disk is full.")
        return self.store.commit(*args, **options)


@pytest.fixture
def gate(tmp_path):
    made = Gate(open_store(tmp_path))
    made.store.create("t", session_id="s", ttl=60)
    return made


@pytest.fixture
def behind(gate):
    made = WriteBehind(gate)
    yield made
    gate.open.set()
    gate.failing = False
    made.close()


def commit(store, expected=0, state=b"state", **more):
    return store.commit("t", "s", expected=expected, state=state, tokens_seen=5, **more)


def test_a_commit_returns_before_it_is_written_and_tells_what_will_be(gate, behind):
    said = commit(behind)
    assert gate.store.get("t", "s").version == 0
    gate.open.set()
    stored = behind.get("t", "s")
    assert stored == gate.store.get("t", "s")
    assert (said.version, said.turns, said.tokens_seen, said.state_bytes) == (1, 1, 5, 5)
    assert said.expires == pytest.approx(stored.expires, abs=5)
    assert stored.version == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.get("t", "s").version,
        lambda store: store.load("t", "s")[0].version,
        lambda store: store.commits("t", "s")[0].version,
        lambda store: store.sessions("t")[0].version,
        lambda store: store.fork("t", "s", new_id="twin").version,
        lambda store: store.usage("t").bytes // 5,
        lambda store: bool(store.acquire("t", "s", "me", 9)),
        lambda store: commit(store, 1).version - 1,
        lambda store: store.rollback("t", "s", 1).version - 1,
    ],
)
def test_who_asks_for_the_session_waits_for_its_commit(gate, behind, call):
    commit(behind)
    threading.Timer(0.05, gate.open.set).start()
    assert call(behind) == 1


def test_a_lease_is_given_back_after_the_commit_that_it_covers(gate, behind):
    lease = behind.acquire("t", "s", "me", 60)
    commit(behind, lease=lease)
    behind.release(lease)
    with pytest.raises(SessionBusy):
        gate.store.acquire("t", "s", "another", 60)
    gate.open.set()
    behind.acquire("t", "s", "me again", 60)
    assert gate.store.get("t", "s").version == 1


def test_what_cannot_be_written_is_tried_again_and_its_session_is_not_available(gate, behind):
    gate.failing = True
    gate.open.set()
    commit(behind)
    with pytest.raises(StoreUnavailable):
        behind.get("t", "s")
    with pytest.raises(StoreUnavailable):
        commit(behind, 1)
    gate.failing = False
    assert behind.get("t", "s").version == 1


def test_a_commit_that_is_refused_is_told(gate, behind):
    lost = []
    behind.lost = lambda *key: lost.append(key)
    commit(behind)
    # Another server was faster.
    gate.store.commit("t", "s", expected=0, state=b"theirs", tokens_seen=9)
    gate.open.set()
    assert behind.load("t", "s")[1] == b"theirs"
    assert lost == [("t", "s")]
    with pytest.raises(VersionConflict):
        commit(behind, 0)


def test_more_than_may_wait_is_written_at_once(gate):
    gate.open.set()
    behind = WriteBehind(gate, most=4)
    commit(behind)
    assert gate.store.get("t", "s").version == 1
    behind.close()


def test_closing_writes_everything(gate, tmp_path):
    behind = WriteBehind(gate)
    commit(behind)
    threading.Timer(0.05, gate.open.set).start()
    behind.close()
    again = open_store(tmp_path)
    assert again.load("t", "s")[1] == b"state"
    again.close()


def test_a_server_in_the_fast_mode_answers_alike_and_keeps_everything(tmp_path):
    model, prompts = served_model(), [[5, 9, 12], [20, 21], [7], [30, 31]]
    stream, found = model.stream(), []
    expected = [stream.generate([p], return_ids=True, max_new_tokens=4, do_sample=False) for p in prompts]
    for part in (prompts[:2], prompts[2:]):
        with client_of(tmp_path, model, durability="fast") as client:
            if not found:
                session = new_session(client)
            found += [ids(complete(client, prompt, session=session)) for prompt in part]
            assert client.get(f"/v1/sessions/{session}").json()["version"] == len(found)
    assert found == expected
    with client_of(tmp_path, model) as client:
        assert client.get(f"/v1/sessions/{session}").json()["tokens_seen"] == stream.tokens_seen
        client.delete(f"/v1/sessions/{session}")
        refused(complete(client, [5], session=session), 404)
