"""Contexts of an exact size: the largest that fits a budget of tokens, or an error; never a cut one."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from ..core.errors import InputError
from .haystack import Codec
from .task import Record


def full_prompt(record: Record) -> str:
    """Context and question, as a model reads them and as lengths are counted."""
    return f"{record.context}\n{record.question}"


def check_answers(targets: Iterable[str], codec: Codec) -> None:
    """Can the tokenizer write the answers?

    Raises:
        InputError: an answer that it does not give back, so that no model could be right.
    """
    for target in targets:
        back = codec.decode(codec.encode(target))
        if target not in back:
            raise InputError(
                f"The answer {target!r} is outside the tokenizer's vocabulary: it comes back as {back!r}. Use a "
                "tokenizer that gives back every text, such as a byte-level one."
            )


def counter(tokenizer: Any) -> Callable[[str], int]:
    """Number of tokens of a text, without special tokens."""
    codec = Codec(tokenizer)
    return lambda text: len(codec.encode(text))


def largest(fits: Callable[[int], bool], least: int, start: int, most: int | None = None) -> int | None:
    """The largest size from `least` to `most` that fits, found around `start`; None where `least` does not.

    Where what fits is not quite monotone, the size that is returned does fit, and the next one does not.
    """
    if not fits(least):
        return None
    limit = most if most is not None else 2**40
    low, high, step = least, None, 1
    size = min(max(start, least), limit)
    if size > least:
        if fits(size):
            low = size
        else:
            high = size
    while high is None and low < limit:
        size = min(low + step, limit)
        if fits(size):
            low, step = size, 2 * step
        else:
            high = size
    while high is not None and high - step > low:
        if fits(high - step):
            low = high - step
            break
        high, step = high - step, 2 * step
    while high is not None and high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def fill(
    build: Callable[[int], Record],
    tokenizer: Any,
    length: int,
    reserve: int,
    least: int,
    start: int,
    most: int | None = None,
) -> tuple[Record, int]:
    """The record of the largest size whose prompt and `reserve` tokens of answer fit `length`, and that size.

    Its metadata gain "length" and "tokens" (of the prompt).

    Raises:
        InputError: even the smallest context does not fit, or the tokenizer cannot write the answer.
    """
    count = counter(tokenizer)

    @lru_cache(maxsize=2)
    def built(size: int) -> tuple[Record, int]:
        record = build(size)
        return record, count(full_prompt(record))

    size = largest(lambda s: built(s)[1] + reserve <= length, least, start, most)
    if size is None:
        record, tokens = built(least)
        raise InputError(
            f"{record.metadata.get('task', 'The task')} does not fit {length} tokens: its smallest prompt has {tokens} "
            f"and {reserve} are kept for the answer. Use a length of at least {tokens + reserve}."
        )
    record, tokens = built(size)
    check_answers(record.targets, Codec(tokenizer))
    metadata = {**record.metadata, "length": length, "tokens": tokens}
    return Record(record.context, record.question, record.targets, metadata), size
