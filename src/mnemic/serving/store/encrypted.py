"""Encryption at rest, around any store."""

import dataclasses
import json
from collections.abc import Mapping

from ..errors import SessionDamaged
from . import checks
from .interface import AuditEntry, Commit, Lease, SessionRecord, SessionStore, Usage
from .sealing import Seals

_SEALED = "sealed"


class EncryptedStore:
    """A store whose states and metadata are sealed on their way in; see `SessionStore`.

    In clear stay tenants, ids, times, counts, notes and the audit log. A state is bound to its
    tenant, not to its session: who can write to the inner store can still exchange two states of one tenant. Sizes are
    those of the sealed bytes.
    """

    def __init__(self, store: SessionStore, seals: Seals):
        self.store = store
        self._seals = seals

    def create(
        self,
        tenant: str,
        *,
        session_id: str | None = None,
        ttl: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SessionRecord:
        sealed = self._sealed_metadata(tenant, metadata)
        return self._opened(self.store.create(tenant, session_id=session_id, ttl=ttl, metadata=sealed))

    def get(self, tenant: str, session_id: str) -> SessionRecord:
        return self._opened(self.store.get(tenant, session_id))

    def sessions(self, tenant: str, *, after: str | None = None, limit: int = 100) -> list[SessionRecord]:
        return [self._opened(record) for record in self.store.sessions(tenant, after=after, limit=limit)]

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
        checks.check_tenant(tenant)
        checks.check_commit(expected, state, tokens_seen, note)
        record = self.store.commit(
            tenant,
            session_id,
            expected=expected,
            state=self._seals.seal(tenant, b"state", state),
            tokens_seen=tokens_seen,
            note=note,
            lease=lease,
        )
        return self._opened(record)

    def load(self, tenant: str, session_id: str, version: int | None = None) -> tuple[SessionRecord, bytes]:
        record, sealed = self.store.load(tenant, session_id, version)
        state = sealed and self._seals.open(tenant, b"state", sealed, f"The state of session {record.id}")
        return self._opened(record), state

    def commits(self, tenant: str, session_id: str) -> list[Commit]:
        return self.store.commits(tenant, session_id)

    def rollback(self, tenant: str, session_id: str, version: int, *, lease: Lease | None = None) -> SessionRecord:
        return self._opened(self.store.rollback(tenant, session_id, version, lease=lease))

    def fork(
        self,
        tenant: str,
        session_id: str,
        version: int | None = None,
        *,
        new_id: str | None = None,
        ttl: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SessionRecord:
        sealed = self._sealed_metadata(tenant, metadata)
        return self._opened(self.store.fork(tenant, session_id, version, new_id=new_id, ttl=ttl, metadata=sealed))

    def delete(self, tenant: str, session_id: str) -> None:
        self.store.delete(tenant, session_id)

    def expire(self, now: float) -> int:
        return self.store.expire(now)

    def usage(self, tenant: str) -> Usage:
        return self.store.usage(tenant)

    def acquire(self, tenant: str, session_id: str, owner: str, seconds: float) -> Lease:
        return self.store.acquire(tenant, session_id, owner, seconds)

    def renew(self, lease: Lease, seconds: float) -> Lease:
        return self.store.renew(lease, seconds)

    def release(self, lease: Lease) -> None:
        self.store.release(lease)

    def audit(self, tenant: str, action: str, session_id: str | None = None, detail: str = "") -> None:
        self.store.audit(tenant, action, session_id, detail)

    def audited(self, tenant: str, *, limit: int = 100) -> list[AuditEntry]:
        return self.store.audited(tenant, limit=limit)

    def close(self) -> None:
        self.store.close()

    def _sealed_metadata(self, tenant: str, metadata: Mapping[str, str] | None) -> dict[str, str] | None:
        checks.check_tenant(tenant)
        packed = checks.packed_metadata(metadata)
        return {_SEALED: self._seals.seal_text(tenant, b"metadata", packed)} if metadata else None

    def _opened(self, record: SessionRecord) -> SessionRecord:
        if not record.metadata:
            return record
        what = f"The metadata of session {record.id}"
        if _SEALED not in record.metadata:
            raise SessionDamaged(f"{what} is not encrypted: this store was written without keys.")
        text = self._seals.open_text(record.tenant, b"metadata", record.metadata[_SEALED], what)
        return dataclasses.replace(record, metadata=json.loads(text))
