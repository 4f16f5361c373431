"""Cells of tasks in words: records are read as prompts from new streams, and answered greedily."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import InputError
from ..hosts import base_model
from .haystack import Codec
from .prompts import Prompting
from .retrieval_baselines import Prompt
from .task import Record, Task

_REPEATED = ("task", "length", "tokens", "depth", "asked", "answer_prefix")


@dataclass(frozen=True)
class WordCell:
    """A task in words at one length.

    Attributes:
        task, length, seed, chance: as of every cell.
        asked: the task. sizes: what its records are made with, besides the seed; they name the length.
        tokenizer: of the model. segment: tokens of its segments, in which distances are counted.
        prompting: what of a record is read.
    """

    task: str
    length: str
    seed: int
    asked: Task
    sizes: Mapping[str, Any]
    tokenizer: Any
    segment: int
    prompting: Prompting
    chance: float | None = None

    def samples(self) -> Iterator[Record]:
        """Records.

        Raises:
            What the task raises, then or while iterating: DataError, InputError, ConfigError.
        """
        return self.asked.records(**self.sizes, seed=self.seed)

    def answer(self, model: Any, samples: Sequence[Record]) -> list[dict[str, Any]]:
        """Records as every cell's; "tokens" counts the prompt and what the model said.

        A distance is that of the last fact that the answer rests on; prompts that may leave out tokens have none. A
        depth is given where there is one fact.

        Raises:
            InputError: a tokenizer that cannot write an answer, ids outside the model's vocabulary, or a question that
            does not fit the budget.
        """
        base = base_model(model)
        base.eval()
        for record in samples:
            self.check(record)
        prompts = [self.prompting.prompt(self.asked, record, self.tokenizer) for record in samples]
        stream = base.stream(len(samples), tokenizer=self.tokenizer)
        end = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id
        answers = stream.generate(
            [one.ids if isinstance(one, Prompt) else one for one in prompts],
            max_new_tokens=self.asked.max_new_tokens,
            do_sample=False,
            pad_token_id=end if pad is None else pad,
            eos_token_id=end,
        )
        said, seen = (answers, stream.tokens_seen) if len(samples) > 1 else ([answers], [stream.tokens_seen])
        return [
            {**self._record(record, output, prompt), "tokens": tokens}
            for record, output, prompt, tokens in zip(samples, said, prompts, seen, strict=True)
        ]

    def check(self, record: Record) -> None:
        """Can the tokenizer write an answer that counts as right?

        Raises:
            InputError: it cannot, so that no model could be right.
        """
        codec = Codec(self.tokenizer)
        back = [codec.decode(codec.encode(target)) for target in record.targets]
        best, possible = (
            max((self.asked.fixed(text, record) for text in texts), default=0.0) for texts in (record.targets, back)
        )
        if possible < best:
            raise InputError(
                f"{self.task}: the answer {record.targets[0]!r} is outside the tokenizer's vocabulary: it comes back "
                f"as {back[0]!r}. Use a tokenizer that was made with the words of the task, or a byte-level one."
            )

    def _record(self, record: Record, output: str, prompt: Prompt | str) -> dict[str, Any]:
        known = record.metadata
        found: dict[str, Any] = {
            "question": record.question,
            "targets": list(record.targets),
            "output": output,
            "official": float(self.asked.official(output, record)),
            "fixed": float(self.asked.fixed(output, record)),
            "truncated": prompt.dropped if isinstance(prompt, Prompt) else 0,
        }
        # Several needles have several depths, and no one of them is that of the answer.
        if "depth" in known and len(known.get("depths", (0,))) == 1:
            found["depth"] = known["depth"]
        if "support" in known and isinstance(prompt, str):
            end = known["tokens"] + len(Codec(self.tokenizer).encode(record.question)) - 1
            found["distance"] = end // self.segment - known["support"] // self.segment
        plain = {k: v for k, v in known.items() if isinstance(v, str | int | float) and k not in _REPEATED}
        return {**found, **{key: value for key, value in plain.items() if key not in found}}
