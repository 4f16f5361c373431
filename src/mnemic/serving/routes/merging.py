"""Events of several answers in the order in which they come."""

import asyncio
from collections.abc import Sequence
from types import TracebackType

from ..answers import Answer
from ..requests import Event, Finished


class Merged:
    """Iterates over (which answer, event) until all have finished; the first error ends it. Use with `async with`:
    leaving it cancels what still runs."""

    def __init__(self, answers: Sequence[Answer]):
        self.answers = answers
        self._left = len(answers)
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Merged":
        self._tasks = [asyncio.create_task(self._follow(i, answer)) for i, answer in enumerate(self.answers)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        for answer in self.answers:
            await answer.aclose()

    def __aiter__(self) -> "Merged":
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self._left:
            raise StopAsyncIteration
        i, event = await self._events.get()
        if isinstance(event, Exception):
            self._left = 0
            raise event
        self._left -= isinstance(event, Finished)
        return i, event

    async def _follow(self, i: int, answer: Answer) -> None:
        try:
            async for event in answer:
                self._events.put_nowait((i, event))
        except Exception as error:
            self._events.put_nowait((i, error))
