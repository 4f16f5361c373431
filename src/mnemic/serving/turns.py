"""One writer's time with one session."""

import asyncio
from typing import TYPE_CHECKING

from ..hosts.stream import Stream
from .store import Lease, SessionRecord

if TYPE_CHECKING:
    from .manager import Manager


class Turn:
    """Nobody else writes to the session meanwhile.

    record: as of the last commit. stream: what it has read, one row, or None where nothing was committed; never changed
    in place. lease: the store's.
    """

    def __init__(self, manager: "Manager", record: SessionRecord, stream: Stream | None, lease: Lease):
        self.record, self.stream, self.lease = record, stream, lease
        self._manager = manager
        self._writing: asyncio.Future[SessionRecord] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.record.tenant, self.record.id

    async def commit(self, stream: Stream, note: str = "") -> SessionRecord:
        """Make `stream` what the session has read. Returns once it is durable, or in the fast mode at once.

        A caller that is cancelled meanwhile does not know whether it was; the next turn sees it.

        Raises:
            SessionNotFound: deleted meanwhile. SessionBusy: another server has taken the session over.
            StoreUnavailable: it could not be written; the session is as it was.
        """
        return await self._write(self._manager.write(self, stream, note))

    async def rollback(self, version: int) -> SessionRecord:
        """Go back to an older version, as a new one. Raises as `commit`, and InvalidRequest: it is not kept."""
        return await self._write(self._manager.write_rollback(self, version))

    async def _write(self, writing: "asyncio.Future[SessionRecord]") -> SessionRecord:
        self._writing = writing
        self.record = await asyncio.shield(writing)
        return self.record

    async def settle(self) -> None:
        """Wait until nothing of this turn is being written."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
            if not self._writing.cancelled():
                # Its error has been told, or there is nobody to tell.
                self._writing.exception()
