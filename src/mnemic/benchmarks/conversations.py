"""LoCoMo (arXiv 2402.17753): ten long conversations and 1,986 questions about them, from the released file.

Deviations from the released code: one prompt for all categories (the released one hints at the date in category 2 and
offers two options in category 5), and a context of all sessions in order (released: later sessions in front, cut when
full). The released scorer stops at the 444 unanswerable questions without an `answer`, which the rule of their category
does not read; here they are scored, so the official and the fixed rule are one.
"""

import gzip
import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import regex

from ..core.errors import DataError, MissingExtraError
from .task import Record, Task

LOCOMO = "https://github.com/snap-research/locomo, data/locomo10.json (CC BY-NC 4.0: evaluation only)"
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
ADVERSARIAL = 5
ABSENT = "No information available"
_REFUSALS = (ABSENT.lower(), "not mentioned")
_SESSION = re.compile(r"session_(\d+)")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says. name: its id in the evidence ("D3:14"). date: of its session."""

    name: str
    speaker: str
    text: str
    caption: str
    date: str

    def __str__(self) -> str:
        shared = f" and shared {self.caption}." if self.caption else ""
        return f'{self.speaker} said, "{self.text}"{shared}'


@dataclass(frozen=True)
class Conversation:
    """A conversation of LoCoMo: its sessions, in order, and its questions as the file has them."""

    name: str
    sessions: tuple[tuple[Turn, ...], ...]
    questions: tuple[Mapping[str, Any], ...]

    @property
    def turns(self) -> tuple[Turn, ...]:
        return tuple(turn for session in self.sessions for turn in session)

    @property
    def context(self) -> str:
        parts = (f"DATE: {session[0].date}\n" + "\n".join(map(str, session)) for session in self.sessions)
        return "\n\n".join(parts)


def locomo(data: str | Path) -> tuple[Conversation, ...]:
    """The conversations of locomo10.json, gzipped or not; data: the file, or a folder with it or locomo10/.

    Raises:
        DataError: no such file, or another format.
    """
    path = find_file(data, ("locomo10.json", "locomo10.json.gz"), "locomo10", LOCOMO)
    try:
        return tuple(_conversation(sample) for sample in read_samples(path, LOCOMO))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not LoCoMo's file ({error!r}); get it again: {LOCOMO}.") from error


def _conversation(sample: Mapping[str, Any]) -> Conversation:
    said = sample["conversation"]
    # Some dates have no session.
    numbers = sorted(int(m[1]) for m in map(_SESSION.fullmatch, said) if m and said[m[0]])
    sessions = tuple(
        tuple(
            Turn(t["dia_id"], t["speaker"], t["text"], t.get("blip_caption") or "", said[f"session_{n}_date_time"])
            for t in said[f"session_{n}"]
        )
        for n in numbers
    )
    return Conversation(sample["sample_id"], sessions, tuple(sample["qa"]))


def locomo_records(
    data: str | Path, *, categories: Sequence[int] = tuple(CATEGORIES), seed: int = 0
) -> Iterator[Record]:
    """Questions in the order of the file, conversation by conversation; the file fixes them, so `seed` does nothing.

    metadata: conversation, category, evidence (ids of turns, as released) and found (those that exist).
    """
    for conversation in locomo(data):
        context, names = conversation.context, {turn.name for turn in conversation.turns}
        for number, asked in enumerate(conversation.questions):
            category = int(asked["category"])
            if category not in categories:
                continue
            evidence = list(asked.get("evidence", ()))
            yield Record(
                context=context,
                question=_locomo_question(asked["question"]),
                targets=(ABSENT if category == ADVERSARIAL else str(asked["answer"]),),
                metadata={
                    "id": f"{conversation.name}/{number}",
                    "conversation": conversation.name,
                    "asked": asked["question"],
                    "category": category,
                    "evidence": evidence,
                    "found": [name for name in evidence if name in names],
                },
            )


def _locomo_question(question: str) -> str:
    return (
        "Answer the question about the conversation above with a few words, taken from it where you can. If it does "
        f'not say, answer "{ABSENT}".\nQuestion: {question}\nAnswer:'
    )


def locomo_score(answer: str, record: Record) -> float:
    """LoCoMo's rule.

    2, 4: F1 of stemmed words. 3: with what stands before ";" in the target. 1: target and answer split at commas, the
    mean over the target's parts of the best F1. 5: whether the answer says that nothing is known.
    """
    category, target = record.metadata["category"], record.targets[0]
    if category == ADVERSARIAL:
        return float(any(refusal in answer.lower() for refusal in _REFUSALS))
    if category == 1:
        said = [_words(part) for part in answer.split(",")]
        return float(np.mean([max(_f1(one, _words(part)) for one in said) for part in target.split(",")]))
    return _f1(_words(answer), _words(target.split(";")[0] if category == 3 else target))


def locomo_summary(records: Sequence[Record], answers: Sequence[str]) -> dict[str, Any]:
    """Means (0 to 1) by category, over all, over categories 1 to 4 (each weighing the same), and what was refused.

    refuses: the model says that nothing is known to nearly every question, which alone gives 1 in category 5.
    """
    by_category: dict[int, list[float]] = defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        by_category[record.metadata["category"]].append(locomo_score(answer, record))
    means = {category: sum(s) / len(s) for category, s in sorted(by_category.items())}
    answerable = [mean for category, mean in means.items() if category != ADVERSARIAL]
    refused = sum(any(refusal in answer.lower() for refusal in _REFUSALS) for answer in answers) / len(answers)
    return {
        "categories": {CATEGORIES[c]: {"score": means[c], "count": len(by_category[c])} for c in means},
        "overall": sum(map(sum, by_category.values())) / len(answers),
        "answerable": sum(answerable) / len(answerable) if answerable else None,
        "adversarial": means.get(ADVERSARIAL),
        "refused": refused,
        "refuses": refused > 0.95,
    }


def evidence_recall(retrieved: Iterable[str], evidence: Sequence[str]) -> float:
    """LoCoMo's: the share of the evidence that was retrieved; 1 where there is none.

    retrieved: ids of turns ("D3:14"), or of whole sessions ("S3"), of which then all turns count.
    """
    names = set(retrieved)
    if not evidence:
        return 1.0
    if any(name.startswith("S") for name in names):
        return sum(f"S{one.split(':')[0][1:]}" in names for one in evidence) / len(evidence)
    return sum(one in names for one in evidence) / len(evidence)


def normalised(text: str) -> list[str]:
    """Words of LoCoMo's rule: without commas, case, punctuation, and the words a, an, the, and."""
    kept = "".join(c for c in text.replace(",", "").lower() if c not in set(string.punctuation))
    return regex.sub(r"\b(a|an|the|and)\b", " ", kept).split()


