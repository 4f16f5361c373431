"""A session store whose calls are timed."""

import functools
import time
from collections.abc import Callable
from typing import Any, cast

from .errors import StoreUnavailable
from .store import SessionStore


def watched(store: SessionStore, told: Callable[[str, float, bool], object]) -> SessionStore:
    """The store; `told` gets each call's name, seconds, and whether the store failed, in the caller's thread."""
    return cast(SessionStore, _Watched(store, told))


class _Watched:
    def __init__(self, store: SessionStore, told: Callable[[str, float, bool], object]):
        self._store, self._told = store, told

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        @functools.wraps(method)
        def timed(*args: Any, **options: Any) -> Any:
            began, failed = time.perf_counter(), False
            try:
                return method(*args, **options)
            except StoreUnavailable:
                failed = True
                raise
            finally:
                self._told(name, time.perf_counter() - began, failed)

        return timed
