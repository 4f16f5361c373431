"""Endless generated samples of every task."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import islice

from ...core.errors import InputError
from .files import check_name
from .sample import BabiSample
from .worlds import WORLDS

SPLITS = ("train", "validation", "test")
GENERATED_TASKS = tuple(WORLDS)


def generate(task: str, seed: int, split: str, count: int) -> list[BabiSample]:
    """The first `count` samples of `stream(task, seed, split)`."""
    if count < 0:
        raise InputError(f"count must be 0 or more; got {count}.")
    return list(islice(stream(task, seed, split), count))


def stream(task: str, seed: int, split: str = "train") -> Iterator[BabiSample]:
    """Endless generated samples of any task, "qa1" .. "qa20".

    Equal arguments give equal samples, on every platform. Samples of different splits are never equal, whatever the
    seeds: the hash of facts and question says which split a sample belongs to.

    Raises:
        UnknownNameError: a task that does not exist, or a split other than "train", "validation", "test".
    """
    check_name("generated bAbI task", task, GENERATED_TASKS)
    check_name("split", split, SPLITS)
    return _stream(task, seed, split)


def split_of(facts: Sequence[str], question: str) -> str:
    """The split that a generated sample belongs to, by the hash of its text; question: as generated, blanks and all."""
    digest = hashlib.sha256("\n".join((*facts, question)).encode()).digest()
    return SPLITS[digest[0] % len(SPLITS)]


def _stream(task: str, seed: int, split: str) -> Iterator[BabiSample]:
    rng = random.Random(f"mnemic.babi|{task}|{seed}|{split}")
    number = 0
    while True:
        for facts, question, answer, supporting in WORLDS[task](rng):
            if split_of(facts, question) == split:
                provenance = f"generated {task} (v1.2 surface), seed {seed}, {split}, sample {number}"
                yield BabiSample(task, facts, question, answer, supporting, provenance)
                number += 1
