"""Requests on their way, and the end of taking more."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_LOOK = 0.05


@dataclass(eq=False)
class Entered:
    """A request. ended: whether the server has cancelled its task."""

    task: "asyncio.Task[Any]"
    ended: bool = False


class Requests:
    """
    closed: whether the server takes no more. hurried: nobody waits for those on their way. Signals' handlers may set
    both.
    """

    def __init__(self) -> None:
        self.closed = self.hurried = False
        self._until: float | None = None
        self._entered: set[Entered] = set()

    def __len__(self) -> int:
        return len(self._entered)

    def close(self, seconds: float) -> None:
        """Take no more. Those on their way have so many seconds from the first time that this is called."""
        self.closed = True
        if self._until is None:
            self._until = time.monotonic() + seconds

    def hurry(self) -> None:
        self.hurried = True

    @contextmanager
    def entered(self) -> Iterator[Entered]:
        """Counts the request that the current task serves."""
        task = asyncio.current_task()
        assert task is not None
        request = Entered(task)
        self._entered.add(request)
        try:
            yield request
        finally:
            self._entered.discard(request)

    async def over(self) -> bool:
        """Waits as long as those on their way have. Whether none is left."""
        while self._entered and not self.hurried and (self._until is None or time.monotonic() < self._until):
            await asyncio.sleep(_LOOK)
        return not self._entered

    async def end(self, seconds: float) -> None:
        """Cancel those that have not ended by themselves after so many seconds, and wait as long again."""
        await self._gone(seconds)
        for request in self._entered:
            request.ended = True
            request.task.cancel()
        await self._gone(seconds)

    async def _gone(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._entered and time.monotonic() < until:
            await asyncio.sleep(_LOOK)
