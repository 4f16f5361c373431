"""BABILong: bAbI facts hidden in order between sentences of long texts; sample builder and scorer.

Paper: Kuratov et al., BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack, 2024
(arXiv 2406.10149). A sample of N tokens has a budget of N - 300 (300 are kept for the prompt): the facts, in story
order, at slots drawn uniformly with replacement between background sentences that fill the rest.

N counts tokens of the tokenizer that is passed in. The official sets count GPT-2 BPE tokens whatever the model, so
pass a GPT-2 tokenizer to get their lengths.

Deviations from the published scripts, all deliberate: 0k has a branch of its own (facts only); the last sample of a
file is used too (`official_subset` gives the published 100); test facts come from the bAbI test file; a window of
background is at least 1,000 characters, so that very short samples find sentences; samples whose facts alone exceed
the budget are left out; random draws are Python's, so positions and background differ from the published files;
sentences are split by `background.sentence_spans`.
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError, UnknownNameError
from . import babi
from .babi import BabiSample
from .background import Document, named
from .haystack import Haystack, Reader

LENGTHS = {"0k": 0, "1k": 1_000, "2k": 2_000, "4k": 4_000, "8k": 8_000, "16k": 16_000, "32k": 32_000, "64k": 64_000,
           "128k": 128_000, "256k": 256_000, "512k": 512_000, "1M": 1_000_000, "10M": 10_000_000}  # fmt: skip
"""Official names of lengths, in tokens."""

_PLACES = frozenset(babi.PLACES)
_YES_NO = frozenset({"no", "yes"})
LABELS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _PLACES),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), _YES_NO),
    "qa5": frozenset({"Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"}),
    "qa7": frozenset({"none", "one", "three", "two"}),
    "qa8": frozenset({"apple", "football", "milk", "nothing"}),
    "qa10": _YES_NO | {"maybe"},
    "qa14": frozenset({"bedroom", "cinema", "kitchen", "office", "park", "school"}),
    "qa15": frozenset({"cat", "mouse", "sheep", "wolf"}),
    "qa16": frozenset({"gray", "green", "white", "yellow"}),
    "qa19": frozenset({"e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"}),
    "qa20": frozenset({"bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"}),
}
"""Possible answers of each task, as the scorer looks for them."""


# ----------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True, slots=True)
class BabilongSample:
    """One sample.

    Attributes:
        task: "qa1" .. "qa20".
        length: N in tokens; 0 means facts only.
        context: facts and background.
        question, target: as in bAbI; the question may end in a blank.
        seed: the seed of the stream it came from.
        provenance: facts and background documents, for reports.
        fact_slots: for each fact, how many background sentences stand before it.
        slots: number of slots (background sentences + 1).
        fact_offsets: for each fact, the token of the context at which it begins.
        tokens: tokens of the context, as assembled (sentence by sentence).
    """

    task: str
    length: int
    context: str
    question: str
    target: str
    seed: int
    provenance: str
    fact_slots: tuple[int, ...]
    slots: int
    fact_offsets: tuple[int, ...]
    tokens: int


def prompt(sample: BabilongSample) -> str:
    """The plain format for fine-tuned models: context and question. The answer follows as " " + target."""
    return f"{sample.context} {sample.question.strip()}"


# ----------------------------------------------------------------------------------------------------------- builder


@dataclass(frozen=True, kw_only=True)
class Babilong:
    """A stream of samples: iterate over it, as often as wanted; each iteration gives the same samples, lazily.

    Made by `open_babilong`, which explains the fields. `len` is not defined: generated and training streams never end.
    """

    task: str
    length: int
    haystack: Haystack
    facts: Callable[[], Iterator[BabiSample]]
    endless: bool
    seed: int
    reserve: int
    max_n_facts: int | None
    start_pct: float | None
    end_pct: float | None
    count: int | None

    @property
    def budget(self) -> int:
        """Tokens of a context: facts and background."""
        return self.length - self.reserve

    def __iter__(self) -> Iterator[BabilongSample]:
        samples = self._samples()
        return samples if self.count is None else islice(samples, self.count)

    def _samples(self) -> Iterator[BabilongSample]:
        rng = random.Random(f"mnemic.babilong|{self.task}|{self.length}|{self.seed}")
        reader = Reader(self.haystack, random.Random(f"mnemic.background|{self.task}|{self.length}|{self.seed}"))
        skipped = made = 0
        for story in self.facts():
            sample = self._build(story, rng, reader)
            if sample is not None:
                made += 1
                yield sample
                continue
            skipped += 1
            if made == 0 and skipped == 2000:
                break
        if made == 0:
            raise ConfigError(
                f"None of {skipped} samples of {self.task} fits length {self.length}: the budget is {self.budget} "
                f"tokens and at most {self.max_n_facts} facts with the question are allowed. Use a larger length, a "
                "smaller reserve, or max_n_facts=None."
            )

    def _build(self, story: BabiSample, rng: random.Random, reader: Reader) -> BabilongSample | None:
        if self.max_n_facts is not None and len(story.facts) + 1 > self.max_n_facts:
            return None
        codec = self.haystack.codec
        facts = [codec.fact(" " + fact) for fact in story.facts]
        total = sum(map(len, facts))
        names: list[str] = []
        if self.length == 0:
            slots, sentences = (0,) * len(facts), []
        else:
            if total >= self.budget:
                return None
            sentences, names = reader.take(self.budget - total)
            possible = self._possible_slots(sentences, total)
            slots = tuple(sorted(babi.pick(rng, possible) for _ in facts))
        ids: list[int] = []
        offsets = []
        at = 0
        for slot in range(len(sentences) + 1):
            while at < len(facts) and slots[at] == slot:
                offsets.append(len(ids))
                ids += facts[at]
                at += 1
            if slot < len(sentences):
                ids += sentences[slot]
        context = " ".join(story.facts) if self.length == 0 else codec.decode(ids).strip()
        background = f"; background: {'; '.join(names)}" if names else ""
        return BabilongSample(
            self.task, self.length, context, story.question, story.answer, self.seed,
            f"facts: {story.provenance}{background}", slots, len(sentences) + 1, tuple(offsets), len(ids),
        )  # fmt: skip

    def _possible_slots(self, sentences: list[tuple[int, ...]], total: int) -> Sequence[int]:
        if self.start_pct is None and self.end_pct is None:
            return range(len(sentences) + 1)
        low = int(self.budget * (self.start_pct or 0.0))
        high = int(self.budget * (1.0 if self.end_pct is None else self.end_pct)) - total
        before = accumulate(map(len, sentences[:-1]), initial=0)
        possible = [slot for slot, offset in enumerate(before) if low <= offset < high]
        if not possible:
            raise ConfigError(
                f"No slot between {self.start_pct} and {self.end_pct} of {self.budget} tokens leaves room for {total} "
                "tokens of facts. Widen the window or increase the length."
            )
        return possible


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


# ----------------------------------------------------------------------------------------------------------- scoring


def compare_answers(target: str, output: str, question: str, task: str) -> bool:
    """The official rule, bit for bit: the target is the only label in the first sentence that the question lacks.

    Labels are looked for as substrings. So in qa7 the right answer "none" also contains "one" and counts as wrong;
    `compare_answers_fixed` repairs that. Tables must say which rule they use.

    Raises:
        UnknownNameError: unknown task.
    """
    return _compare(target, output, question, task, lambda label, text: label in text)


def compare_answers_fixed(target: str, output: str, question: str, task: str) -> bool:
    """As `compare_answers`, but labels are looked for as whole words."""
    return _compare(target, output, question, task, _has_word)


def _has_word(label: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text) is not None


def _compare(target: str, output: str, question: str, task: str, has: Callable[[str, str], bool]) -> bool:
    if task not in LABELS:
        raise UnknownNameError.of("BABILong task", task, LABELS)
    labels = {label.lower() for label in LABELS[task]}
    target, question, output = target.lower(), question.lower(), output.lower()
    for end in (".", "<context>", "<example>"):
        output = output.split(end)[0]
    found = {label for label in labels if has(label, output)} - {label for label in labels if has(label, question)}
    wanted = set(target.split(",")) if "," in target and len(target) > 3 else {target}
    return found == wanted
