"""Leases of a store that one process owns: in memory, and gone with it."""

import secrets
import time

from ..errors import SessionBusy
from .interface import Lease


class Leases:
    """Who holds which session. Not safe between threads: the store calls it under its own lock."""

    def __init__(self) -> None:
        # With the end of each, on the monotonic clock.
        self._held: dict[tuple[str, str], tuple[Lease, float]] = {}

    def holder(self, tenant: str, session_id: str) -> Lease | None:
        lease, end = self._held.get((tenant, session_id), (None, 0.0))
        return lease if time.monotonic() < end else None

    def take(self, tenant: str, session_id: str, owner: str, seconds: float) -> Lease:
        if self.holder(tenant, session_id) is not None:
            raise busy(session_id)
        lease = new_lease(tenant, session_id, owner, seconds)
        self._held[tenant, session_id] = lease, time.monotonic() + seconds
        return lease

    def renew(self, lease: Lease, seconds: float) -> Lease:
        self.check(lease.tenant, lease.session_id, lease)
        lease = renewed(lease, seconds)
        self._held[lease.tenant, lease.session_id] = lease, time.monotonic() + seconds
        return lease

    def release(self, lease: Lease) -> None:
        if self._is_last(lease.tenant, lease.session_id, lease):
            self.drop(lease.tenant, lease.session_id)

    def drop(self, tenant: str, session_id: str) -> None:
        self._held.pop((tenant, session_id), None)

    def check(self, tenant: str, session_id: str, lease: Lease | None) -> None:
        """Raises `SessionBusy`: `lease` is not the last one, or none is given and somebody holds one."""
        if lease is not None:
            if not self._is_last(tenant, session_id, lease):
                raise lost(session_id)
        elif self.holder(tenant, session_id) is not None:
            raise busy(session_id)

    def _is_last(self, tenant: str, session_id: str, lease: Lease) -> bool:
        held = self._held.get((tenant, session_id))
        return held is not None and held[0].token == lease.token


def new_lease(tenant: str, session_id: str, owner: str, seconds: float) -> Lease:
    return Lease(tenant=tenant, session_id=session_id, owner=owner, token=secrets.token_hex(16), seconds=float(seconds))


def renewed(lease: Lease, seconds: float) -> Lease:
    return Lease(
        tenant=lease.tenant,
        session_id=lease.session_id,
        owner=lease.owner,
        token=lease.token,
        seconds=float(seconds),
    )


def busy(session_id: str) -> SessionBusy:
    return SessionBusy(f"Somebody else is writing to session {session_id}: try again when they are done.")


def lost(session_id: str) -> SessionBusy:
    return SessionBusy(f"The lease of session {session_id} was taken over or released: load it again.")
