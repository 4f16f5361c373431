"""Mixtures: prepared folders read side by side, each with its share of the tokens.

Shares are kept exactly, without chance: the next document comes from the part that is furthest behind its share. Within
a part, documents come in an order shuffled anew for each epoch. Order and shuffling depend on the seed and on the
number of documents drawn, so a position can be found again.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError
from .shards import MANIFEST, TRAIN, TokenStore, load_tokenizer

_ROUNDS = 8
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Part:
    """A prepared folder in a mixture; weight: its share of the tokens, against the other weights.

    Raises:
        ConfigError: a weight that is no positive number.
    """

    store: TokenStore
    weight: float

    def __post_init__(self) -> None:
        if not (isinstance(self.weight, int | float) and math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"weight {self.weight!r} of {self.store.folder}: expected a positive number.")


class Mixture:
    """Documents of several prepared folders.

    Raises:
        ConfigError: no part. DataError: parts made with different tokenizers.
    """

    def __init__(self, parts: Sequence[Part], seed: int = 0):
        if not parts:
            raise ConfigError("A mixture needs at least one part.")
        first = parts[0].store
        for part in parts[1:]:
            if part.store.fingerprint != first.fingerprint:
                raise DataError(
                    f"{first.folder} and {part.store.folder} were prepared with different tokenizers, so their ids "
                    f"mean different text. Prepare both with one: --tokenizer {first.folder / 'tokenizer'}."
                )
        self.parts, self.seed = tuple(parts), seed

    @classmethod
    def open(cls, path: str | Path, *, split: str = TRAIN, seed: int = 0) -> "Mixture":
        """A prepared folder, or a TOML file with `[[part]]` tables: folder (from the file's own) and weight.

        Raises:
            DataError: folders that cannot be read. ConfigError: a file that is no such TOML.
        """
        path = Path(path)
        if path.is_dir():
            return cls([Part(TokenStore(path, split), 1)], seed)
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; expected a prepared folder or a mixture as TOML.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no valid TOML: {error}.") from error
        parts = found.get("part")
        if set(found) != {"part"} or not isinstance(parts, list) or not parts:
            raise ConfigError(f"{path}: expected [[part]] tables with folder and weight, and nothing else.")
        if not all(isinstance(part, dict) and set(part) == {"folder", "weight"} for part in parts):
            raise ConfigError(f"{path}: every [[part]] has exactly the keys folder and weight.")
        return cls([Part(TokenStore(path.parent / str(p["folder"]), split), p["weight"]) for p in parts], seed)

    @classmethod
    def parse(cls, pairs: Iterable[str], *, split: str = TRAIN, seed: int = 0) -> "Mixture":
        """From `FOLDER=WEIGHT` pairs."""
        parts = []
        for pair in pairs:
            folder, equals, text = pair.rpartition("=")
            try:
                weight = float(text)
            except ValueError:
                equals = ""
                weight = 0.0
            if not equals or not folder:
                raise ConfigError(f"{pair!r}: expected FOLDER=WEIGHT, such as books=0.3.")
            parts.append(Part(TokenStore(folder, split), weight))
        return cls(parts, seed)

    @property
    def vocabulary(self) -> int:
        return self.parts[0].store.vocabulary

    @property
    def tokens(self) -> int:
        return sum(part.store.tokens for part in self.parts)

    def tokenizer(self) -> Any:
        """The tokenizer that all parts were made with."""
        return load_tokenizer(self.parts[0].store.folder)

    def turns(self) -> "Turns":
        return Turns([part.weight for part in self.parts])

    def documents(self) -> Iterator[tuple[int, int]]:
        """(part, document), endless; every document of a part once in each of its epochs."""
        turns, drawn = self.turns(), [0] * len(self.parts)
        while True:
            part = turns.next()
            store = self.parts[part].store
            epoch, place = divmod(drawn[part], len(store))
            document = shuffled(place, len(store), f"{self.seed}|{part}|{epoch}")
            drawn[part] += 1
            turns.spend(part, store.length(document))
            yield part, document

    def check_lengths(self, least: int) -> None:
        """Raises `DataError` where a document has fewer than `least` tokens."""
        for part in self.parts:
            if part.store.shortest < least:
                raise DataError(
                    f"{part.store.folder} has a document of {part.store.shortest} tokens, shorter than a segment of "
                    f"{least}. Use a shorter segment, or keep such documents, padded (short='pad')."
                )

    def fingerprint(self) -> str:
        """SHA-256 of what is drawn from: the shards' checksums, weights and seed."""
        content = [
            [float(part.weight), part.store.split, [shard["sha256"] for shard in part.store.shards]]
            for part in self.parts
        ]
        return hashlib.sha256(json.dumps([self.seed, content], sort_keys=True).encode()).hexdigest()


class Turns:
    """Whose turn it is: the part whose tokens are furthest behind its share; the first of equals."""

    def __init__(self, weights: Sequence[float]):
        self.weights, self.spent = list(weights), [0] * len(weights)

    def next(self) -> int:
        return min(range(len(self.spent)), key=lambda i: (self.spent[i] / self.weights[i], i))

    def spend(self, part: int, tokens: int) -> None:
        self.spent[part] += tokens


def shuffled(place: int, count: int, key: str) -> int:
    """Entry `place` of a pseudo-random order of range(count), without storing it: a Feistel network on the smallest
    even number of bits that holds `count`, repeated until it lands below `count`."""
    if count < 2:
        return 0
    half = max((count - 1).bit_length() + 1, 2) // 2
    low, seed = (1 << half) - 1, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    while True:
        left, right = place >> half, place & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mixed(right + seed + (turn << 58)) & low)
        place = left << half | right
        if place < count:
            return place


def _mixed(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is something that `Mixture.open` reads: a folder with a manifest, or a TOML file."""
    path = Path(path)
    return (path / MANIFEST).is_file() or (path.suffix == ".toml" and path.is_file())
