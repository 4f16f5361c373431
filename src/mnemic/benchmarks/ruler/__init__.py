"""RULER: thirteen tasks of retrieval, tracing, counting and answering in long contexts.

Paper: Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, 2024 (arXiv
2404.06654). Parameters, construction and scoring follow it; instructions, word lists and essays are our own, so
samples and absolute scores are not those of the released set. A prompt and its answer fill the length exactly: the
haystack is the largest that fits, sample by sample, and where none does, that is an error.
"""

from collections.abc import Mapping

from ...core.errors import InputError
from . import documents, frequencies, needles, variables
from .scoring import match_all, match_all_words, match_part, match_part_words

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
SAMPLES, SEED = 500, 42
THRESHOLD = 85.6
"""Average score, percent, that a length needs to count as effective: that of Llama-2-7B (chat) at 4K."""

TASKS = {**needles.TASKS, **variables.TASKS, **frequencies.TASKS, **documents.TASKS}
"""The thirteen tasks by name."""


def effective_length(averages: Mapping[int, float]) -> int:
    """The greatest length whose average over the tasks, in percent, reaches `THRESHOLD`; 0 if none does.

    Raises:
        InputError: no averages, or one that is no percentage.
    """
    if not averages or not all(0 <= score <= 100 for score in averages.values()):
        raise InputError(f"Expected averages in percent by length; got {dict(averages)}.")
    return max((length for length, score in averages.items() if score >= THRESHOLD), default=0)


__all__ = [
    "LENGTHS", "SAMPLES", "SEED", "TASKS", "THRESHOLD", "effective_length", "match_all", "match_all_words",
    "match_part", "match_part_words",
]  # fmt: skip
