"""Shards: tokenised documents on disk, read through memory maps.

A prepared folder holds `tokenizer/`, `manifest.json`, and for each shard two raw little-endian files: `NAME.tokens`
(uint16, or uint32 where the vocabulary needs it) and `NAME.index` (int64, one more entry than documents: where each
document begins, and the end of the last). The manifest has the sizes and SHA-256 checksums of all of them. Sizes are
checked whenever a folder is opened, checksums when asked.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError, InputError
from ..core.files import replace_atomically

MANIFEST, TOKENIZER, KIND, VERSION = "manifest.json", "tokenizer", "token shards", 1
TRAIN, VALIDATION = "train", "validation"
INDEX_TYPE = np.dtype("<i8")
AGAIN = "Restore it from a copy, or delete the folder and run mnemic prepare again."


def token_type(vocabulary: int) -> np.dtype:
    """The narrowest type that holds ids below `vocabulary`."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


def write_shard(folder: Path, name: str, documents: Sequence[NDArray], dtype: np.dtype) -> dict[str, Any]:
    """Write one shard, each file atomically. Returns its entry in the manifest."""
    ends = np.cumsum([len(d) for d in documents], dtype=INDEX_TYPE)
    parts = {
        "tokens": np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype, copy=False).tobytes(),
        "index": np.concatenate([np.zeros(1, INDEX_TYPE), ends]).tobytes(),
    }
    for kind, content in parts.items():
        replace_atomically(folder / f"{name}.{kind}", lambda path, content=content: path.write_bytes(content))
    return {
        "name": name,
        "documents": len(documents),
        "tokens": int(ends[-1]) if len(documents) else 0,
        "shortest": min((len(d) for d in documents), default=0),
        "sha256": {kind: hashlib.sha256(content).hexdigest() for kind, content in parts.items()},
    }


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """A JSON object that mnemic wrote.

    Raises:
        DataError: missing, damaged, of another kind, or of a newer version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist: {path.parent} is no folder that mnemic prepare wrote, or was interrupted while it "
            "was written; run the same mnemic prepare again to go on."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}). {AGAIN}") from error
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise DataError(f"{path} was not written by mnemic prepare (expected kind {kind!r}); choose another folder.")
    if not isinstance(found.get("version"), int) or found["version"] > VERSION:
        raise DataError(
            f"{path} has version {found.get('version')!r}; this release reads up to {VERSION}. Upgrade mnemic."
        )
    return found


def write_json(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    text = json.dumps({"kind": kind, "version": VERSION, **content}, indent=1, ensure_ascii=False)
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class TokenStore:
    """The documents of one split of a prepared folder; `store[i]` is a read-only array of token ids.

    Args:
        folder: what `mnemic prepare` wrote. split: "train" or "validation". verify: compare all checksums now.

    Raises:
        DataError: no prepared folder, another version, no document in the split, or a file that is missing, of
            another size, or (verify) damaged.
    """

    def __init__(self, folder: str | Path, split: str = TRAIN, *, verify: bool = False):
        self.folder, self.split = Path(folder), split
        self.manifest = read_json(self.folder / MANIFEST, KIND)
        try:
            self.dtype = np.dtype(self.manifest["dtype"])
            self.vocabulary, self.fingerprint = int(self.manifest["vocabulary"]), str(self.manifest["tokenizer"])
            self.shards = [dict(shard) for shard in self.manifest["splits"].get(split, [])]
            counts = [[shard["documents"], shard["tokens"], shard["shortest"]] for shard in self.shards]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{self.folder / MANIFEST} is damaged ({error!r}). {AGAIN}") from error
        if not self.shards:
            given = ", ".join(self.manifest["splits"]) or "nothing"
            raise DataError(f"{self.folder} has no documents for {split} (it has: {given}); see --validation-fraction.")
        numbers = np.array(counts, dtype=np.int64)
        self.tokens, self.shortest = int(numbers[:, 1].sum()), int(numbers[:, 2].min())
        self._firsts = np.concatenate([[0], np.cumsum(numbers[:, 0])])
        self._first_tokens = np.concatenate([[0], np.cumsum(numbers[:, 1])])
        self._open: dict[tuple[int, str], NDArray] = {}
        self._check_sizes()
        if verify:
            self.verify()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, document: int) -> NDArray:
        shard, start, stop = self._place(document)
        return self._map(shard, "tokens")[start:stop]

    def __iter__(self) -> Iterator[NDArray]:
        return (self[i] for i in range(len(self)))

    def length(self, document: int) -> int:
        """Tokens of a document, without reading them."""
        _, start, stop = self._place(document)
        return stop - start

    def at(self, token: int) -> tuple[int, int]:
        """The document that holds token number `token` of the store, and the token's place in it."""
        if not 0 <= token < self.tokens:
            raise IndexError(f"token {token} of {self.tokens}")
        shard = int(np.searchsorted(self._first_tokens, token, side="right")) - 1
        index, local = self._map(shard, "index"), token - int(self._first_tokens[shard])
        document = int(np.searchsorted(index, local, side="right")) - 1
        return int(self._firsts[shard]) + document, local - int(index[document])

    def verify(self) -> None:
        """Compare every file with its checksum; raises `DataError` at the first that does not fit."""
        for shard in self.shards:
            for kind, expected in shard["sha256"].items():
                path = self._path(shard, kind)
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != expected:
                    raise DataError(f"{path} is damaged: its checksum does not fit the manifest. {AGAIN}")

    def _place(self, document: int) -> tuple[int, int, int]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        shard = int(np.searchsorted(self._firsts, document, side="right")) - 1
        index, local = self._map(shard, "index"), document - int(self._firsts[shard])
        start, stop = int(index[local]), int(index[local + 1])
        if not 0 <= start <= stop <= self.shards[shard]["tokens"]:
            raise DataError(f"{self._path(self.shards[shard], 'index')} is damaged at document {local}. {AGAIN}")
        return shard, start, stop

    def _map(self, shard: int, kind: str) -> NDArray:
        found = self._open.get((shard, kind))
        if found is None:
            # Without documents of its own a shard has an empty file, which cannot be mapped.
            dtype = self.dtype if kind == "tokens" else INDEX_TYPE
            path = self._path(self.shards[shard], kind)
            found = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
            self._open[shard, kind] = found
        return found

    def _path(self, shard: Mapping[str, Any], kind: str) -> Path:
        return self.folder / f"{shard['name']}.{kind}"

    def _check_sizes(self) -> None:
        for shard in self.shards:
            for kind, expected in (
                ("tokens", shard["tokens"] * self.dtype.itemsize),
                ("index", (shard["documents"] + 1) * INDEX_TYPE.itemsize),
            ):
                path = self._path(shard, kind)
                if not path.is_file():
                    raise DataError(f"{path} is missing. {AGAIN}")
                if path.stat().st_size != expected:
                    raise DataError(
                        f"{path} has {path.stat().st_size:,} bytes, the manifest says {expected:,}: it was cut or "
                        f"replaced. {AGAIN}"
                    )

    def __getstate__(self) -> dict[str, Any]:
        # Maps are opened again in another process.
        return {**self.__dict__, "_open": {}}


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer that a prepared folder was made with.

    Raises:
        DataError: it is missing, or not the one the manifest names.
    """
    from transformers import AutoTokenizer

    from .tokenizer import tokenizer_fingerprint

    manifest = read_json(Path(folder) / MANIFEST, KIND)
    try:
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / TOKENIZER)
    except (OSError, ValueError) as error:
        raise DataError(f"The tokenizer in {folder} cannot be loaded ({error}). {AGAIN}") from error
    if tokenizer_fingerprint(tokenizer) != manifest["tokenizer"]:
        raise DataError(f"The tokenizer in {folder} is not the one its shards were made with. {AGAIN}")
    return tokenizer


def check_ids(ids: NDArray, vocabulary: int, where: str) -> None:
    """Raises `InputError` for ids outside the vocabulary, which would be stored as other ids."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise InputError(f"{where}: the tokenizer gave ids outside its vocabulary of {vocabulary}.")
