"""From session ids to streams: one writer a session, states loaded when they are needed and stored before they count.

Calls of the store block, so they run in threads of their own.
"""

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cached_property, partial
from typing import Any, ParamSpec, TypeVar

from ..core.errors import FileFormatError, InputError, StateError
from ..hosts.saving import identity_of
from ..hosts.stream import Stream
from .errors import InvalidRequest, ServingError, SessionBusy, SessionUnusable, StoreUnavailable, TooLarge
from .live import Key, Live, LiveStats
from .store import SessionRecord, SessionStore
from .turns import Turn

P = ParamSpec("P")
T = TypeVar("T")
_THREADS = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5


class Manager:
    """Sessions of one model in one event loop.

    Args:
        model: attached, its weights stay as they are from the first session on. store: see `SessionStore`. tokenizer:
            of the streams.
        wait: seconds that a writer waits for another one. lease: seconds that a session stays leased to a process that
            is gone; renewed while a turn runs.
        device_bytes, host_bytes: see `Live`.
    """

    def __init__(
        self,
        model: Any,
        store: SessionStore,
        *,
        tokenizer: Any = None,
        wait: float = 30.0,
        lease: float = 60.0,
        device_bytes: int = 2**30,
        host_bytes: int = 2**32,
    ):
        self.model, self.store, self.tokenizer = model, store, tokenizer
        self.wait, self.lease = wait, lease
        self.owner = f"{socket.gethostname()[:60]}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._live = Live(device_bytes, host_bytes, self._bytes)
        self._threads = ThreadPoolExecutor(_THREADS, "mnemic-store")
        self._locks: dict[Key, tuple[asyncio.Lock, int]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    def stats(self) -> LiveStats:
        return self._live.stats()

    async def call(self, method: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """A blocking call, such as `manager.call(manager.store.get, tenant, session_id)`."""
        return await self._run(method, *args, **options)

    @asynccontextmanager
    async def open(self, tenant: str, session_id: str, *, load: bool = True) -> AsyncIterator[Turn]:
        """The session for one writer; a second one waits. Whatever happens inside, it ends at its last commit.

        Args:
            load: whether the turn needs its stream.

        Raises:
            SessionNotFound: no such session of this tenant. SessionBusy: the other writer took too long.
            SessionUnusable, SessionDamaged: its state cannot be used. StoreUnavailable: the store fails.
        """
        until = time.monotonic() + self.wait
        async with self._locked((tenant, session_id), until) as unlock:
            # A caller that leaves at this point must not leave a lease behind.
            beginning = self._detached(self._begin(tenant, session_id, until, load))
            try:
                turn = await asyncio.shield(beginning)
            except asyncio.CancelledError:
                self._detached(self._abandoned(beginning, unlock.pop_all()))
                raise
            renewing = self._detached(self._renewed(turn))
            try:
                yield turn
            finally:
                renewing.cancel()
                await asyncio.shield(self._detached(self._ended(turn, unlock.pop_all())))

    async def look(self, tenant: str, session_id: str) -> tuple[SessionRecord, Stream, tuple[int, Stream] | None]:
        """The session as of its last commit, without taking it: the record, its stream, and the version kept before
        that with its stream, None where there is none. Nobody changes these streams. Raises as `open`, but never
        SessionBusy."""
        return await self._run(self._looked, tenant, session_id)

    def write(self, turn: Turn, stream: Stream, note: str) -> "asyncio.Future[SessionRecord]":
        return self._run(self._stored, turn, stream, note)

    def write_rollback(self, turn: Turn, version: int) -> "asyncio.Future[SessionRecord]":
        return self._run(self._rolled_back, turn, version)

    async def take_in(self, tenant: str, data: bytes, max_bytes: int, **create: Any) -> SessionRecord:
        """A new session from a saved stream; `create`: see `SessionStore.create`.

        Raises:
            TooLarge, InvalidRequest: no stream of this model, with the reason; or as `create`.
        """
        return await self._run(self._taken_in, tenant, data, max_bytes, create)

    def forget(self, tenant: str, session_id: str) -> None:
        """Load the session anew when it is needed next. From any thread."""
        self._live.drop((tenant, session_id))

    async def delete(self, tenant: str, session_id: str) -> None:
        """At once; a turn that runs ends with SessionNotFound. Raises `SessionNotFound`."""
        await self._run(self.store.delete, tenant, session_id)
        self.forget(tenant, session_id)

    async def close(self) -> None:
        """Wait for what is being written, not for other writers. The store stays open."""
        self._closing = True
        while self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self._threads.shutdown)

    # In the event loop

    def _run(self, method: Callable[P, T], *args: P.args, **options: P.kwargs) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._threads, partial(method, *args, **options))

    def _detached(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @asynccontextmanager
    async def _locked(self, key: Key, until: float) -> AsyncIterator[contextlib.ExitStack]:
        """Waits for this process's other writers. The stack gives the session free; it may be passed on."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = lock, users + 1
        with contextlib.ExitStack() as unlock:
            unlock.callback(self._unused, key)
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    await lock.acquire()
            except TimeoutError as error:
                raise SessionBusy(f"Somebody else is writing to session {key[1]}; try again later.") from error
            unlock.callback(lock.release)
            yield unlock

    def _unused(self, key: Key) -> None:
        lock, users = self._locks[key]
        if users > 1:
            self._locks[key] = lock, users - 1
        else:
            del self._locks[key]

    async def _begin(self, tenant: str, session_id: str, until: float, load: bool) -> Turn:
        pause = _FIRST_PAUSE
        while True:
            try:
                lease = await self._run(self.store.acquire, tenant, session_id, self.owner, self.lease)
                break
            except SessionBusy:
                if self._closing or time.monotonic() + pause > until:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        try:
            record, stream = await self._run(self._loaded, tenant, session_id, load)
        except BaseException:
            await self._released(lease)
            raise
        return Turn(self, record, stream, lease)

    async def _renewed(self, turn: Turn) -> None:
        while True:
            await asyncio.sleep(self.lease / 3)
            try:
                turn.lease = await self._run(self.store.renew, turn.lease, self.lease)
            except StoreUnavailable:
                continue
            except ServingError:
                # Taken over or deleted: the store refuses what this turn commits.
                return

    async def _abandoned(self, beginning: "asyncio.Task[Turn]", unlock: contextlib.ExitStack) -> None:
        with unlock, contextlib.suppress(ServingError):
            await self._released((await beginning).lease)

    async def _ended(self, turn: Turn, unlock: contextlib.ExitStack) -> None:
        with unlock:
            await turn.settle()
            await self._released(turn.lease)

    async def _released(self, lease: Any) -> None:
        # A lease that cannot be given back runs out.
        with contextlib.suppress(ServingError):
            await self._run(self.store.release, lease)

    # In threads

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity_of(self.model)

    def _bytes(self, stream: Stream) -> bytes:
        return stream.to_bytes(identity=self._identity)

    def _stream(self, data: bytes, what: str) -> Stream:
        return Stream.from_bytes(self.model, data, tokenizer=self.tokenizer, what=what, identity=self._identity)

    def _loaded(self, tenant: str, session_id: str, load: bool) -> tuple[SessionRecord, Stream | None]:
        record = self.store.get(tenant, session_id)
        if not record.version or not load:
            return record, None
        held = self._live.get((tenant, session_id), (record.created, record.version))
        if isinstance(held, Stream):
            return record, held
        if held is None:
            record, held = self.store.load(tenant, session_id)
        stream = self._stored_stream(session_id, held)
        self._live.put((tenant, session_id), (record.created, record.version), stream)
        return record, stream

    def _stored_stream(self, session_id: str, data: bytes) -> Stream:
        try:
            return self._stream(data, f"The state of session {session_id}")
        except (FileFormatError, StateError) as error:
            raise SessionUnusable(f"{error} The session itself is unchanged.") from error

    def _looked(self, tenant: str, session_id: str) -> tuple[SessionRecord, Stream, tuple[int, Stream] | None]:
        record = self.store.get(tenant, session_id)
        if not record.version:
            return record, Stream(self.model), None
        held = self._live.get((tenant, session_id), (record.created, record.version))
        if held is None:
            record, held = self.store.load(tenant, session_id)
        stream = held if isinstance(held, Stream) else self._stored_stream(session_id, held)
        versions = (commit.version for commit in self.store.commits(tenant, session_id))
        earlier = max((version for version in versions if version < record.version), default=None)
        if earlier is None:
            return record, stream, None
        try:
            _, data = self.store.load(tenant, session_id, earlier)
        except InvalidRequest:
            # Later commits have pushed it out meanwhile.
            return record, stream, None
        return record, stream, (earlier, self._stored_stream(session_id, data))

    def _stored(self, turn: Turn, stream: Stream, note: str) -> SessionRecord:
        before = turn.record
        # First held, then committed: a store that writes later may say at any time that it could not.
        self._live.put(turn.key, (before.created, before.version + 1), stream)
        try:
            return self.store.commit(
                before.tenant,
                before.id,
                expected=before.version,
                state=self._bytes(stream),
                tokens_seen=_seen(stream),
                note=note,
                lease=turn.lease,
            )
        except BaseException:
            self._live.drop(turn.key)
            raise

    def _rolled_back(self, turn: Turn, version: int) -> SessionRecord:
        return self.store.rollback(*turn.key, version, lease=turn.lease)

    def _taken_in(self, tenant: str, data: bytes, max_bytes: int, create: dict[str, Any]) -> SessionRecord:
        if len(data) > max_bytes:
            raise TooLarge(f"The state has {len(data):,} bytes, the server takes {max_bytes:,}.")
        try:
            stream = self._stream(data, "The imported state")
        except (FileFormatError, StateError, InputError) as error:
            raise InvalidRequest(str(error)) from error
        if stream.batch_size != 1:
            raise InvalidRequest(f"The imported state has {stream.batch_size} rows, expected one.")
        record = self.store.create(tenant, **create)
        try:
            # Written anew, so that only what was understood is kept.
            return self.store.commit(
                tenant, record.id, expected=0, state=self._bytes(stream), tokens_seen=_seen(stream), note="import"
            )
        except BaseException:
            with contextlib.suppress(ServingError):
                self.store.delete(tenant, record.id)
            raise


def _seen(stream: Stream) -> int:
    return int(stream.cache.seen[0])
