"""LongBench (arXiv 2308.14508): questions about long texts, from the released JSON lines, by the released rules.

Here are the twelve sets whose rules need no further package; the others (summaries by ROUGE, code by edit distance,
Chinese answers by a word segmenter) run through lm-evaluation-harness. Prompts are our own, one for each kind of set,
and contexts are whole: the released protocol cuts them in the middle, which is `truncated(..., keep="middle out")`.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from .released import released_records
from .task import Record, Task

SOURCE = "https://github.com/THUDM/LongBench, data.zip with a NAME.jsonl for each set"
QUESTION = "Answer the question about the text above with a few words.\nQuestion: {}\nAnswer:"
_SUMMARY = 'Which paragraph above is this a summary of? Answer with "{}" and its number.\n{{}}\nAnswer:'
_COUNT = (
    "How many different paragraphs are there above, when repeated ones count once? Answer with a number.{}\nAnswer:"
)


def longbench_records(name: str, data: str | Path, *, seed: int = 0) -> Iterator[Record]:
    """Records of one set; data: its .jsonl, or the folder with it. The file fixes them, so `seed` does nothing.

    metadata: id, set, length (words, or characters in Chinese), classes.

    Raises:
        DataError: no such file, or another format.
    """

    def make(given: dict[str, Any], where: str) -> Record:
        found = given["dataset"]
        if found.removesuffix("_e") != name:
            raise DataError(f"{where} belongs to {found!r}, expected {name!r}.")
        return Record(
            context=given["context"],
            question=_SETS[name].prompt.format(given["input"]),
            targets=tuple(given["answers"]),
            metadata={
                "id": given["_id"],
                "asked": given["input"],
                "set": name,
                "length": given["length"],
                "classes": given["all_classes"] or [],
            },
        )

    return released_records(name, data, SOURCE, make)


def token_f1(answer: str, target: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, without case, punctuation and articles."""
    return words_f1(english_words(answer), english_words(target))


def words_f1(said: Sequence[str], right: Sequence[str]) -> float:
    """F1 of two bags of words."""
    same = sum((Counter(said) & Counter(right)).values())
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(right)
    return (2 * precision * recall) / (precision + recall)


def classification(answer: str, target: str, classes: Sequence[str]) -> float:
    """1 / the number of classes named, if the right one is among them; names within the right name do not count.

    The released rule: a class that follows one taken out is skipped, and may stay.
    """
    named = [one for one in classes if one in answer]
    place = 0
    while place < len(named):
        if named[place] in target and named[place] != target:
            # The first of equals goes, and what stands behind moves up.
            named.remove(named[place])
        place += 1
    return 1.0 / len(named) if target in named else 0.0


def classification_fixed(answer: str, target: str, classes: Sequence[str]) -> float:
    """`classification` without skipping."""
    named = [one for one in classes if one in answer and (one == target or one not in target)]
    return 1.0 / len(named) if target in named else 0.0


def number_share(answer: str, target: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the answer that are the first number of the target, as digits."""
    said = re.findall(r"\d+", answer)
    right = re.findall(r"\d+", target)
    return sum(number == right[0] for number in said) / len(said) if said and right else 0.0


Rule = Callable[[str, str, Sequence[str]], float]


@dataclass(frozen=True)
class _Set:
    prompt: str
    max_new_tokens: int
    official: Rule
    fixed: Rule
    first_line: bool = False


def _questions(max_new_tokens: int) -> _Set:
    return _Set(QUESTION, max_new_tokens, token_f1, token_f1)


# Contexts of the sets without words of ours end in worked examples that the input continues.
_SETS: Mapping[str, _Set] = {
    "narrativeqa": _questions(128),
    "qasper": _questions(128),
    "multifieldqa_en": _questions(64),
    "hotpotqa": _questions(32),
    "2wikimqa": _questions(32),
    "musique": _questions(32),
    "triviaqa": _Set("{}", 32, token_f1, token_f1, first_line=True),
    "trec": _Set("{}", 64, classification, classification_fixed, first_line=True),
    "lsht": _Set("{}", 64, classification, classification_fixed, first_line=True),
    "passage_count": _Set(_COUNT, 32, number_share, number_share),
    "passage_retrieval_en": _Set(_SUMMARY.format("Paragraph"), 32, number_share, number_share),
    "passage_retrieval_zh": _Set(_SUMMARY.format("段落"), 32, number_share, number_share),
}


def _score(name: str, which: str, answer: str, record: Record) -> float:
    chosen = _SETS[name]
    if chosen.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    rule: Rule = getattr(chosen, which)
    return max((rule(answer, target, record.metadata["classes"]) for target in record.targets), default=0.0)


def english_words(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _task(name: str) -> Task:
    records: Any = partial(longbench_records, name)
    return Task(
        name=f"longbench {name}",
        source=SOURCE,
        records=records,
        official=partial(_score, name, "official"),
        fixed=partial(_score, name, "fixed"),
        max_new_tokens=_SETS[name].max_new_tokens,
    )


LONGBENCH_TASKS = {name: _task(name) for name in _SETS}
