"""States that are kept ready: on the model's device, then in host memory, then not at all; least recently used go."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..hosts.stream import Stream

Key = tuple[str, str]
Stamp = tuple[float, int]
"""When the session was created, and a version of it: an id may be used again after a session's end."""
Held = TypeVar("Held", Stream, bytes)


@dataclass(frozen=True)
class LiveStats:
    """States on the device and in host memory, their bytes, and how many were moved down or let go."""

    device: int
    device_bytes: int
    host: int
    host_bytes: int
    spilled: int
    dropped: int


class Live:
    """Streams as they are, up to device_bytes; as files' contents (`to_bytes`), up to host_bytes. For any thread."""

    def __init__(self, device_bytes: int, host_bytes: int, to_bytes: Callable[[Stream], bytes]):
        self._to_bytes = to_bytes
        self._device: _Tier[Stream] = _Tier(device_bytes)
        self._host: _Tier[bytes] = _Tier(host_bytes)
        self._lock = threading.Lock()
        self._moving: set[Key] = set()
        self._spilled = self._dropped = 0

    def get(self, key: Key, stamp: Stamp) -> Stream | bytes | None:
        """What is held of exactly this version."""
        with self._lock:
            for tier in (self._device, self._host):
                found = tier.get(key)
                if found is not None and found[0] == stamp:
                    return found[1]
        return None

    def put(self, key: Key, stamp: Stamp, stream: Stream) -> None:
        """Hold this instead of what was held of the session; others move down. Nobody changes a stream held."""
        with self._lock:
            self._host.take(key)
            self._moving.discard(key)
            out = self._device.put(key, stamp, stream, stream.state_bytes)
            self._moving.update(k for k, _, _ in out)
        # Writing states out takes its time, and others may look things up meanwhile.
        spilled = [(k, v, self._to_bytes(s)) for k, v, s in out] if self._host.most else []
        with self._lock:
            self._spilled += len(spilled)
            self._dropped += len(out) - len(spilled)
            for k, v, data in spilled:
                # Unless it was changed or deleted meanwhile.
                if k in self._moving:
                    self._dropped += len(self._host.put(k, v, data, len(data)))
            self._moving.difference_update(k for k, _, _ in out)

    def drop(self, key: Key) -> None:
        with self._lock:
            self._moving.discard(key)
            self._device.take(key)
            self._host.take(key)

    def stats(self) -> LiveStats:
        with self._lock:
            return LiveStats(
                len(self._device), self._device.bytes, len(self._host), self._host.bytes, self._spilled, self._dropped
            )


class _Tier(Generic[Held]):
    def __init__(self, most: int):
        self.most, self.bytes = most, 0
        self._held: OrderedDict[Key, tuple[Stamp, Held, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Key) -> tuple[Stamp, Held] | None:
        found = self._held.get(key)
        if found is None:
            return None
        self._held.move_to_end(key)
        return found[:2]

    def put(self, key: Key, stamp: Stamp, held: Held, size: int) -> list[tuple[Key, Stamp, Held]]:
        """Returns what had to go for it; that may be it itself."""
        self.take(key)
        self._held[key] = (stamp, held, size)
        self.bytes += size
        out: list[tuple[Key, Stamp, Held]] = []
        while self.bytes > self.most:
            k, (v, h, n) = self._held.popitem(last=False)
            self.bytes -= n
            out.append((k, v, h))
        return out

    def take(self, key: Key) -> None:
        found = self._held.pop(key, None)
        if found is not None:
            self.bytes -= found[2]