def _words(text: str) -> list[str]:
    return [_stem(word) for word in normalised(text)]


def _f1(answer: Sequence[str], target: Sequence[str]) -> float:
    same = sum((Counter(answer) & Counter(target)).values())
    if not same:
        return 0.0
    precision, recall = same / len(answer), same / len(target)
    return (2 * precision * recall) / (precision + recall)


@lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    try:
        from nltk.stem.porter import PorterStemmer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("LoCoMo's rule stems words with nltk: pip install 'mnemic[eval]'.") from error
    # The mode the released scorer runs in; others change F1 in the third digit.
    return PorterStemmer(mode=PorterStemmer.NLTK_EXTENSIONS)


LOCOMO_TASK = Task(
    name="locomo",
    source=LOCOMO,
    records=locomo_records,
    official=locomo_score,
    fixed=locomo_score,
    max_new_tokens=32,
)


def find_file(data: str | Path, names: Sequence[str], folder: str, source: str) -> Path:
    """The file itself, or the first of `names` in the folder `data` or its subfolder; `source`: where it comes from.

    Raises `DataError` where there is none.
    """
    path = Path(data)
    if path.is_dir():
        places = [place / name for place in (path, path / folder) for name in names]
        path = next((place for place in places if place.is_file()), places[0])
    if not path.is_file():
        raise DataError(f"{path} does not exist. Download it from {source} and give its path.")
    return path


def read_samples(path: Path, source: str) -> list[Any]:
    """A list of samples from a JSON file, gzipped or not; raises `DataError` where there is none."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found = json.loads(raw)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); get it again from {source}.") from error
    if not isinstance(found, list) or not found:
        raise DataError(f"{path} holds no list of samples; expected {source}.")
    return found
