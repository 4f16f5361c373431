"""The manager: one writer a session, and whatever happens a session is at its last commit."""

import asyncio
import contextlib
import threading

import pytest

from mnemic.serving import manager as manager_module
from mnemic.serving.errors import (
    InvalidRequest,
    SessionBusy,
    SessionNotFound,
    SessionUnusable,
    StoreUnavailable,
    TooLarge,
)
from mnemic.serving.manager import Manager
from mnemic.serving.store import open_store
from tests.serving.serving_models import served_model


@pytest.fixture(scope="module")
def model():
    return served_model()


def managed(model, folder, talk, **options):
    """`await talk(manager)` with a session called s."""

    async def run():
        store = open_store(folder)
        with contextlib.suppress(InvalidRequest):
            store.create("t", session_id="s")
        manager = Manager(model, store, **{"wait": 5.0, **options})
        try:
            return await asyncio.wait_for(talk(manager), 30)
        finally:
            await manager.close()
            store.close()

    return asyncio.run(run())


async def turn(manager, ids, session="s"):
    """Reads ids, commits, and returns the stream."""
    async with manager.open("t", session) as open_turn:
        stream = manager.model.stream() if open_turn.stream is None else open_turn.stream.fork()
        stream.feed(ids)
        await open_turn.commit(stream, "test")
        return stream


def same(found, expected):
    assert found.to_bytes() == expected.to_bytes()


def test_the_model_is_fingerprinted_once(model, tmp_path, monkeypatch):
    taken, taking = [], manager_module.identity_of
    monkeypatch.setattr(manager_module, "identity_of", lambda model: taken.append(model) or taking(model))
    monkeypatch.setattr("mnemic.hosts.stream.identity_of", None)

    async def talk(manager):
        for _ in range(3):
            # Nothing is held, so every turn loads and checks what is stored.
            await turn(manager, [5, 6, 7])
        async with manager.open("t", "s") as found:
            return found.stream

    found = managed(model, tmp_path / "one", talk, device_bytes=0, host_bytes=0)
    monkeypatch.undo()
    assert len(taken) == 1
    same(found, model.stream().feed(iter([[5, 6, 7]] * 3)))


def test_a_commit_is_in_the_store_and_in_the_next_turn(model, tmp_path):
    async def talk(manager):
        await turn(manager, [5, 6, 7])
        await turn(manager, [8, 9])
        async with manager.open("t", "s") as last:
            same(last.stream, model.stream().feed([5, 6, 7]).feed([8, 9]))
            assert (last.record.version, last.record.tokens_seen) == (2, 5)
        return manager.store.load("t", "s")[1]

    assert managed(model, tmp_path, talk) == model.stream().feed([5, 6, 7]).feed([8, 9]).to_bytes()


def test_a_turn_that_fails_leaves_the_session_as_it_was(model, tmp_path):
    async def talk(manager):
        before = await turn(manager, [5, 6, 7])

        async def broken():
            async with manager.open("t", "s") as failed:
                failed.stream.fork().feed([8])
                raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            await broken()
        async with manager.open("t", "s") as after:
            same(after.stream, before)
            assert after.record.version == 1

    managed(model, tmp_path, talk)


def test_a_second_writer_waits_and_then_sees_what_the_first_wrote(model, tmp_path):
    async def talk(manager):
        order = []

        async def one(name, ids):
            async with manager.open("t", "s") as mine:
                order.append(f"{name} begins")
                stream = model.stream() if mine.stream is None else mine.stream.fork()
                await asyncio.sleep(0.05)
                await mine.commit(stream.feed(ids))
                order.append(f"{name} ends")

        await asyncio.gather(one("first", [5, 6]), one("second", [7]))
        assert order == ["first begins", "first ends", "second begins", "second ends"]
        async with manager.open("t", "s") as last:
            same(last.stream, model.stream().feed([5, 6]).feed([7]))

    managed(model, tmp_path, talk)


def test_a_writer_does_not_wait_for_ever(model, tmp_path):
    async def talk(manager):
        async with manager.open("t", "s"):
            with pytest.raises(SessionBusy):
                await turn(manager, [5])
        # Nor for another process.
        manager.store.acquire("t", "s", "somebody else", 60)
        with pytest.raises(SessionBusy):
            await turn(manager, [5])
        assert not manager._locks

    managed(model, tmp_path, talk, wait=0.1)


def test_other_sessions_do_not_wait(model, tmp_path):
    async def talk(manager):
        manager.store.create("t", session_id="other")
        async with manager.open("t", "s"):
            await asyncio.wait_for(turn(manager, [5], "other"), 2)

    managed(model, tmp_path, talk)


class Slow:
    """A store whose `method` waits until it is let go on."""

    def __init__(self, store, method):
        self.store, self.method = store, method
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name):
        found = getattr(self.store, name)
        if name != self.method:
            return found

        def slow(*args, **options):
            self.reached.set()
            assert self.go_on.wait(10)
            return found(*args, **options)

        return slow


