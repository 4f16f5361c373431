"""Who calls: keys, the tenants that they belong to, and what these may have.

Of a key only its SHA-256 is kept. Keys are random and long, so nothing slower is needed against guessing.
"""

import hashlib
import math
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..core.errors import ConfigError
from .errors import Overloaded, QuotaExceeded, RateExceeded, Unauthorised
from .rates import Bucket
from .store.interface import Usage

OPEN = "default"
"""The tenant of all calls where there are no keys."""

_PREFIX = "mnemic-"
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """keys: SHA-256 of each key, in hexadecimal. max_sessions, max_bytes: stored, every version kept counted.
    max_running: requests at one time. requests_per_minute, tokens_per_minute: a bucket that holds one minute's worth,
    in each server for itself; requests are those for answers and documents, tokens those of prompts, documents and
    answers. None for no limit.

    Raises:
        ConfigError: a name, hash or number that cannot be used.
    """

    name: str
    keys: Sequence[str] = ()
    max_sessions: int | None = None
    max_bytes: int | None = None
    max_running: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(f"tenant {self.name!r}: expected 1 to 128 letters, digits and _ . -")
        if isinstance(self.keys, str) or not all(isinstance(k, str) and _HASH.fullmatch(k) for k in self.keys):
            raise ConfigError(
                f"tenant {self.name}: keys are SHA-256 hashes of 64 hexadecimal digits; `mnemic serve --make-key` "
                "prints a new key and its hash."
            )
        for name in ("max_sessions", "max_bytes", "max_running", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"tenant {self.name}: {name} = {value!r}, expected an integer of at least 1.")

    def check_room(self, usage: Usage, sessions: int = 0) -> None:
        """Raises `QuotaExceeded` where the tenant has no room for so many more sessions, or for any more bytes."""
        if self.max_sessions is not None and sessions and usage.sessions + sessions > self.max_sessions:
            raise QuotaExceeded(f"You have {usage.sessions} of {self.max_sessions} sessions: delete some first.")
        if self.max_bytes is not None and usage.bytes >= self.max_bytes:
            raise QuotaExceeded(
                f"Your sessions have {usage.bytes:,} bytes, and you may have {self.max_bytes:,}: delete some first."
            )


class Tenants:
    """Finds the tenant of a key, and counts what each has running. Without tenants every call is `OPEN`'s.

    Raises:
        ConfigError: one key for two tenants, or tenants without any key.
    """

    def __init__(self, tenants: Mapping[str, Tenant]):
        self.open = Tenant(name=OPEN)
        self.required = bool(tenants)
        self._running: Counter[str] = Counter()
        self._requests = {t.name: Bucket(t.requests_per_minute) for t in tenants.values() if t.requests_per_minute}
        self._tokens = {t.name: Bucket(t.tokens_per_minute) for t in tenants.values() if t.tokens_per_minute}
        self._by_key: dict[str, Tenant] = {}
        for tenant in tenants.values():
            if not tenant.keys:
                raise ConfigError(f"tenant {tenant.name} has no keys, so nobody could use it.")
            for key in tenant.keys:
                if self._by_key.setdefault(key, tenant) is not tenant:
                    raise ConfigError(f"tenants {self._by_key[key].name} and {tenant.name} have the same key.")

    def of(self, authorization: str | None) -> Tenant:
        """The tenant of an Authorization header. Raises `Unauthorised`."""
        if not self.required:
            return self.open
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorised("This server needs a key: send the header `Authorization: Bearer KEY`.")
        tenant = self._by_key.get(hash_of(key.strip()))
        if tenant is None:
            raise Unauthorised("The key is not known.")
        return tenant

    @contextmanager
    def running(self, tenant: Tenant) -> Iterator[None]:
        """Counts a request, and that it runs. Raises `Overloaded`, `RateExceeded`."""
        if tenant.max_running is not None and self._running[tenant.name] >= tenant.max_running:
            raise Overloaded(f"You have {tenant.max_running} requests running, as many as you may.", retry_after=1)
        bucket = self._requests.get(tenant.name)
        if bucket is not None:
            _need(bucket, 1, "requests")
            bucket.take(1)
        self._running[tenant.name] += 1
        try:
            yield
        finally:
            self._running[tenant.name] -= 1

    def need_tokens(self, tenant: Tenant, count: int) -> None:
        """Raises `RateExceeded` where the tenant may not use so many tokens now; more than a minute's need all."""
        if tenant.name in self._tokens:
            _need(self._tokens[tenant.name], max(1, count), "tokens")

    def took_tokens(self, tenant: Tenant, count: int) -> None:
        """Counts tokens that were read or made."""
        if tenant.name in self._tokens:
            self._tokens[tenant.name].take(count)


def _need(bucket: Bucket, count: int, what: str) -> None:
    seconds = bucket.seconds_until(count)
    if seconds:
        raise RateExceeded(
            f"You may use {bucket.per_minute:,} {what} a minute: try again in {math.ceil(seconds)} s.",
            retry_after=seconds,
        )


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> tuple[str, str]:
    """A new key, and what the server keeps of it."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, hash_of(key)
