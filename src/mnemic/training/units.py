"""Units: the stretches of documents that `prepare` tokenises, one process and one shard each, with a record of each."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError, InputError
from .shards import (
    INDEX_TYPE,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    check_ids,
    read_json,
    token_type,
    write_json,
    write_shard,
)
from .tokenizer import tokenizer_fingerprint

UNITS, UNIT_KIND = "units", "unit"
_AT_ONCE = 256


@dataclass(frozen=True)
class Unit:
    """Consecutive documents: their texts and whether they are held out."""

    number: int
    texts: list[str]
    held: list[bool]

    def digest(self, tokenizer: str) -> str:
        """SHA-256 of everything that decides the unit's shards; tokenizer: its fingerprint."""
        found = hashlib.sha256(tokenizer.encode())
        for text, held in zip(self.texts, self.held, strict=True):
            content = text.encode()
            found.update(f"{held} {len(content)} ".encode() + content)
        return found.hexdigest()


def records(folder: Path, units: Iterable[Unit], tokenizer: Any, workers: int) -> Iterator[dict[str, Any]]:
    """The records of all units, in order; at most two units a worker are in memory."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    if workers == 1:
        yield from (kept(folder, unit, fingerprint) or make(folder, unit, tokenizer) for unit in units)
        return
    pending: deque[Future | dict[str, Any]] = deque()
    # Forking would copy the locks of the threads that the tokenizer and torch have started.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(str(folder),))
    try:
        for unit in units:
            pending.append(kept(folder, unit, fingerprint) or pool.submit(_make, folder, unit))
            if len(pending) >= 2 * workers:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    except BrokenProcessPool as error:
        raise InputError(
            "A worker of mnemic prepare was ended from outside, most often for lack of memory. Run it again to go on "
            "where it stopped, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result(pending: Future | dict[str, Any]) -> dict[str, Any]:
    return pending.result() if isinstance(pending, Future) else pending


def kept(folder: Path, unit: Unit, fingerprint: str) -> dict[str, Any] | None:
    """The record of a unit that was finished earlier from the same documents and whose files are there."""
    path = folder / UNITS / f"{unit.number:06}.json"
    if not path.is_file():
        return None
    record = read_json(path, UNIT_KIND)
    sizes = [
        (folder / f"{shard['name']}.{kind}", size)
        for shard in record["shards"].values()
        for kind, size in (
            ("tokens", shard["tokens"] * np.dtype(record["dtype"]).itemsize),
            ("index", (shard["documents"] + 1) * INDEX_TYPE.itemsize),
        )
    ]
    whole = all(file.is_file() and file.stat().st_size == size for file, size in sizes)
    return record if whole and record["digest"] == unit.digest(fingerprint) else None


def make(folder: Path, unit: Unit, tokenizer: Any) -> dict[str, Any]:
    """Tokenise a unit, write its shards, then its record. A document ends with the tokenizer's end token, if any."""
    dtype, end = token_type(len(tokenizer)), tokenizer.eos_token_id
    documents: dict[bool, list[Any]] = {False: [], True: []}
    for start in range(0, len(unit.texts), _AT_ONCE):
        batch = unit.texts[start : start + _AT_ONCE]
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, held, ids in zip(batch, unit.held[start : start + _AT_ONCE], encoded, strict=True):
            array = np.array(ids if end is None else [*ids, end], dtype=np.int64)
            if not len(array):
                raise DataError(
                    f"The tokenizer makes no token of {text[:60]!r}; take the text out, or another tokenizer."
                )
            check_ids(array, len(tokenizer), f"unit {unit.number}")
            documents[held].append(array.astype(dtype))
    shards = {
        split: write_shard(folder, f"{split}-{unit.number:06}", documents[held], dtype)
        for split, held in ((TRAIN, False), (VALIDATION, True))
        if documents[held]
    }
    record = {"digest": unit.digest(tokenizer_fingerprint(tokenizer)), "dtype": dtype.str, "shards": shards}
    write_json(folder / UNITS / f"{unit.number:06}.json", UNIT_KIND, record)
    return record


_held: list[Any] = []


def _start(folder: str) -> None:
    """In a worker, once: its tokenizer; the workers are the parallelism."""
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _held.append(AutoTokenizer.from_pretrained(Path(folder) / TOKENIZER))


def _make(folder: Path, unit: Unit) -> dict[str, Any]:
    return make(folder, unit, _held[0])