@pytest.mark.parametrize("method, version", [("acquire", 1), ("load", 1), ("commit", 2)])
def test_a_caller_that_leaves_at_any_point_leaves_no_lease_and_no_half_commit(model, tmp_path, method, version):
    async def talk(manager):
        before = await turn(manager, [5, 6, 7])
        slow = manager.store = Slow(manager.store, method)
        manager._live.drop(("t", "s"))
        leaving = asyncio.create_task(turn(manager, [8, 9]))
        await asyncio.to_thread(slow.reached.wait, 10)
        leaving.cancel()
        await asyncio.sleep(0.02)
        manager.store = slow.store
        slow.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        # The next writer waits until the store is done with the one that left.
        async with manager.open("t", "s") as after:
            assert after.record.version == version
            same(after.stream, before if version == 1 else before.fork().feed([8, 9]))

    managed(model, tmp_path, talk)


def test_a_lease_is_renewed_while_a_turn_runs(model, tmp_path):
    async def talk(manager):
        async with manager.open("t", "s") as long:
            await asyncio.sleep(0.9)
            with pytest.raises(SessionBusy):
                manager.store.acquire("t", "s", "somebody else", 60)
            await long.commit(model.stream().feed([5]))

    managed(model, tmp_path, talk, lease=0.3)


def test_states_spill_to_host_memory_and_to_the_store_and_come_back_exactly(model, tmp_path):
    size = model.stream().feed([5]).state_bytes

    async def talk(manager):
        names = [f"s{i}" for i in range(6)]
        for name in names:
            manager.store.create("t", session_id=name)
        expected = {name: model.stream() for name in names}
        for i in range(3):
            for name in names:
                ids = [3 + i, 4 + int(name[1]), 9]
                same(await turn(manager, ids, name), expected[name].feed(ids))
        return manager.stats()

    stats = managed(model, tmp_path, talk, device_bytes=2 * size, host_bytes=2 * size + 40_000)
    assert stats.device >= 1
    assert stats.host >= 1
    assert stats.spilled > 6
    assert stats.dropped > 0
    assert stats.device_bytes <= 2 * size
    assert stats.host_bytes <= 2 * size + 40_000


def test_what_another_server_committed_is_loaded(model, tmp_path):
    async def talk(manager):
        await turn(manager, [5, 6])
        other = Manager(model, manager.store)
        await turn(other, [7])
        async with manager.open("t", "s") as mine:
            same(mine.stream, model.stream().feed([5, 6]).feed([7]))
        await other.close()

    managed(model, tmp_path, talk)


def test_an_id_used_again_does_not_bring_the_deleted_session_back(model, tmp_path):
    async def talk(manager):
        await turn(manager, [5, 6])
        # By another server, so that this one is not told.
        manager.store.delete("t", "s")
        manager.store.create("t", session_id="s")
        async with manager.open("t", "s") as fresh:
            assert fresh.stream is None
        await turn(manager, [7])
        await manager.delete("t", "s")
        assert manager.stats().device == 0
        with pytest.raises(SessionNotFound):
            await turn(manager, [7])

    managed(model, tmp_path, talk)


def test_a_store_that_fails_loses_nothing(model, tmp_path, monkeypatch):
    async def talk(manager):
        before = await turn(manager, [5, 6])

        def full(*args, **options):
            raise StoreUnavailable("The disk is full.")

        with monkeypatch.context() as patched:
            patched.setattr(manager.store, "commit", full)
            with pytest.raises(StoreUnavailable, match="full"):
                await turn(manager, [7])
        async with manager.open("t", "s") as after:
            same(after.stream, before)
        same(await turn(manager, [7]), before.fork().feed([7]))

    managed(model, tmp_path, talk)


def test_a_session_of_another_model_is_said_to_be_unusable(model, tmp_path):
    managed(model, tmp_path, lambda manager: turn(manager, [5, 6]))

    async def talk(manager):
        with pytest.raises(SessionUnusable, match="unchanged"):
            await turn(manager, [7])
        assert manager.store.get("t", "s").version == 1

    managed(served_model("rmt"), tmp_path, talk)


def test_rollback_is_a_new_version_with_the_old_state(model, tmp_path):
    async def talk(manager):
        first = await turn(manager, [5, 6])
        await turn(manager, [7])
        async with manager.open("t", "s", load=False) as back:
            assert (await back.rollback(1)).version == 3
        async with manager.open("t", "s") as now:
            same(now.stream, first)

    managed(model, tmp_path, talk)


def test_imports_are_checked(model, tmp_path):
    good = model.stream().feed([5, 6, 7]).to_bytes()

    async def talk(manager):
        record = await manager.take_in("t", good, 2**20, session_id="taken")
        assert (record.version, record.tokens_seen) == (1, 3)
        async with manager.open("t", "taken") as taken:
            same(taken.stream, model.stream().feed([5, 6, 7]))
        with pytest.raises(TooLarge):
            await manager.take_in("t", good, len(good) - 1)
        batch = model.stream(batch_size=2).feed([[5, 6], [7, 8]]).to_bytes()
        foreign = served_model("rmt").stream().feed([5]).to_bytes()
        for data in (b"", b"no stream", good[:-1], good + b"x", batch, foreign):
            with pytest.raises(InvalidRequest):
                await manager.take_in("t", data, 2**20)
        assert {r.id for r in manager.store.sessions("t")} == {"s", "taken"}

    managed(model, tmp_path, talk)
