"""Cells of token-level tasks and formal languages: rows of one length, read in one forward pass a batch."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..hosts import base_model
from ..training.data import IGNORED, Example
from .associative import Question, TokenExamples
from .chomsky import FormalTask, token_example
from .recall import RecallTask

_RECALL_DRAWS = 256


@dataclass(frozen=True)
class TokenCell:
    """A token-level task at one length.

    Attributes:
        task, length, seed: as of every cell. sized: the task with all its sizes, or a `RecallTask`.
    """

    task: str
    length: str
    seed: int
    sized: Any

    @property
    def chance(self) -> float:
        return self.sized.chance

    def samples(self) -> Iterator[Example]:
        """Without end. Recall: the fact in the first segment, then anywhere, in turn; 512 are those of
        `evaluate_recall`."""
        return self._recall() if isinstance(self.sized, RecallTask) else iter(TokenExamples(self.sized, self.seed))

    def answer(self, model: Any, samples: Sequence[Example]) -> list[dict[str, Any]]:
        """Records as every cell's, of the share of questions that are right; "parts" where distances are known.

        A question is a labelled token; of `PairSegments` it is the whole value, without the marks around it.

        Raises:
            InputError: a model with fewer token ids than the task.
        """
        asked = [self._questions(sample) for sample in samples]
        first = min(column for questions in asked for one in questions for column in one.columns)
        ids = torch.tensor([sample["input_ids"] for sample in samples])
        known = self.sized.vocab_size if isinstance(self.sized, RecallTask) else self.sized.vocabulary
        # The token at a column is said one place before it.
        logits = read(model, ids, ids.shape[1] - first + 1, known, self.task)
        said = logits.argmax(-1).tolist()
        records = []
        for sample, questions, row in zip(samples, asked, said, strict=True):
            columns = [column for one in questions for column in one.columns]
            labels = sample["labels"]
            right = [float(all(row[c - first] == labels[c] for c in one.columns)) for one in questions]
            record = {
                "question": [sample["input_ids"][one.columns[0] - 1] for one in questions],
                "targets": [labels[c] for c in columns],
                "output": [row[c - first] for c in columns],
                **_scores(right),
                "tokens": len(labels),
                "truncated": 0,
            }
            if questions[0].distance is not None:
                record["parts"] = [
                    {"distance": one.distance, "official": score, "fixed": score}
                    for one, score in zip(questions, right, strict=True)
                ]
            records.append(record)
        return records

    def _questions(self, sample: Example) -> list[Question]:
        if hasattr(self.sized, "questions"):
            return self.sized.questions(sample)
        return [Question((column,)) for column, label in enumerate(sample["labels"]) if label != IGNORED]

    def _recall(self) -> Iterator[Example]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.sized.segments)
        while True:
            drawn = [self.sized.batch(_RECALL_DRAWS, generator, fact_segment=where) for where in (0, None)]
            for i in range(_RECALL_DRAWS):
                for batch in drawn:
                    yield Example(input_ids=batch.input_ids[i].tolist(), labels=batch.labels[i].tolist())


@dataclass(frozen=True)
class FormalCell:
    """A formal language at one length.

    Attributes:
        task, length, seed: as of every cell. language: the task, inputs of `symbols` symbols. steps: blanks for each.
    """

    task: str
    length: str
    seed: int
    language: FormalTask
    symbols: int
    steps: int = 0

    @property
    def chance(self) -> float:
        return self.language.chance

    def samples(self) -> Iterator[tuple[list[int], list[int]]]:
        """Input and output symbols, without end, those of `length_generalisation`."""
        rng = random.Random(f"mnemic.chomsky|{self.language.name}|{self.seed}|length {self.symbols}")
        while True:
            yield self.language.sample(rng, self.symbols)

    def answer(self, model: Any, samples: Sequence[tuple[list[int], list[int]]]) -> list[dict[str, Any]]:
        """Records as every cell's, of the share of a sample's outputs that are right, up to the terminator.

        The paper pools the outputs of a batch, which is the same where samples have as many outputs.

        Raises:
            InputError: a model with fewer token ids than the task.
        """
        examples = [token_example(self.language, x, y, self.steps)["input_ids"] for x, y in samples]
        outputs = len(samples[0][1])
        logits = read(model, torch.tensor(examples), outputs + 1, self.language.vocabulary, self.task)
        said = logits[:, :-1, : self.language.outputs].argmax(-1).tolist()
        records = []
        for (x, y), row, ids in zip(samples, said, examples, strict=True):
            counted = self.language.counted(y)
            right = [float(a == b) for a, b in zip(row[:counted], y[:counted], strict=True)]
            records.append(
                {
                    "question": x,
                    "targets": y[:counted],
                    "output": row[:counted],
                    **_scores(right),
                    "tokens": len(ids),
                    "truncated": 0,
                }
            )
        return records


def read(model: Any, ids: Tensor, keep: int, vocabulary: int, task: str) -> Tensor:
    """Logits [B, keep, V] of the last places of rows [B, T], read from new states."""
    base = base_model(model)
    base.eval()
    known = base.get_input_embeddings().weight.shape[0]
    if vocabulary > known:
        raise InputError(
            f"{task} has {vocabulary} token ids and the model {known}: it was not trained on this task with these "
            "sizes. Give the sizes it was trained with, or a model with a larger vocabulary."
        )
    with torch.no_grad():
        return base(ids.to(base.device), use_cache=False, logits_to_keep=keep).logits


def _scores(right: Sequence[float]) -> dict[str, float]:
    share = sum(right) / len(right)
    return {"official": share, "fixed": share, "row": float(min(right))}
