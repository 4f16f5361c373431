"""Server-sent events, and clients that leave."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


def packed(value: Any) -> str:
    """One event."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Sends events, then closes `held`, also when the client leaves before or between them.

    body_read: set once the request's body has been read by somebody else; until then only he finds out that the client
    has left.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack, body_read: asyncio.Event | None = None):
        # Proxies would collect the events otherwise.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.held, self.body_read = held, body_read

    async def listen_for_disconnect(self, receive: Receive) -> None:
        if self.body_read is not None:
            await self.body_read.wait()
        await super().listen_for_disconnect(receive)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.held.aclose()


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves; the body must have been read.

    Raises:
        ClientDisconnect: the client has left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait({working, leaving})
        if not working.cancelled():
            # Told above, or there is nobody to tell.
            working.exception()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
