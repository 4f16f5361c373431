"""Prepare: documents -> a folder of token shards, in parallel, and resumable after any interruption.

The sources are cut into units of so many characters. A unit is tokenised and written by one process, and its record
is written last; what a unit holds depends on the sources and settings alone. Running again reads the sources, keeps
every unit whose record fits what it would be made from, and makes the others: the folder comes out the same, byte
for byte, however often it was interrupted and whatever the number of workers.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError, InputError, MnemicError
from .shards import (
    KIND,
    MANIFEST,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    TokenStore,
    load_tokenizer,
    read_json,
    token_type,
    write_json,
)
from .sources import Faults, expand, texts
from .tokenizer import byte_tokenizer, tokenizer_fingerprint
from .units import UNITS, Unit, records

PLAN, PLAN_KIND = "prepare.json", "preparation"
_HALF = ".*.tmp-*"
UNIT_CHARACTERS = 2**26


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What decides the content of a prepared folder.

    Args:
        sources: files, folders, patterns, or `hf:` names; see `sources`. column: of the text, where rows have columns.
        tokenizer: folder or hub name; or train_tokenizer: tokens of a byte-level BPE trained on these documents.
        validation_fraction: share of the documents kept apart: number n (from 0) is, where floor((n + 1) f) exceeds
            floor(n f). on_error: "stop" at the first bad row, or "skip" and count.
        unit_characters: text of a shard.

    Raises:
        ConfigError: settings that cannot be.
    """

    sources: tuple[str, ...]
    column: str = "text"
    tokenizer: str | None = None
    train_tokenizer: int | None = None
    validation_fraction: float = 0.0
    on_error: str = "stop"
    unit_characters: int = UNIT_CHARACTERS

    def __post_init__(self) -> None:
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ConfigError("Give a tokenizer (a folder or hub name), or the size of one to train; not both.")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction = {self.validation_fraction}, expected 0 <= fraction < 1.")
        if self.unit_characters < 1:
            raise ConfigError(f"unit_characters = {self.unit_characters}, expected at least 1.")
        Faults(self.on_error)

    def held_out(self, number: int) -> bool:
        share = Fraction(str(self.validation_fraction))
        return (number + 1) * share // 1 > number * share // 1


