"""Associative retrieval of ARMT (remember and rewrite), induction, and copying: examples of token ids.

Papers: Rodkin et al., Associative Recurrent Memory Transformer, 2024 (arXiv 2407.04841); induction and copying as in
Fu et al., H3, 2022 (arXiv 2212.14052), and Jelassi et al., Repeat After Me, 2024 (arXiv 2402.01032).

A row of associative retrieval, one pair a segment, the question in a last segment of the same length:

    k k k SEP v END | k k k SEP v END | ... | k k k GENERATE v END
                                                    ^^^^^^^^^^^^^^ labels
"""

import random
from dataclasses import dataclass, replace

from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..training.data import IGNORED, Example
from .associative import Question
from .draws import below, choice, distinct

SEPARATOR, GENERATE, END = 100, 101, 102
CURRICULUM = (1, 2, 3, 5, 10, 20, 40, 50)
"""Pairs in the stages of ARMT's training; remember goes on to 200."""


@dataclass(frozen=True, kw_only=True)
class PairSegments:
    """Associative retrieval.

    Args:
        pairs: n; the sample has n + 1 segments.
        rewrite: keys are drawn with replacement, and the last value of a key counts; otherwise keys are different
            ("remember"). One of the different keys is asked, all equally likely.
        key_size, value_size: symbols of a key and of a value. symbols: size of the alphabet.

    Raises:
        ConfigError: sizes that cannot be.
    """

    pairs: int = 5
    rewrite: bool = False
    key_size: int = 2
    value_size: int = 1
    symbols: int = 16

    def __post_init__(self) -> None:
        if min(self.pairs, self.key_size, self.value_size) < 1 or not 2 <= self.symbols <= SEPARATOR:
            raise ConfigError(
                f"{self.pairs} pairs of {self.key_size} and {self.value_size} symbols out of {self.symbols}: expected "
                f"at least 1 of each, and 2 to {SEPARATOR} symbols."
            )
        if not self.rewrite and self.pairs > self.symbols**self.key_size:
            raise ConfigError(
                f"{self.pairs} different keys of {self.key_size} symbols out of {self.symbols}: there are only "
                f"{self.symbols**self.key_size}; give a larger key_size."
            )

    @property
    def vocabulary(self) -> int:
        return END + 1

    @property
    def segment_length(self) -> int:
        return self.key_size + self.value_size + 2

    @property
    def values(self) -> int:
        """How many values there are."""
        return self.symbols**self.value_size

    @property
    def chance(self) -> float:
        """Of a whole value."""
        return 1 / self.values

    def with_segments(self, count: int) -> "PairSegments":
        return replace(self, pairs=count - 1)

    def example(self, rng: random.Random) -> Example:
        kinds = self.symbols**self.key_size
        if self.rewrite:
            keys = [below(rng, kinds) for _ in range(self.pairs)]
        else:
            keys = distinct(rng, kinds, self.pairs)
        values = [below(rng, self.values) for _ in range(self.pairs)]
        last = dict(zip(keys, values, strict=True))
        asked = choice(rng, list(last))
        ids: list[int] = []
        for key, value in zip(keys, values, strict=True):
            ids += [*self._word(key, self.key_size), SEPARATOR, *self._word(value, self.value_size), END]
        ids += [*self._word(asked, self.key_size), GENERATE, *self._word(last[asked], self.value_size), END]
        marked = self.value_size + 2
        return Example(input_ids=ids, labels=[IGNORED] * (len(ids) - marked) + ids[-marked:])

    def questions(self, example: Example) -> list[Question]:
        """The value alone; its labels have a mark in front and one behind."""
        ids, size = example["input_ids"], self.segment_length
        keys = [ids[start : start + self.key_size] for start in range(0, len(ids), size)]
        wrote = max(segment for segment in range(self.pairs) if keys[segment] == keys[-1])
        return [Question(tuple(range(len(ids) - 1 - self.value_size, len(ids) - 1)), self.pairs - wrote)]

    def _word(self, number: int, size: int) -> list[int]:
        return [number // self.symbols**i % self.symbols for i in range(size)]

    def value_accuracy(self, said: Tensor, input_ids: Tensor) -> float:
        """Share of rows whose whole value was said.

        Args:
            said: int64 [B, T], the token said for each place. input_ids: int64 [B, T], with the answers.
        """
        span = slice(-1 - self.value_size, -1)
        return float((said[:, span] == input_ids[:, span]).all(1).float().mean())


def capacity(pairs: int, values: int, accuracy: float) -> float:
    """Estimate of how many of n pairs are remembered: k = (n v alpha - n) / (v - 1), arXiv 2407.04841.

    Who knows k of n pairs and guesses the others among v values is right with probability k / n + (1 - k / n) / v.
    """
    if pairs < 1 or values < 2 or not 0 <= accuracy <= 1:
        raise InputError(f"{pairs} pairs, {values} values, accuracy {accuracy}: expected 1 or more, 2 or more, 0 to 1.")
    return (pairs * values * accuracy - pairs) / (values - 1)


@dataclass(frozen=True, kw_only=True)
class Induction:
    """Random tokens among which 0 stands once, before the answer; the row ends in 0, and the answer again.

    Raises:
        ConfigError: sizes that cannot be.
    """

    vocabulary: int = 20
    length: int = 32

    def __post_init__(self) -> None:
        if self.vocabulary < 3 or self.length < 4:
            raise ConfigError(f"vocabulary {self.vocabulary}, length {self.length}: expected at least 3 and 4.")

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 1)

    def example(self, rng: random.Random) -> Example:
        ids = [1 + below(rng, self.vocabulary - 1) for _ in range(self.length)]
        at = below(rng, self.length - 3)
        ids[at] = ids[-2] = 0
        ids[-1] = ids[at + 1]
        return Example(input_ids=ids, labels=[IGNORED] * (self.length - 1) + ids[-1:])


@dataclass(frozen=True, kw_only=True)
class Copying:
    """A random string, `gap` fillers (0), a mark, and the string again; the second string is labelled.

    Ids: 0 filler, 1 mark, then `symbols` symbols.

    Raises:
        ConfigError: sizes that cannot be.
    """

    symbols: int = 16
    string: int = 8
    gap: int = 0

    def __post_init__(self) -> None:
        if self.symbols < 2 or self.string < 1 or self.gap < 0:
            raise ConfigError(
                f"{self.symbols} symbols, string {self.string}, gap {self.gap}: expected at least 2, 1 and 0."
            )

    @property
    def vocabulary(self) -> int:
        return self.symbols + 2

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def example(self, rng: random.Random) -> Example:
        string = [2 + below(rng, self.symbols) for _ in range(self.string)]
        before = [*string, *[0] * self.gap, 1]
        return Example(input_ids=[*before, *string], labels=[*[IGNORED] * len(before), *string])
