"""What a task of the suite is: samples of any length, and which of their outputs count."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...core.errors import InputError

Sample = Callable[[random.Random, int], tuple[list[int], list[int]]]
"""(random numbers, length n) -> input symbols, output symbols."""

TERMINATOR = 2


@dataclass(frozen=True)
class FormalTask:
    """A task of the suite.

    Attributes:
        name, level: "regular", "context-free" (deterministic) or "context-sensitive".
        inputs, outputs: sizes of the two alphabets; symbols count from 0.
        terminated: outputs end in the terminator 2 and zeros after it, which do not count.
        draw: makes one sample.
    """

    name: str
    level: str
    inputs: int
    outputs: int
    draw: Sample
    terminated: bool = False

    @property
    def chance(self) -> float:
        """Accuracy of a uniform guess, as the paper counts it: the terminator is no guess."""
        return 1 / (self.outputs - self.terminated)

    @property
    def vocabulary(self) -> int:
        """Token ids of `token_example`: symbols, the blank of computation steps, and the token of an output to come."""
        return self.blank + 2

    @property
    def blank(self) -> int:
        return max(self.inputs, self.outputs)

    @property
    def empty(self) -> int:
        return self.blank + 1

    def sample(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """Input symbols and output symbols of one sample of length n, 1 or more.

        Raises:
            InputError: a length below 1.
        """
        if length < 1:
            raise InputError(f"length must be at least 1; got {length}.")
        return self.draw(rng, length)

    def counted(self, target: Sequence[int]) -> int:
        """How many outputs count: all, or those up to and with the terminator."""
        return target.index(TERMINATOR) + 1 if self.terminated else len(target)
