"""Background as token ids: documents split into sentences once, encoded when first read, and read from random places.

Follows the background part of BABILong (arXiv 2406.10149): start at a random character of a random document, look at
ten characters for each token wanted, drop the first and last piece, keep sentences of at least ten tokens, cut the
last one, and go on in the same window for the next sample.
"""

import copy
import inspect
import random
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from ..core.errors import DataError, InputError
from .background import Document, sentence_spans

_WINDOW = 10  # characters looked at for each token wanted
_MIN_WINDOW = 1_000
_NO_IDS = array("I")


class Codec:
    """Token ids of text and back for any tokenizer: Hugging Face, `tokenizers`, or an object with encode and decode.

    No special tokens are added and the text is not tidied where the tokenizer has a switch for it.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not callable(getattr(tokenizer, "encode", None)) or not callable(getattr(tokenizer, "decode", None)):
            raise InputError(f"A tokenizer needs the methods encode and decode; {type(tokenizer).__name__} has not.")
        self.tokenizer = tokenizer
        self._encode_options = _accepted(tokenizer.encode, add_special_tokens=False)
        self._decode_options = _accepted(
            tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        self.fact = lru_cache(maxsize=4096)(self.encode)  # the facts of a task are a small closed set

    def encode(self, text: str) -> tuple[int, ...]:
        """Raises `InputError` where the tokenizer cannot read the text."""
        try:
            ids = self.tokenizer.encode(text, **self._encode_options)
        # The tokenizers library raises bare exceptions, for example on a word without a token.
        except Exception as error:
            raise InputError(
                f"The tokenizer cannot read {text[:60]!r} ({error}). Use a model whose tokenizer reads any text."
            ) from error
        return tuple(getattr(ids, "ids", ids))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), **self._decode_options)


def _accepted(function: Callable, **options: Any) -> dict[str, Any]:
    """The options whose names the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return options
    return {name: value for name, value in options.items() if name in {p.name for p in parameters}}


class Haystack:
    """Background documents with their sentences as token ids of one tokenizer.

    Every document is split once and every sentence encoded once, when first read; pass one Haystack to several
    streams to share that work. It keeps four bytes for each token and about a hundred for each sentence, however often
    they are read: together no more than the text itself takes.

    Args:
        documents: the texts.
        tokenizer: measures and encodes the sentences.
        min_tokens, max_tokens: sentences outside these lengths are skipped.
    """

    def __init__(
        self, documents: Iterable[Document], tokenizer: Any, min_tokens: int = 10, max_tokens: int | None = None
    ) -> None:  # fmt: skip
        self.documents = tuple(documents)
        if not any(document.text for document in self.documents):
            raise DataError("The background has no text; give documents with sentences.")
        self.codec = Codec(tokenizer)
        self.min_tokens, self.max_tokens = min_tokens, max_tokens
        self._spans: dict[int, tuple[array[int], array[int]]] = {}
        self._ids: dict[int, list[array[int] | None]] = {}

    def window(self, document: int, start: int, end: int) -> range:
        """Indices of the sentences of text[start:end], without the first and the last piece."""
        if document not in self._spans:
            spans = sentence_spans(self.documents[document].text)
            self._spans[document] = array("I", (begin for begin, _ in spans)), array("I", (stop for _, stop in spans))
            self._ids[document] = [None] * len(spans)
        begins, ends = self._spans[document]
        first = bisect_right(ends, start) + 1
        return range(first, bisect_left(begins, end) - 1)

    def ids(self, document: int, sentence: int) -> "array[int]":
        """Token ids of " " + sentence, or none if it is too short or too long; the document has had its window."""
        known = self._ids[document][sentence]
        if known is None:
            begins, ends = self._spans[document]
            ids = self.codec.encode(" " + self.documents[document].text[begins[sentence] : ends[sentence]])
            long = self.max_tokens is not None and len(ids) > self.max_tokens
            known = _NO_IDS if len(ids) < self.min_tokens or long else array("I", ids)
            self._ids[document][sentence] = known
        return known


class Reader:
    """Reads sentences from random places; goes on in the same window until it is used up.

    document: number of the document read last.
    """

    def __init__(self, haystack: Haystack, rng: random.Random) -> None:
        self.haystack, self.rng = haystack, rng
        self.document, self.left = 0, range(0)

    def fork(self) -> "Reader":
        """Another reader, which will read the same."""
        twin = Reader(self.haystack, copy.copy(self.rng))
        twin.document, twin.left = self.document, self.left
        return twin

    def read(self, tokens: int) -> "Iterator[array[int]]":
        """Sentences of `tokens` tokens together, the last one cut. The next reading goes on where this one ended.

        Raises:
            DataError: a thousand windows without a sentence that is long enough.
        """
        missing, dry = tokens, 0
        while missing > 0:
            if not self.left:
                dry += 1
                if dry > 1000:
                    raise DataError(
                        f"No sentences of at least {self.haystack.min_tokens} tokens were found in the background; "
                        "expected English text with full stops. Give other documents or a lower minimum."
                    )
                self.document = int(self.rng.random() * len(self.haystack.documents))
                size = len(self.haystack.documents[self.document].text)
                start = int(self.rng.random() * size)
                self.left = self.haystack.window(self.document, start, start + max(_WINDOW * tokens, _MIN_WINDOW))
            for sentence in self.left:
                ids = self.haystack.ids(self.document, sentence)
                if not ids:
                    continue
                dry = 0
                if len(ids) >= missing:
                    self.left = range(sentence + 1, self.left.stop)
                    yield ids[:missing]
                    return
                missing -= len(ids)
                yield ids
            self.left = range(0)
