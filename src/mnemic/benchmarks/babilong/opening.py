"""Streams of BABILong samples by name: lengths, facts of the released files or generated, background."""

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError, DataError, UnknownNameError
from .. import babi
from ..babi import BabiSample
from ..background import Document, named
from ..haystack import Haystack
from .builder import Babilong

LENGTHS = {"0k": 0, "1k": 1_000, "2k": 2_000, "4k": 4_000, "8k": 8_000, "16k": 16_000, "32k": 32_000, "64k": 64_000,
           "128k": 128_000, "256k": 256_000, "512k": 512_000, "1M": 1_000_000, "10M": 10_000_000}  # fmt: skip
"""Official names of lengths, in tokens."""


def open_babilong(
    task: str,
    length: int | str,
    tokenizer: Any,
    split: str = "test",
    *,
    data: str | Path | None = None,
    seed: int = 0,
    count: int | None = None,
    facts: str = "auto",
    background: "str | Sequence[Document] | Haystack" = "auto",
    reserve: int = 300,
    max_n_facts: int | str | None = "auto",
    start_pct: float | None = None,
    end_pct: float | None = None,
    min_sentence_tokens: int = 10,
    max_sentence_tokens: int | None = None,
) -> Babilong:
    """A lazily built, repeatable stream of BABILong samples. Equal arguments give equal bytes.

    Args:
        task: "qa1" .. "qa20".
        length: N in tokens of `tokenizer`, or an official name: "0k" (facts only), "1k", "2k", "4k" .. "1M", "10M".
        tokenizer: any object with encode and decode. With one that loses text (a word-level one), the context is what
            its decode gives back.
        split: "train", "validation" or "test": which facts and which background are used.
        data: folder with babi-v1.2/, gutenberg-books/ and babilong-index/; without it, the folder named by the
            environment variable MNEMIC_DATA; without either, generated stories and the prose that comes with Python.
        seed: of stories, positions and background.
        count: stop after so many samples.
        facts: "released" (the bAbI files: test in file order, once; train, and as validation the last tenth of the
            training file, without end in a new order each round; en-10k where the copy has that file, else en),
            "official-100" (the published subset of the test file, qa1 .. qa5), "generated" (without end), or "auto":
            released where there is a data folder, else generated.
        background: "books", "prose", "pg19", documents, a shared `Haystack`, or "auto": books where there is a data
            folder, else prose.
        reserve: tokens of N kept for prompt and question; the context has N - reserve.
        max_n_facts: samples with more facts, counting the question as one, are left out; "auto" is the official
            (N - reserve) // 8, and no bound for 0k.
        start_pct, end_pct: facts only between these shares of the context.
        min_sentence_tokens, max_sentence_tokens: background sentences outside these are skipped.

    Raises:
        UnknownNameError: unknown task, length, split, facts or background.
        ConfigError: values that do not go together; while iterating, a length too short for the task.
        DataError: data that is asked for and not there.
        MissingExtraError: background="pg19" without `datasets`.
    """
    data = data_folder(data)
    if isinstance(length, str) and length not in LENGTHS:
        raise UnknownNameError.of("length", length, LENGTHS)
    tokens = LENGTHS[length] if isinstance(length, str) else length
    if not isinstance(tokens, int) or tokens < 0:
        raise ConfigError(f"length must be a name such as '4k' or a number of tokens, 0 or more; got {length!r}.")
    if reserve < 0 or (tokens and tokens <= reserve):
        raise ConfigError(
            f"length {tokens} leaves no context after a reserve of {reserve}; use a larger length or a smaller reserve."
        )
    if count is not None and count < 1:
        raise ConfigError(f"count must be at least 1, or None for all; got {count}.")
    for name, share in (("start_pct", start_pct), ("end_pct", end_pct)):
        if share is not None and not 0.0 <= share <= 1.0:
            raise ConfigError(f"{name} is a share of the context, 0 to 1; got {share}.")
    if split not in babi.SPLITS:
        raise UnknownNameError.of("split", split, babi.SPLITS)
    if max_n_facts == "auto":
        max_n_facts = (tokens - reserve) // 8 if tokens else None
    if isinstance(max_n_facts, str):
        raise ConfigError(f"max_n_facts must be a number, None or 'auto'; got {max_n_facts!r}.")
    stories, endless = _stories(task, split, facts, data, seed)
    if not isinstance(background, Haystack):
        documents = named(background, split, data) if isinstance(background, str) else background
        background = Haystack(documents, tokenizer, min_sentence_tokens, max_sentence_tokens)
    elif background.codec.tokenizer is not tokenizer:
        raise ConfigError("The Haystack was made with another tokenizer; make one with the tokenizer given here.")
    return Babilong(
        task=task, length=tokens, haystack=background, facts=stories, endless=endless and count is None, seed=seed,
        reserve=reserve if tokens else 0, max_n_facts=max_n_facts, start_pct=start_pct, end_pct=end_pct, count=count,
    )  # fmt: skip


