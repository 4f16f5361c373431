"""A faster store: commits return before they are durable, and are written in the order in which they came.

A crash loses what was not written yet, a fraction of a second where the disk keeps up; each session is then at an
earlier commit, whole. Whoever asks for a session waits until its last commit is written, so everything else is as with
the store underneath.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from .errors import ServingError, StoreUnavailable
from .store import AuditEntry, Commit, Lease, SessionRecord, SessionStore, Usage
from .store.checks import check_expected

T = TypeVar("T")
_RETRY_SECONDS = 0.5
_log = logging.getLogger("mnemic.serving")


@dataclass(eq=False)
class _Pending:
    write: Callable[[], SessionRecord]
    size: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: bool = False
    released: list[Lease] = field(default_factory=list)


class WriteBehind:
    """
    Args:
        store: what it writes to; closed with it. most: bytes that may wait to be written; a commit beyond them is
            written before it returns.

    lost: called with tenant and session where a commit that had returned was refused, in any thread.

    A commit that cannot be written is tried again, and until then its session is not available; one that the store
    refuses (the session was deleted, or taken over by another server) is dropped, with a warning in the log.
    """

    def __init__(self, store: SessionStore, *, most: int = 256 * 2**20):
        self.store, self.most = store, most
        self.lost: Callable[[str, str], object] = lambda tenant, session_id: None
        self._pending: OrderedDict[tuple[str, str], _Pending] = OrderedDict()
        self._bytes = 0
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mnemic-write-behind", daemon=True)
        self._thread.start()

    @property
    def unwritten(self) -> tuple[int, int]:
        """Commits that wait to be written, and their bytes."""
        with self._wake:
            return len(self._pending), self._bytes

    def commit(
        self,
        tenant: str,
        session_id: str,
        *,
        expected: int,
        state: bytes,
        tokens_seen: int,
        note: str = "",
        lease: Lease | None = None,
    ) -> SessionRecord:
        def write() -> SessionRecord:
            return self.store.commit(
                tenant, session_id, expected=expected, state=state, tokens_seen=tokens_seen, note=note, lease=lease
            )

        key = (tenant, session_id)
        self._settle(key)
        with self._wake:
            direct = self._closing or self._bytes + len(state) > self.most
        if direct:
            return write()
        record = self.store.get(tenant, session_id)
        check_expected(session_id, record.version, expected)
        with self._wake:
            self._pending[key] = _Pending(write, len(state))
            self._bytes += len(state)
            self._wake.notify()
        used = time.time()
        return replace(
            record,
            version=expected + 1,
            used=used,
            expires=None if record.expires is None else record.expires - record.used + used,
            turns=record.turns + 1,
            tokens_seen=tokens_seen,
            state_bytes=len(state),
        )

    # Whatever needs a session, once it is written

    def get(self, tenant: str, session_id: str) -> SessionRecord:
        return self._settled(self.store.get, tenant, session_id)

    def load(self, tenant: str, session_id: str, version: int | None = None) -> tuple[SessionRecord, bytes]:
        return self._settled(self.store.load, tenant, session_id, version)

    def commits(self, tenant: str, session_id: str) -> list[Commit]:
        return self._settled(self.store.commits, tenant, session_id)

    def rollback(self, tenant: str, session_id: str, version: int, *, lease: Lease | None = None) -> SessionRecord:
        return self._settled(self.store.rollback, tenant, session_id, version, lease=lease)

    def fork(self, tenant: str, session_id: str, version: int | None = None, **create: Any) -> SessionRecord:
        return self._settled(self.store.fork, tenant, session_id, version, **create)

    def delete(self, tenant: str, session_id: str) -> None:
        self._settled(self.store.delete, tenant, session_id)

    def acquire(self, tenant: str, session_id: str, owner: str, seconds: float) -> Lease:
        return self._settled(self.store.acquire, tenant, session_id, owner, seconds)

    def release(self, lease: Lease) -> None:
        """After the commit that it covers."""
        with self._wake:
            pending = self._pending.get((lease.tenant, lease.session_id))
            if pending is not None:
                # Without waiting for it: an answer ends here.
                pending.released.append(lease)
                return
        self.store.release(lease)

    def sessions(self, tenant: str, *, after: str | None = None, limit: int = 100) -> list[SessionRecord]:
        self._settle_all(tenant)
        return self.store.sessions(tenant, after=after, limit=limit)

    def usage(self, tenant: str) -> Usage:
        self._settle_all(tenant)
        return self.store.usage(tenant)

    # The rest

    def create(self, tenant: str, **given: Any) -> SessionRecord:
        return self.store.create(tenant, **given)

    def renew(self, lease: Lease, seconds: float) -> Lease:
        return self.store.renew(lease, seconds)

    def expire(self, now: float) -> int:
        return self.store.expire(now)

    def audit(self, tenant: str, action: str, session_id: str | None = None, detail: str = "") -> None:
        self.store.audit(tenant, action, session_id, detail)

    def audited(self, tenant: str, *, limit: int = 100) -> list[AuditEntry]:
        return self.store.audited(tenant, limit=limit)

    def close(self) -> None:
        """Writes everything, once more where it failed before; what cannot be written is lost, with an error in the
        log."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self.store.close()

    # Inside

    def _settled(self, method: Callable[..., T], tenant: str, session_id: str, *args: Any, **options: Any) -> T:
        self._settle((tenant, session_id))
        return method(tenant, session_id, *args, **options)

    def _settle_all(self, tenant: str) -> None:
        with self._wake:
            keys = [key for key in self._pending if key[0] == tenant]
        for key in keys:
            self._settle(key)

    def _settle(self, key: tuple[str, str]) -> None:
        with self._wake:
            pending = self._pending.get(key)
        if pending is not None:
            self._write(key, pending)

    def _write(self, key: tuple[str, str], pending: _Pending) -> None:
        """Raises `StoreUnavailable`, and it stays pending."""
        with pending.lock:
            if pending.done:
                return
            try:
                pending.write()
            except StoreUnavailable:
                raise
            except ServingError as error:
                _log.warning("a commit of session %s was refused and is lost: %s", key[1], error)
                self.lost(*key)
            pending.done = True
            with self._wake:
                # Nothing is added to what it releases from here on.
                del self._pending[key]
                self._bytes -= pending.size
        for lease in pending.released:
            try:
                self.store.release(lease)
            except StoreUnavailable:
                # It runs out by itself.
                _log.warning("the lease of session %s could not be given back", key[1])

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._pending and not self._closing:
                    self._wake.wait()
                waiting, closing = list(self._pending.items()), self._closing
            failed = False
            for key, pending in waiting:
                try:
                    self._write(key, pending)
                except StoreUnavailable as error:
                    failed = True
                    if closing:
                        _log.error("a commit of session %s could not be written and is lost: %s", key[1], error)
            if closing:
                return
            if failed:
                time.sleep(_RETRY_SECONDS)
