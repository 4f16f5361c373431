"""Settings of the server: a TOML file, and flags over it."""

import base64
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..core.errors import ConfigError
from .auth import Tenant
from .requests import Limits
from .store.interface import KEEP

_MIB = 2**20
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Each name is one of the file's; the tables [limits] and [tenants.NAME] hold `Limits` and `Tenant`.

    name: what clients call the model. store: an address that `open_store` takes. durability: "durable", an answer ends
    when its state is stored; "fast", it is stored just after that, see `WriteBehind`. wait: seconds that a writer waits
    for another one of the same session. lease: seconds after which another server may take over a session whose server
    is gone. ttl: seconds after which an unused session expires, for those created without their own; None for never.
    device_bytes, host_bytes: of states kept ready on the model's device, and in host memory. max_body: bytes of a
    request; of a document there is no limit, of an imported state max_import. max_choices: answers of one request.
    keep: versions of a session that are kept. key_file: encrypt the store with the keys in this file, 32 bytes in
    base64 a line; the first one writes, all read. shutdown_seconds: that requests on their way have when the server is
    stopped. metrics_key: SHA-256 of the key that reads /metrics, in hexadecimal; without tenants everybody may.
    log_text: whether the log holds what users write and what they are answered. page: serve the web page at /.

    Raises:
        ConfigError: a value that cannot be used.
    """

    name: str = "mnemic"
    host: str = "127.0.0.1"
    port: int = 8000
    store: str = "mnemic-sessions"
    durability: str = "durable"
    wait: float = 30.0
    lease: float = 60.0
    ttl: float | None = None
    device_bytes: int = 1024 * _MIB
    host_bytes: int = 4096 * _MIB
    max_body: int = 16 * _MIB
    max_import: int = 1024 * _MIB
    max_choices: int = 16
    keep: int = KEEP
    key_file: str | None = None
    shutdown_seconds: float = 30.0
    metrics_key: str | None = None
    log_text: bool = False
    page: bool = True
    limits: Limits = field(default_factory=Limits)
    tenants: Mapping[str, Tenant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            _check(f.name, value, hints[f.name])
            if isinstance(value, int | float) and value < 0:
                raise ConfigError(f"{f.name} = {value!r}, expected no negative number.")
        if self.durability not in ("durable", "fast"):
            raise ConfigError(f"durability = {self.durability!r}, expected 'durable' or 'fast'.")
        for name in ("lease", "ttl", "max_body", "max_import", "max_choices", "keep"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name} = 0, expected more.")
        if not self.port < 65536:
            raise ConfigError(f"port = {self.port}, expected at most 65535.")
        if not self.name:
            raise ConfigError("name is empty.")
        if self.metrics_key is not None and not _HASH.fullmatch(self.metrics_key):
            raise ConfigError(
                "metrics_key: expected a SHA-256 hash of 64 hexadecimal digits; `mnemic serve --make-key` prints a new "
                "key and its hash."
            )

    @classmethod
    def read(cls, path: str | os.PathLike | None = None, **flags: Any) -> "Settings":
        """From a file, if one is given; flags that are not None count more.

        Raises:
            ConfigError: no TOML, an unknown name, or a value that cannot be used.
        """
        table = {} if path is None else _table(Path(path))
        ConfigError.check_names("setting", table, (f.name for f in fields(cls)))
        limits, tenants = table.pop("limits", {}), table.pop("tenants", {})
        for name, inner in (("limits", limits), ("tenants", tenants)):
            if not isinstance(inner, dict):
                raise ConfigError(f"{name}: expected a table.")
        ConfigError.check_names("limit", limits, (f.name for f in fields(Limits)))
        settings = cls(
            **table, limits=Limits(**limits), tenants={name: _tenant(name, given) for name, given in tenants.items()}
        )
        return replace(settings, **{name: value for name, value in flags.items() if value is not None})

    def encryption_keys(self) -> list[bytes]:
        """The keys of `key_file`. Raises `ConfigError`: what it holds is no base64."""
        if self.key_file is None:
            return []
        lines = Path(self.key_file).read_text(encoding="utf-8").split()
        try:
            return [base64.b64decode(line, validate=True) for line in lines]
        except ValueError as error:
            raise ConfigError(f"{self.key_file}: expected 32 bytes in base64 a line.") from error


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML file ({error}).") from error


def _tenant(name: str, given: Any) -> Tenant:
    if not isinstance(given, dict):
        raise ConfigError(f"tenants.{name}: expected a table.")
    ConfigError.check_names("setting of a tenant", given, (f.name for f in fields(Tenant) if f.name != "name"))
    return Tenant(name=name, **given)


def _check(name: str, value: Any, hint: Any) -> None:
    kinds = get_args(hint) if get_origin(hint) is UnionType else (get_origin(hint) or hint,)
    # An integer is as good as a float, and truth is no number.
    kinds = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ConfigError(f"{name} = {value!r}, expected {expected}.")
