"""From the engine's thread to the clients' event loops."""

import asyncio
from typing import TYPE_CHECKING, Any

from .requests import Event, Finished

if TYPE_CHECKING:
    from .rows import Job


class Answer:
    """Iterates over the events of one work, in one event loop. Closing it before its end cancels the work: use it with
    `async with`, or call `aclose`, so that no work goes on for a client that has left."""

    job: "Job"

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self.events.get()
        if isinstance(event, BaseException):
            self._ended = True
            raise event
        self._ended = isinstance(event, Finished)
        return event

    async def aclose(self) -> None:
        self._ended = self.job.cancelled = True

    async def __aenter__(self) -> "Answer":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.aclose()


class Outbox:
    """Events of the engine's thread, sent together: waking an event loop is dear."""

    def __init__(self) -> None:
        self._held: dict[asyncio.AbstractEventLoop, list[tuple[Answer, Any]]] = {}

    def put(self, answer: Answer, event: Any) -> None:
        self._held.setdefault(answer.loop, []).append((answer, event))

    def send(self) -> None:
        held, self._held = self._held, {}
        for loop, events in held.items():
            try:
                loop.call_soon_threadsafe(_deliver, events)
            except RuntimeError:
                # The loop is closed: its clients are gone.
                for answer, _ in events:
                    answer.job.cancelled = True


def _deliver(events: list[tuple[Answer, Any]]) -> None:
    for answer, event in events:
        answer.events.put_nowait(event)
