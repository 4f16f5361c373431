"""Cells: the samples of one task at one size, and how a model answers them. What is evaluated, logged and resumed."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol


class Cell(Protocol):
    """One task at one length, drawn with one seed. Equal cells give equal samples, as often as they are iterated.

    Attributes:
        task: its name in the catalog.
        length: an official name ("4k"), a number in the task's own unit (tokens, segments, symbols, ...), or "released"
            for a file of given samples.
        seed: of the samples.
        chance: the score of a guess from 0 to 1, or None where there is no such thing.
    """

    @property
    def task(self) -> str: ...
    @property
    def length(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def chance(self) -> float | None: ...

    def samples(self) -> Iterator[Any]:
        """Without end, or those of the released file."""
        ...

    def answer(self, model: Any, samples: Sequence[Any]) -> list[dict[str, Any]]:
        """One JSON record for each sample, read side by side from new states.

        Each has "official" and "fixed", the scores from 0 to 1 by the two rules; "tokens", how many the model read;
        "truncated", how many tokens of the context it did not; and what reports group by where the task knows it:
        "depth" (percent of the context before the fact) or "distance" (segments from the fact to the question). What
        was asked and said is in "question", "targets" and "output".

        Held-out text has sums of losses instead of scores, see `TextCell`.

        Optional: "parts", for a sample of several questions, one {"distance", "official", "fixed"} for each, by which
        reports then group instead; "row", 1 where all of them are right.
        """
        ...
