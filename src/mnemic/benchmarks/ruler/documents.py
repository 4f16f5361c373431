"""RULER's question answering: documents of SQuAD 2.0 (qa_1) or HotpotQA (qa_2), the right ones among others.

The files are local: dev-v2.0.json of SQuAD, hotpot_dev_distractor_v1.json of HotpotQA.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ...core.errors import DataError
from ..draws import distinct, shuffled
from ..fitting import fill
from ..task import Record, Task
from .needles import SOURCE
from .scoring import match_part, match_part_words

RESERVE = 32
FILES = {"qa_1": "dev-v2.0.json of SQuAD 2.0", "qa_2": "hotpot_dev_distractor_v1.json of HotpotQA"}


@dataclass(frozen=True)
class Question:
    """gold: documents that come first; near: others of the same article, taken before any further ones."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


def read(name: str, file: str | Path) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """Questions in file order that have an answer, and all documents, sorted.

    Raises:
        DataError: no such file, or one of another format.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. {name} reads {FILES[name]}; get it from its authors and give its path."
        )
    return _read(name, str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _read(name: str, file: str, _mtime: int) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    try:
        content = json.loads(Path(file).read_text("utf-8"))
        questions, documents = _squad(content) if name == "qa_1" else _hotpot(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not {FILES[name]}: {error!r}. Get the file again.") from error
    if not questions:
        raise DataError(f"{file} has no question with an answer; expected {FILES[name]}.")
    return tuple(questions), tuple(documents)


def _squad(content: Mapping[str, Any]) -> tuple[list[Question], list[str]]:
    articles = [[p["context"] for p in article["paragraphs"]] for article in content["data"]]
    documents = sorted({text for article in articles for text in article})
    index = {text: i for i, text in enumerate(documents)}
    questions = []
    for article, texts in zip(content["data"], articles, strict=True):
        for paragraph in article["paragraphs"]:
            own = index[paragraph["context"]]
            near = tuple(dict.fromkeys(index[text] for text in texts if index[text] != own))
            for asked in paragraph["qas"]:
                if not asked["is_impossible"]:
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    questions.append(Question(asked["question"], answers, (own,), near))
    return questions, documents


def _hotpot(content: list[Mapping[str, Any]]) -> tuple[list[Question], list[str]]:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]] for asked in content]
    documents = sorted({text for own in texts for text in own})
    index = {text: i for i, text in enumerate(documents)}
    questions = []
    for asked, own in zip(content, texts, strict=True):
        gold = tuple(dict.fromkeys(index[text] for text in own))
        questions.append(Question(asked["question"], (asked["answer"],), gold))
    return questions, documents


def build(name: str, question: Question, documents: tuple[str, ...], seed: str, size: int) -> Record:
    """The record with so many documents: the gold ones, those near, then random ones; in random order."""
    rng = random.Random(seed)
    near = shuffled(rng, question.near)
    taken = [*question.gold, *near][:size]
    if size > len(taken):
        others = [i for i in range(len(documents)) if i not in {*taken}]
        taken += [others[i] for i in distinct(rng, len(others), size - len(taken))]
    order = shuffled(rng, taken)
    text = "\n\n".join(f"Document {at}:\n{documents[i]}" for at, i in enumerate(order, 1))
    depths = [100 * order.index(i) / len(order) for i in question.gold]
    rule = "Answer the question from the documents, with the answer alone and nothing else."
    metadata = {"task": name, "documents": size, "depths": depths, "depth": depths[0], "answer_prefix": "Answer:"}
    asked = f"{rule}\n\nQuestion: {question.text}\nAnswer:"
    return Record(f"{rule}\n\n{text}\n", asked, question.answers, metadata)


def records(name: str, *, tokenizer: Any, length: int, file: str | Path, seed: int = 42) -> Iterator[Record]:
    """The questions of a file in its order; each prompt with 32 tokens of answer is as long as `length` allows.

    Args:
        file: the released file, see `FILES`.

    Raises:
        DataError: the file is missing or not what it should be.
        InputError: while iterating, a length that cannot hold the gold documents.
    """
    questions, documents = read(name, file)
    return _filled(name, questions, documents, tokenizer, length, seed)


def _filled(
    name: str, questions: tuple[Question, ...], documents: tuple[str, ...], tokenizer: Any, length: int, seed: int
) -> Iterator[Record]:
    size = 1
    for number, question in enumerate(questions):
        make = partial(build, name, question, documents, f"mnemic.ruler|{name}|{seed}|{number}")
        record, size = fill(make, tokenizer, length, RESERVE, len(question.gold), size, len(documents))
        yield record


TASKS = {name: Task(name, SOURCE, partial(records, name), match_part, match_part_words, RESERVE) for name in FILES}
