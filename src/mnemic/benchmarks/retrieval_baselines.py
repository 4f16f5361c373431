"""What a memory is compared with: the host alone on what fits, full attention, and retrieval into the prompt.

Each baseline turns a record into a prompt of at most `budget` tokens and counts what it leaves out:

- `full`: everything, or an error: full attention where it fits. The sliding window is this prompt on a host with the
  memory "window", which reads any length: `full(record, tokenizer, None)`;
- `truncated`: the end of the context, or its beginning and end;
- `retrieved`: the chunks of the context that BM25 or a dense encoder finds for the question.

`separator` is what stands between context and question, and between chunks.

Chunks are stretches of whole lines or sentences, never cut. The order "ends" puts the best chunks at both ends of the
prompt, where hosts attend most (Long-Context LLMs Meet RAG, arXiv 2410.05983).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import ConfigError, InputError, MissingExtraError
from .background import sentence_spans
from .task import Record

ORDERS = ("document", "rank", "ends")

Search = Callable[[tuple[str, ...], str], np.ndarray]
"""(chunks, query) -> the relevance of each chunk, (n,) float."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, special tokens included; dropped: tokens of the context that are not among them.

    chunks: numbers of the chunks in the prompt, in its order; None where the context is not cut in chunks.
    """

    ids: list[int]
    dropped: int
    chunks: tuple[int, ...] | None = None


def full(record: Record, tokenizer: Any, budget: int | None, *, separator: str = "\n") -> Prompt:
    """The whole context and the question.

    Raises:
        InputError: they have more than `budget` tokens.
    """
    start, context, question = _parts(record, tokenizer, separator)
    ids = [*start, *context, *question]
    if budget is not None and len(ids) > budget:
        raise InputError(
            f"The context and its question have {len(ids):,} tokens, more than the budget of {budget:,}; use truncated "
            "or retrieved, or a larger budget."
        )
    return Prompt(ids, 0)


def truncated(record: Record, tokenizer: Any, budget: int, *, keep: str = "end", separator: str = "\n") -> Prompt:
    """As much of the context as fits.

    Args:
        keep: "end": its last tokens; "middle out": as many of its first as of its last.

    Raises:
        InputError: the question alone has more than `budget` tokens. ConfigError: another `keep`.
    """
    if keep not in ("end", "middle out"):
        raise ConfigError(f"keep = {keep!r}, expected 'end' or 'middle out'.")
    start, context, question = _parts(record, tokenizer, separator)
    room = _room(budget, start, question)
    front = min(room, len(context)) // 2 if keep == "middle out" else 0
    back = min(room, len(context)) - front
    kept = [*context[:front], *context[len(context) - back :]]
    return Prompt([*start, *kept, *question], len(context) - len(kept))


def retrieved(
    record: Record,
    tokenizer: Any,
    budget: int,
    search: Search,
    *,
    chunk_tokens: int = 128,
    top_k: int = 10,
    order: str = "document",
    separator: str = "\n",
) -> Prompt:
    """The chunks that `search` finds, the best first, until `top_k` are taken; one that does not fit is passed over.

    Args:
        search: `Bm25()`, `Dense(...)` or any function of that kind. The query is the question, or
            metadata["asked"] where a task words its question for the reader.
        chunk_tokens: lines are joined up to so many tokens; longer lines are cut between sentences.
        order: of the chunks in the prompt: "document", "rank" (best first) or "ends".

    Raises:
        InputError: the question alone has more than `budget` tokens. ConfigError: sizes or an order that cannot be.
    """
    if order not in ORDERS or chunk_tokens < 1 or top_k < 1:
        raise ConfigError(
            f"order = {order!r}, chunk_tokens = {chunk_tokens}, top_k = {top_k}; expected one of {', '.join(ORDERS)} "
            "and at least 1."
        )
    start, context, question = _parts(record, tokenizer, separator)
    room = _room(budget, start, question)
    before, behind = _split(separator)
    chunks = tuple(record.context[a:b] for a, b in chunk_spans(record.context, tokenizer, chunk_tokens))
    ranked = _ranked(search(chunks, str(record.metadata.get("asked", record.question)))) if chunks else []
    taken: list[int] = []
    ids: dict[int, list[int]] = {}
    for chunk in ranked:
        if len(taken) == top_k:
            break
        encoded = _encode(tokenizer, before + chunks[chunk] + behind)
        if len(encoded) <= room:
            room -= len(encoded)
            ids[chunk] = encoded
            taken.append(chunk)
    placed = {"document": sorted(taken), "rank": taken, "ends": best_at_both_ends(taken)}[order]
    kept = [token for chunk in placed for token in ids[chunk]]
    return Prompt([*start, *kept, *question], max(0, len(context) - len(kept)), tuple(placed))


def best_at_both_ends(ranked: Sequence[int]) -> list[int]:
    """The best first, the second last, the third second, and so on inwards: 1, 3, 5, 7, 6, 4, 2."""
    return [*ranked[::2], *reversed(ranked[1::2])]


def chunk_spans(text: str, tokenizer: Any, chunk_tokens: int) -> list[tuple[int, int]]:
    """(start, end) of the chunks of a text: lines, or sentences of a longer line, joined up to `chunk_tokens`."""
    spans: list[tuple[int, int]] = []
    size = 0
    for start, end, tokens in _units(text, tokenizer, chunk_tokens):
        if spans and size + tokens <= chunk_tokens:
            spans[-1], size = (spans[-1][0], end), size + tokens
        else:
            spans.append((start, end))
            size = tokens
    return spans


def _units(text: str, tokenizer: Any, chunk_tokens: int) -> Iterator[tuple[int, int, int]]:
    begin = 0
    for line in text.splitlines(keepends=True):
        tokens = len(_encode(tokenizer, line))
        if line.strip() and tokens <= chunk_tokens:
            yield begin, begin + len(line.rstrip()), tokens
        elif line.strip():
            for a, b in sentence_spans(line):
                yield begin + a, begin + b, len(_encode(tokenizer, line[a:b]))
        begin += len(line)


class Bm25:
    """BM25 as Lucene counts it; one index is kept, since many questions ask about one context.

    Args:
        words: text -> words; by default lower-cased runs of letters and digits.

    Raises:
        MissingExtraError: bm25s is not installed.
    """

    def __init__(self, words: Callable[[str], list[str]] | None = None, *, k1: float = 1.5, b: float = 0.75) -> None:
        try:
            import bm25s  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingExtraError("BM25 needs the package bm25s: pip install 'mnemic[retrieval]'.") from error
        self._make = lambda: bm25s.BM25(k1=k1, b=b, method="lucene")
        self._words = words or _plain_words
        self._chunks: tuple[str, ...] | None = None
        self._index: Any = None
        self._known: set[str] = set()

    def __call__(self, chunks: tuple[str, ...], query: str) -> np.ndarray:
        if chunks != self._chunks:
            words = [self._words(chunk) for chunk in chunks]
            self._index, self._chunks, self._known = self._make(), chunks, {word for chunk in words for word in chunk}
            if self._known:
                self._index.index(words, show_progress=False)
        asked = sorted(set(self._words(query)) & self._known)
        return self._index.get_scores(asked) if asked else np.zeros(len(chunks))


class Dense:
    """Cosine similarity of sentence embeddings; those of one context are kept.

    Args:
        encoder: name or folder of a sentence-transformers model, or an object with `encode(list of texts)` -> (n, d).

    Raises:
        MissingExtraError: a name, and sentence-transformers is not installed.
    """

    def __init__(self, encoder: Any) -> None:
        if isinstance(encoder, str):
            try:
                from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise MissingExtraError(
                    "Dense retrieval needs sentence-transformers: pip install 'mnemic[retrieval]', or give an object "
                    "with encode()."
                ) from error
            encoder = SentenceTransformer(encoder)
        self._encoder = encoder
        self._chunks: tuple[str, ...] | None = None
        self._vectors = np.zeros((0, 0))

    def __call__(self, chunks: tuple[str, ...], query: str) -> np.ndarray:
        if chunks != self._chunks:
            self._vectors, self._chunks = self._unit(list(chunks)), chunks
        return self._vectors @ self._unit([query])[0]

    def _unit(self, texts: list[str]) -> np.ndarray:
        vectors = np.asarray(self._encoder.encode(texts), dtype=np.float64)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _plain_words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _ranked(scores: np.ndarray) -> list[int]:
    # Stable: equals stand in the order of the document.
    return [int(i) for i in np.argsort(-scores, kind="stable")]


def _parts(record: Record, tokenizer: Any, separator: str) -> tuple[list[int], list[int], list[int]]:
    """Start tokens, context, and question in tokens. Encoded apart, so that cutting one changes no token of another."""
    before, behind = _split(separator)
    if not record.context:
        return _start(tokenizer), [], _encode(tokenizer, record.question)
    context, question = (_encode(tokenizer, text) for text in (record.context + behind, before + record.question))
    return _start(tokenizer), context, question


def _split(separator: str) -> tuple[str, str]:
    """What of the separator stands before the text that follows it, and what behind the text before."""
    # Most tokenizers have words with a blank in front, and none behind.
    behind = separator.rstrip(" ")
    return separator[len(behind) :], behind


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    bare, whole = _encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    for i in range(len(whole)):
        if whole[i : i + len(bare)] == bare:
            return whole[:i]
    raise InputError(f"The tokenizer reads 'a' as {bare} alone and as {whole} in a text; its start tokens are unclear.")


def _room(budget: int, start: list[int], question: list[int]) -> int:
    room = budget - len(start) - len(question)
    if room < 0:
        raise InputError(
            f"The question alone has {len(start) + len(question):,} tokens, more than the budget of {budget:,}."
        )
    return room
