"""Quotas a minute, as buckets that fill up evenly."""

import time
from collections.abc import Callable

# Sums of fractions are off by less.
_ROUNDING = 1e-6


class Bucket:
    """Holds at most a minute's worth, and is full at the beginning.

    More may be taken than is there: how long an answer gets is known at its end. What is missing then comes in first.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute = per_minute
        self._clock, self._level, self._at = clock, float(per_minute), clock()

    def seconds_until(self, amount: float) -> float:
        """Until it holds so much; until it is full, for more than it ever holds."""
        missing = min(amount, self.per_minute) - self._filled()
        return 0.0 if missing <= _ROUNDING else missing * 60 / self.per_minute

    def take(self, amount: float) -> None:
        self._level = self._filled() - amount

    def _filled(self) -> float:
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level
