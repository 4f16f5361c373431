"""Authenticated encryption of what a store holds: AES-256-GCM, each tenant with keys of its own.

A sealed message is a mark, 8 bytes that name the key, a nonce of 12 bytes, and the ciphertext with its tag. The key of
a tenant is derived from the store's by HKDF-SHA256 (RFC 5869), so that nothing opens for another tenant.
"""

import base64
import binascii
import functools
import hashlib
import os
from collections.abc import Sequence

from ...core.errors import ConfigError, MissingExtraError
from ..errors import SessionDamaged, TooLarge

_MARK = b"mnemicE1"
_HEAD = len(_MARK) + 8
_NONCE = 12
# The library takes less than 2 GiB at once.
_MOST = 2**31 - 64


class Seals:
    """Seals with the first key and opens with any.

    Raises:
        ConfigError: no key, or one that is not 32 bytes.
        MissingExtraError: the package `cryptography` is not installed.
    """

    def __init__(self, keys: Sequence[bytes]):
        if not keys or not all(isinstance(key, bytes) and len(key) == 32 for key in keys):
            raise ConfigError("keys: expected 32 random bytes each, such as secrets.token_bytes(32) of Python makes.")
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError as error:
            raise MissingExtraError("Encryption needs cryptography: pip install 'mnemic[encryption]'.") from error
        self._keys = {hashlib.sha256(b"mnemic key name" + key).digest()[:8]: key for key in keys}
        self._first = next(iter(self._keys))

        @functools.lru_cache(4096)
        def cipher(name: bytes, tenant: str) -> AESGCM:
            derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"mnemic tenant " + tenant.encode())
            return AESGCM(derived.derive(self._keys[name]))

        self._cipher = cipher

    def seal(self, tenant: str, kind: bytes, data: bytes) -> bytes:
        """kind: what it is; it opens as nothing else. Raises `TooLarge`: 2 GiB or more."""
        if len(data) > _MOST:
            raise TooLarge(f"A state of {len(data):,} bytes cannot be encrypted; the most is {_MOST:,}.")
        nonce = os.urandom(_NONCE)
        return _MARK + self._first + nonce + self._cipher(self._first, tenant).encrypt(nonce, data, kind)

    def open(self, tenant: str, kind: bytes, sealed: bytes, what: str) -> bytes:
        """Raises `SessionDamaged`: not sealed so, with none of these keys, or changed since."""
        from cryptography.exceptions import InvalidTag

        name = sealed[len(_MARK) : _HEAD]
        if sealed[: len(_MARK)] != _MARK or name not in self._keys:
            raise SessionDamaged(f"{what} is not encrypted with a key of this store: add the one used then.")
        nonce, rest = sealed[_HEAD : _HEAD + _NONCE], sealed[_HEAD + _NONCE :]
        try:
            return self._cipher(name, tenant).decrypt(nonce, rest, kind)
        except (InvalidTag, ValueError) as error:
            raise SessionDamaged(f"{what} was changed after it was encrypted; roll back to another version.") from error

    def seal_text(self, tenant: str, kind: bytes, text: str) -> str:
        return base64.b64encode(self.seal(tenant, kind, text.encode())).decode()

    def open_text(self, tenant: str, kind: bytes, sealed: str, what: str) -> str:
        try:
            data = base64.b64decode(sealed, validate=True)
        except (binascii.Error, ValueError):
            data = b""
        return self.open(tenant, kind, data, what).decode()