def data_folder(data: str | Path | None = None) -> Path | None:
    """The data folder: the argument, else the environment variable MNEMIC_DATA, else None.

    Raises:
        DataError: the folder that is named does not exist.
    """
    given = data if data is not None else os.environ.get("MNEMIC_DATA") or None
    if given is None:
        return None
    folder = Path(given)
    if not folder.is_dir():
        raise DataError(
            f"The data folder {folder} (from {'the argument data' if data is not None else 'MNEMIC_DATA'}) does not "
            "exist. Expected a folder with babi-v1.2/ and gutenberg-books/; without one, stories are generated and "
            "the background is prose that comes with Python."
        )
    return folder


def _stories(
    task: str, split: str, facts: str, data: Path | None, seed: int
) -> tuple[Callable[[], Iterator[BabiSample]], bool]:  # fmt: skip
    """A function that starts the stories over, and whether they never end."""
    if facts == "auto":
        facts = "generated" if data is None else "released"
    if facts not in ("generated", "released", "official-100"):
        raise UnknownNameError.of("source of facts", facts, ("auto", "generated", "official-100", "released"))
    if facts == "generated":
        babi.stream(task, seed, split)  # checks the names
        return lambda: babi.stream(task, seed, split), True
    if data is None:
        raise DataError(
            f"facts={facts!r} needs a data folder with babi-v1.2/: give data or set MNEMIC_DATA; "
            'facts="generated" needs none.'
        )
    if facts == "official-100":
        if split != "test":
            raise ConfigError(f"The official subset is part of the test split; got split={split!r}.")
        subset = official_subset(task, data)
        return lambda: iter(subset), False
    if split == "test":
        samples = babi.read(data, task)
        return lambda: iter(samples), False
    samples = babi.read(data, task, "train", babi.sizes(data, task, "train")[-1])
    cut = len(samples) * 9 // 10
    part = samples[cut:] if split == "validation" else samples[:cut]
    return lambda: _rounds(part, f"mnemic.rounds|{task}|{split}|{seed}"), True


def _rounds(samples: Sequence[BabiSample], seed: str) -> Iterator[BabiSample]:
    rng = random.Random(seed)
    while True:
        yield from sorted(samples, key=lambda _: rng.random())


def official_subset(task: str, data: str | Path | None = None) -> tuple[BabiSample, ...]:
    """The 100 bAbI test samples of the published BABILong sets of qa1 .. qa5, in their order.

    Args:
        data: folder with babi-v1.2/ and babilong-index/test_100_idxs.json; without it, MNEMIC_DATA.

    Raises:
        DataError: no data folder, no index file, or one that is not for these stories.
        UnknownNameError: a task without published indices.
    """
    folder = data_folder(data)
    if folder is None:
        raise DataError("The official subset needs a data folder with babilong-index/: give data or set MNEMIC_DATA.")
    file = folder / "babilong-index" / "test_100_idxs.json"
    if not file.is_file():
        raise DataError(f"{file} does not exist. Expected the file data/test_100_idxs.json of booydar/babilong.")
    try:
        indices: dict[str, list[int]] = json.loads(file.read_text("utf-8"))
        if task not in indices:
            raise UnknownNameError.of("task with official indices", task, indices)
        samples = babi.read(folder, task)
        return tuple(samples[index] for index in indices[task])
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(f"{file}: {error!r}. Expected lists of indices below 1000 by task; get it again.") from error