def prepare(
    preparation: Preparation,
    folder: str | Path,
    *,
    workers: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Write the shards of `preparation` to `folder`, or go on where an earlier call was interrupted.

    Args:
        workers: processes; they change nothing in the result. progress: called with the documents and tokens so far.

    Returns: the manifest.

    Raises:
        DataError: sources that cannot be read, bad rows (unless skipped), no documents. InputError: the folder holds
        something else, or cannot be written. ConfigError: fewer than one worker.
    """
    if workers < 1:
        raise ConfigError(f"{workers} workers, expected at least 1.")
    folder, sources = Path(folder), expand(preparation.sources)
    finished = _claim(folder, preparation, sources)
    if finished is not None:
        return finished
    tokenizer = _tokenizer(folder, preparation, sources)
    (folder / UNITS).mkdir(exist_ok=True)
    faults = Faults(preparation.on_error)
    found: dict[str, list[dict[str, Any]]] = {TRAIN: [], VALIDATION: []}
    documents = tokens = 0
    for record in records(folder, _units(preparation, sources, faults), tokenizer, workers):
        for split, shard in record["shards"].items():
            found[split].append(shard)
            documents, tokens = documents + shard["documents"], tokens + shard["tokens"]
        if progress is not None:
            progress(documents, tokens)
    _check_found(found, documents, preparation, faults)
    manifest = {
        "dtype": token_type(len(tokenizer)).str,
        "vocabulary": len(tokenizer),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "end": tokenizer.eos_token_id,
        "sources": sources,
        "documents": documents,
        "tokens": tokens,
        "skipped": faults.count,
        "first_skipped": faults.first,
        "splits": {split: shards for split, shards in found.items() if shards},
    }
    write_json(folder / MANIFEST, KIND, manifest)
    _clean(folder, manifest)
    return read_json(folder / MANIFEST, KIND)


def check(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder whose files all fit their checksums, and whose tokenizer is the one named.

    Raises:
        DataError: one does not.
    """
    manifest = read_json(Path(folder) / MANIFEST, KIND)
    load_tokenizer(folder)
    for split in manifest["splits"]:
        TokenStore(folder, split, verify=True)
    return manifest


def _claim(folder: Path, preparation: Preparation, sources: list[str]) -> dict[str, Any] | None:
    """Mark an empty folder as ours, or find that it is; the manifest of a finished one."""
    files = [Path(s) if Path(s).is_file() else None for s in sources]
    plan = {**asdict(preparation), "sources": sources}
    plan["bytes"] = [None if f is None else f.stat().st_size for f in files]
    plan["changed"] = [None if f is None else f.stat().st_mtime_ns for f in files]
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; the output is a folder.")
    if not (folder / PLAN).exists():
        # What was half written is ours: a run that was killed before its first file was whole.
        if folder.is_dir() and any(not path.match(_HALF) for path in folder.iterdir()):
            raise InputError(f"{folder} holds files that mnemic prepare did not write; choose an empty or new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, PLAN_KIND, plan)
        return None
    before = read_json(folder / PLAN, PLAN_KIND)
    changed = [key for key, value in plan.items() if before.get(key) != value]
    if not (folder / MANIFEST).exists():
        if changed:
            # Units are kept by what they were made from; the tokenizer may have been made from other documents.
            shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
            write_json(folder / PLAN, PLAN_KIND, plan)
        return None
    for key in changed:
        if key != "changed":
            raise InputError(
                f"{folder} was prepared with {key} = {before.get(key)!r}, now it is {plan[key]!r}; choose another "
                "folder or delete it."
            )
    return read_json(folder / MANIFEST, KIND)


def _tokenizer(folder: Path, preparation: Preparation, sources: list[str]) -> Any:
    """The tokenizer in `folder`; made there first, in one step, if it is not."""
    from transformers import AutoTokenizer

    place, temporary = folder / TOKENIZER, folder / f".{TOKENIZER}"
    if not place.is_dir():
        if preparation.tokenizer is not None:
            try:
                made = AutoTokenizer.from_pretrained(preparation.tokenizer)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise DataError(
                    f"No tokenizer in {preparation.tokenizer}: expected a folder with one, or the name of a model that "
                    f"can be reached on the hub; or train one (--train-tokenizer). {reason}"
                ) from error
        else:
            assert preparation.train_tokenizer is not None
            read = enumerate(texts(sources, preparation.column, Faults(preparation.on_error)))
            learnt = (text for number, (text, _) in read if not preparation.held_out(number))
            made = byte_tokenizer(learnt, preparation.train_tokenizer)
        shutil.rmtree(temporary, ignore_errors=True)
        made.save_pretrained(temporary)
        os.replace(temporary, place)
    # Also the first time from the folder: a run that goes on must see the same.
    return AutoTokenizer.from_pretrained(place)


def _units(preparation: Preparation, sources: list[str], faults: Faults) -> Iterator[Unit]:
    number = characters = 0
    unit = Unit(0, [], [])
    for text, _ in texts(sources, preparation.column, faults):
        unit.texts.append(text)
        unit.held.append(preparation.held_out(number))
        number, characters = number + 1, characters + len(text)
        if characters >= preparation.unit_characters:
            yield unit
            unit, characters = Unit(unit.number + 1, [], []), 0
    if unit.texts:
        yield unit


def _check_found(found: dict[str, list], documents: int, preparation: Preparation, faults: Faults) -> None:
    problem: MnemicError | None = None
    if not documents:
        skipped = f"; {faults.count} rows were skipped, the first: {faults.first}" if faults.count else "."
        problem = DataError(f"The sources hold no documents{skipped}")
    elif preparation.validation_fraction and not found[VALIDATION]:
        problem = DataError(
            f"A validation fraction of {preparation.validation_fraction} holds out none of {documents} documents; give "
            f"at least {1 / documents:.3g}, or split long texts into more documents."
        )
    elif not found[TRAIN]:
        problem = DataError(f"All of {documents} documents are held out; give a smaller validation fraction.")
    if problem is not None:
        raise problem


def _clean(folder: Path, manifest: dict[str, Any]) -> None:
    """Remove the records, shards of an earlier attempt on sources that have changed since, and what a process that was
    killed left half written."""
    for leftover in (folder / UNITS, *folder.glob(_HALF)):
        shutil.rmtree(leftover, ignore_errors=True)
    named = {shard["name"] for shards in manifest["splits"].values() for shard in shards}
    for path in folder.iterdir():
        if path.suffix in (".tokens", ".index") and path.stem not in named:
            path.unlink()
