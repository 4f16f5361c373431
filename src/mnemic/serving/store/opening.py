"""A store from an address."""

import os
from collections.abc import Sequence
from urllib.parse import unquote

from ...core.errors import ConfigError
from .embedded import EmbeddedStore
from .encrypted import EncryptedStore
from .interface import KEEP, SessionStore
from .sealing import Seals


def open_store(url: str | os.PathLike, *, keep: int = KEEP, keys: Sequence[bytes] = ()) -> SessionStore:
    """The store at `url`: a folder, `sqlite:///folder` (four slashes for one that begins at the root), or
    `postgresql://user:password@machine/database`.

    Args:
        keep: versions of each session that are kept.
        keys: 32 random bytes each; states and metadata are encrypted with the first and read with any.

    Raises:
        ConfigError: an address or a key that cannot be used.
        MissingExtraError: PostgreSQL or encryption without their extras.
        StoreUnavailable, FileFormatError: see the stores.
    """
    # Made first: a key that cannot be used opens nothing.
    seals = Seals(keys) if keys else None
    store = _plain(os.fspath(url), keep)
    return store if seals is None else EncryptedStore(store, seals)


def _plain(url: str, keep: int) -> SessionStore:
    scheme, found, rest = url.partition("://")
    if not found and url:
        return EmbeddedStore(url, keep=keep)
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        return EmbeddedStore(unquote(rest[1:]), keep=keep)
    if scheme in ("postgresql", "postgres"):
        from .postgres import PostgresStore

        return PostgresStore(url, keep=keep)
    # Not the whole address: it may hold a password.
    raise ConfigError(
        f"store: {scheme[:20]!r} begins no address of a store; expected a folder, sqlite:///folder or postgresql://..."
    )
