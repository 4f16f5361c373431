"""Embedders: what turns a chunk of tokens into the key by which a chunk database finds it.

An embedder has a name, which the header of a database keeps: what builds must be what asks. `TOKEN_SIGNS` is always
there; others are made known with `register_embedder` before a database is built or opened.
"""

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, UnknownNameError
from .chunk_database import Embed

TOKEN_SIGNS = "token-signs-128"
_WORDS = 2


def token_signs(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of one fixed random vector of 128 signs a token: what chunks share is what words they share.

    A random projection of the bag of words, with signs from integer hashes: the same on every machine, for any
    vocabulary, without a table.

    Args:
        tokens: (n, m) int64. mask: (n, m) bool, False for tokens that do not count.

    Returns: (n, 128) float32, zero for a chunk without tokens.
    """
    ids = tokens.cpu().numpy().astype(np.uint64)[..., None] * np.uint64(_WORDS) + np.arange(_WORDS, dtype=np.uint64)
    bits = np.unpackbits(_hashed(ids).view(np.uint8), axis=-1)
    signs = torch.from_numpy(bits).float().mul_(2).sub_(1)
    real = mask.cpu()[..., None]
    return (signs * real).sum(1) / real.sum(1).clamp(min=1)


def register_embedder(name: str, embed: Embed) -> None:
    """Make an embedder known in this process; see `store.build` for what it takes and gives.

    Raises:
        ConfigError: another one has that name.
    """
    if _known.setdefault(name, embed) is not embed:
        raise ConfigError(f"An embedder is called {name!r} already; choose another name.")


def embedder(name: str) -> Embed:
    """The embedder of that name. Raises `UnknownNameError`."""
    if name not in _known:
        raise UnknownNameError.of("embedder", name, _known)
    return _known[name]


def _hashed(x: np.ndarray) -> np.ndarray:
    """SplitMix64 of each number (Steele, Lea and Flood 2014)."""
    x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype("<u8")


_known: dict[str, Embed] = {TOKEN_SIGNS: token_signs}
