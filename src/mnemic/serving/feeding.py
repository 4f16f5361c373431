"""A document for a session: read piece by piece as it arrives, one commit at its end."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from .auth import Tenant
from .errors import InvalidRequest, Overloaded
from .requests import Finished, Progress, SamplingParams, Work
from .server import Server
from .store import SessionRecord
from .turns import Turn
from .uploads import Pieces

_LONGEST_PAUSE = 1.0


class Feeding:
    """Memory does not grow with the document: the next bytes are fetched when those before them have been read.

    bytes_read, tokens_read: so far. Nothing is committed before all has been read.
    """

    def __init__(self, server: Server, tenant: Tenant, turn: Turn, body: AsyncIterator[bytes]):
        self.server, self.tenant, self.turn, self.body = server, tenant, turn, body
        self.bytes_read = self.tokens_read = 0
        self._stream = turn.stream

    async def run(self) -> SessionRecord:
        """Raises: as `Engine.submit` and `Turn.commit`; `InvalidRequest`: no UTF-8, or nothing in it."""
        pieces, feeding = Pieces(), self.server.feeding
        feeding[self.turn.key] = (0, 0)
        try:
            async for data in self.body:
                self.bytes_read += len(data)
                for text in pieces.add(data):
                    await self._read(text)
            await self._read(pieces.end())
            if not self.tokens_read:
                raise InvalidRequest("The document is empty: expected text.")
            assert self._stream is not None
            return await self.turn.commit(self._stream, "document")
        finally:
            del feeding[self.turn.key]

    async def _read(self, text: str) -> None:
        # White space alone may be no token at all.
        encode = partial(self.server.encode, text, self._stream is None, document=True)
        ids = await asyncio.to_thread(encode) if text.strip() else []
        if not ids:
            return
        before = self.tokens_read
        async with await self._submitted(
            Work(prompt=ids, sampling=SamplingParams(max_tokens=0), stream=self._stream, tenant=self.tenant.name)
        ) as answer:
            async for event in answer:
                if isinstance(event, Progress):
                    self._count(before + event.tokens_read)
                elif isinstance(event, Finished):
                    self._stream = event.stream
        self._count(before + len(ids))

    def _count(self, tokens: int) -> None:
        self.tokens_read = tokens
        self.server.feeding[self.turn.key] = (self.bytes_read, tokens)

    async def _submitted(self, work: Work) -> Any:
        tenants, count = self.server.tenants, len(work.prompt)
        while True:
            try:
                tenants.need_tokens(self.tenant, count)
                answer = self.server.engine.submit(work)
                tenants.took_tokens(self.tenant, count)
                return answer
            except Overloaded as error:
                # What has been read is not thrown away because others came meanwhile, or the minute is used up.
                if not self.tokens_read:
                    raise
                await asyncio.sleep(min(error.retry_after, _LONGEST_PAUSE))
