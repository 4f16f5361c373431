"""Cross-segment recall: the toy task that tells whether a memory carries anything at all.

A segment holds a fact (a key and its value), other tokens are filler, and the last segment ends in a question. A
model that sees one segment at a time can answer above chance only through its memory, unless the fact stands in the
last segment. Used with one pair, 8 values and segments of 8 tokens by the toy checks of RMT (arXiv 2207.06881) and
LM2 (arXiv 2502.06049).

A row, with T = segment_length and n segments:

    segment 0          ...   segment n-1
    . . K V . . . .          . . . . . ? K V
                                         ^ labels mark this token only

Vocabulary: 0 is the query marker "?", then `fillers` filler tokens, then `keys` keys, then `values` values. The answer
is the last token of `input_ids`; the label stands at the same index and the model shifts, as in Hugging Face causal
language models, so it is predicted from the token before (the key). A guess is right with probability 1 / values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..core.errors import ConfigError, InputError
from ..training import Example, listed_tokenizer
from .associative import Question

QUERY = 0
_FILLER_NAMES = ("the", "rain", "fell", "and", "nobody", "said", "a", "word")
_KEY_NAMES = ("Mary", "John", "Daniel", "Sandra", "Bill", "Fred", "Jeff", "Julie")
_VALUE_NAMES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office", "cinema", "school")


@dataclass(frozen=True, slots=True)
class RecallBatch:
    """Rows of the task. B rows, n segments of T tokens.

    Attributes:
        input_ids: int64 [B, n * T].
        labels: int64 [B, n * T], -100 except at the last position, which holds the value.
        distance: int64 [B], segments between the asked fact and the question; 0 is the same segment.
    """

    input_ids: Tensor
    labels: Tensor
    distance: Tensor


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """Sizes of the task.

    Args:
        segments: number of segments n; `batch` can override it.
        segment_length: tokens T of a segment.
        keys, values, fillers: how many tokens of each kind.
        pairs: facts in a row, with different keys; one of them is asked.

    Raises:
        ConfigError: sizes that cannot be.
    """

    segments: int = 3
    segment_length: int = 8
    keys: int = 8
    values: int = 8
    pairs: int = 1
    fillers: int = 8

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{option.name} must be a whole number of at least 1; got {value!r}.")
        if self.segment_length < 3:
            raise ConfigError(f"segment_length must be at least 3, as a question; got {self.segment_length}.")
        if self.pairs > self.keys:
            raise ConfigError(f"{self.pairs} pairs need as many different keys; there are {self.keys}.")

    @property
    def vocab_size(self) -> int:
        return 1 + self.fillers + self.keys + self.values

    @property
    def first_key(self) -> int:
        return 1 + self.fillers

    @property
    def first_value(self) -> int:
        return 1 + self.fillers + self.keys

    @property
    def chance(self) -> float:
        """Accuracy of a model that knows nothing of the fact."""
        return 1.0 / self.values

    def batch(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        segments: int | None = None,
        fact_segment: int | Sequence[int] | None = 0,
    ) -> RecallBatch:
        """Random rows; equal generator states give equal rows.

        Args:
            batch_size: rows B.
            generator: a CPU generator, the only source of randomness.
            segments: number of segments n of these rows; by default that of the task.
            fact_segment: where facts stand: a segment for all of them (negative counts from the end), one segment for
                each pair, or None for random segments.

        Raises:
            InputError: segments that do not exist, or more facts than have room there.
        """
        n = self.segments if segments is None else segments
        if batch_size < 1 or n < 1:
            raise InputError(f"batch_size and segments must be at least 1; got {batch_size} and {n}.")
        where = self._segments_of_facts(batch_size, n, fact_segment, generator)
        length = self.segment_length

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        ids = 1 + draw(self.fillers, batch_size, n * length)
        keys = self.first_key + torch.rand(batch_size, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values = self.first_value + draw(self.values, batch_size, self.pairs)
        # A fact takes two tokens; its place in the segment is one of the even offsets, in random order.
        full = torch.rand(batch_size, length // 2, generator=generator).argsort(1)
        last = torch.rand(batch_size, max(1, (length - 3) // 2), generator=generator).argsort(1)
        rows = torch.arange(batch_size)
        for pair in range(self.pairs):
            earlier = (where[:, :pair] == where[:, pair : pair + 1]).sum(1)
            slot = torch.where(
                where[:, pair] == n - 1,
                last[rows, earlier.clamp(max=last.shape[1] - 1)],
                full[rows, earlier.clamp(max=full.shape[1] - 1)],
            )
            start = where[:, pair] * length + 2 * slot
            ids[rows, start] = keys[:, pair]
            ids[rows, start + 1] = values[:, pair]
        asked = draw(self.pairs, batch_size)
        ids[:, -3] = QUERY
        ids[:, -2] = keys[rows, asked]
        ids[:, -1] = values[rows, asked]
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        return RecallBatch(ids, labels, n - 1 - where[rows, asked])

    def questions(self, example: Example) -> list[Question]:
        ids = example["input_ids"]
        last = len(ids) // self.segment_length - 1
        return [Question((len(ids) - 1,), last - ids.index(ids[-2]) // self.segment_length)]

    def _segments_of_facts(
        self, batch_size: int, n: int, fact_segment: int | Sequence[int] | None, generator: torch.Generator
    ) -> Tensor:  # fmt: skip
        """The segment of every fact, [B, pairs]."""
        room = [self.segment_length // 2] * (n - 1) + [(self.segment_length - 3) // 2]
        if fact_segment is None:
            if self.pairs > min(room):
                raise InputError(
                    f"{self.pairs} facts may meet in one segment, which holds {min(room)}; use longer segments or give "
                    "fact_segment."
                )
            return torch.randint(n, (batch_size, self.pairs), generator=generator)
        given = [fact_segment] * self.pairs if isinstance(fact_segment, int) else list(fact_segment)
        if len(given) != self.pairs:
            raise InputError(f"fact_segment names {len(given)} segments for {self.pairs} facts.")
        for index in given:
            if not -n <= index < n:
                raise InputError(f"Segment {index} does not exist; there are {n} segments, 0 to {n - 1}.")
        chosen = [index % n for index in given]
        for index in set(chosen):
            if chosen.count(index) > room[index]:
                raise InputError(
                    f"Segment {index} has room for {room[index]} facts, not {chosen.count(index)}; use longer segments "
                    "or other ones."
                )
        return torch.tensor(chosen).repeat(batch_size, 1)

    def names(self) -> list[str]:
        """A word for every token id, [vocab_size]."""
        words = ["?"]
        for kind, listed, size in (
            ("filler", _FILLER_NAMES, self.fillers),
            ("key", _KEY_NAMES, self.keys),
            ("value", _VALUE_NAMES, self.values),
        ):
            words += [listed[i] if i < len(listed) else f"{kind}{i}" for i in range(size)]
        return words

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """For text made of `names`."""
        return listed_tokenizer(self.names())

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """A row as words, with " | " between segments.

        Raises:
            InputError: not one row of ids of this vocabulary.
        """
        row = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        names = self.names()
        if any(not isinstance(i, int) or not 0 <= i < len(names) for i in row):
            raise InputError(f"Expected one row of token ids from 0 to {len(names) - 1}.")
        words = [names[i] for i in row]
        size = self.segment_length
        return " | ".join(" ".join(words[at : at + size]) for at in range(0, len(words), size))
