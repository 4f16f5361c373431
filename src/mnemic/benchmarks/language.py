"""Language modelling of long documents: loss by position and by segment, with what is remembered and without.

Policies, of which published numbers differ by several points of perplexity:

- stream: all documents are one text, read by one state (Transformer-XL on WikiText-103);
- document: a new state for every document (PG-19, the recurrent memories; the default);
- segment: a new state for every segment, so nothing is carried;
- window: a new state for every window of `window` tokens; each window scores its last `stride` tokens.

Every token of the text is scored once or counted as excluded: a token with nothing before it in its reading is not
predicted, unless a start token is given. The last, partial segment is scored too.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ..core.errors import ConfigError, InputError, UnknownNameError
from ..hosts import base_model
from ..hosts.saving import describe
from ..training.tokenizer import tokenizer_fingerprint
from . import held_out
from .long_texts import LongTexts
from .scoring import score_ends

POLICIES = ("stream", "document", "segment", "window")


def token_losses(
    model: Any,
    documents: Sequence[Sequence[int]],
    policy: str = "document",
    *,
    window: int | None = None,
    stride: int | None = None,
    streams: int = 1,
    start: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Tensor]:
    """The loss of every token.

    Args:
        model: an attached model. documents: token ids.
        window, stride: of the policy window. streams: of the policy stream: the text is cut into so many equal parts,
            each with a state of its own.
        start: token put before each reading, not scored itself; with it no token is excluded.

    Returns: for each document its losses in nats, (n,) float64; NaN where a token is not predicted.

    Raises:
        UnknownNameError: no such policy. ConfigError: sizes that do not go with it.
        InputError: no token can be predicted, or ids outside the vocabulary.
    """
    if policy not in POLICIES:
        raise UnknownNameError.of("policy", policy, POLICIES)
    if (policy == "window") != (window is not None and stride is not None) or (window is None) != (stride is None):
        raise ConfigError(f"policy {policy!r} with window = {window}, stride = {stride}: both, and for 'window' only.")
    if window is not None and stride is not None and not 1 <= stride <= window:
        raise ConfigError(f"stride = {stride}, expected 1 to the window of {window} tokens.")
    if streams < 1 or (streams > 1 and policy != "stream"):
        raise ConfigError(f"streams = {streams} with policy {policy!r}; expected 1, or more with 'stream'.")
    texts = [[token for d in documents for token in d]] if policy == "stream" else documents
    losses = [torch.full((len(text),), math.nan, dtype=torch.float64) for text in texts]
    segment = base_model(model).mnemic.layout.segment
    places, rows, ends = [], [], []
    for i, text in enumerate(texts):
        for begin, first, stop in _readings(len(text), policy, segment, window, stride, streams):
            first = max(first, begin + (start is None))
            if first < stop:
                places.append((i, first, stop))
                rows.append([*(() if start is None else (start,)), *text[begin : stop - 1]])
                ends.append([text[first:stop]])
    if not rows:
        raise InputError("No token has another before it to be predicted from; give longer documents, or start.")
    scored = score_ends(model, rows, ends, batch_size=batch_size)
    for index, [(log_probs, _)] in track(scored, policy, total=len(rows), disable=not progress):
        i, first, stop = places[index]
        losses[i][first:stop] = -log_probs
    return list(losses[0].split([len(d) for d in documents])) if policy == "stream" else losses


def _readings(
    length: int, policy: str, segment: int, window: int | None, stride: int | None, streams: int
) -> Iterator[tuple[int, int, int]]:
    """(first token read, first scored, end) of each reading of a text; every token is scored by one."""
    size = {"document": length, "segment": segment, "stream": -(-length // streams), "window": window}[policy]
    assert size is not None
    if policy != "window":
        yield from ((begin, begin, min(begin + size, length)) for begin in range(0, length, size or 1))
        return
    assert stride is not None
    scored = 0
    while scored < length:
        stop = min(length, scored + stride if scored else size)
        yield max(0, stop - size), scored, stop
        scored = stop


def summarise(losses: Sequence[Tensor], words: int, num_bytes: int) -> dict[str, Any]:
    """Totals and the measures that are published.

    Excluded tokens count with the mean loss of the others, so that leaving some out makes no policy look better:
    perplexity a word = perplexity a token ^ (tokens / words), bits a byte = loss a token * tokens / (ln 2 * bytes).
    """
    joined = torch.cat(list(losses))
    known = ~joined.isnan()
    if not known.any():
        raise InputError("No token is predicted.")
    total, scored = float(joined[known].sum()), int(known.sum())
    loss, tokens = total / scored, len(joined)
    return {
        "nats": total,
        "tokens": tokens,
        "scored": scored,
        "excluded": tokens - scored,
        "words": words,
        "bytes": num_bytes,
        "loss": loss,
        "perplexity_token": _exp(loss),
        "perplexity_word": _exp(loss * tokens / words) if words else None,
        "bits_per_byte": loss * tokens / (math.log(2) * num_bytes) if num_bytes else None,
    }


def by_position(losses: Sequence[Tensor], edges: Sequence[int]) -> list[dict[str, Any]]:
    """Mean loss of the tokens at positions edges[i] .. edges[i + 1] - 1 of their documents; empty ranges left out."""
    found = []
    for low, high in pairwise(edges):
        part = torch.cat([document[low:high] for document in losses])
        part = part[~part.isnan()]
        if len(part):
            found.append({"from": low, "to": high, "scored": len(part), "loss": float(part.mean())})
    return found


def by_segment(losses: Sequence[Tensor], segment: int) -> list[dict[str, Any]]:
    """Mean loss by the number of the segment in its document."""
    longest = max(len(document) for document in losses)
    edges = range(0, longest + segment, segment)
    return [
        {"segment": one["from"] // segment, "scored": one["scored"], "loss": one["loss"]}
        for one in by_position(losses, edges)
    ]


def gain(carried: Sequence[Tensor], anew: Sequence[Tensor]) -> dict[str, Any]:
    """What carrying the state gains, over the tokens that both predict; see `held_out.summarise`."""
    records = []
    for one, other in zip(carried, anew, strict=True):
        both = ~(one.isnan() | other.isnan())
        if both.any():
            sums = {"carried": float(one[both].sum()), "anew": float(other[both].sum())}
            records.append({"tokens": int(both.sum()), **sums})
    return held_out.summarise(records)


def evaluate_language(
    model: Any,
    texts: LongTexts,
    tokenizer: Any = None,
    policy: str = "document",
    **options: Any,
) -> dict[str, Any]:
    """Everything a number needs beside it: totals, loss by position and segment, text, tokenizer, policy and model.

    Args:
        tokenizer: Hugging Face tokenizer; None: the model reads bytes. options: of `token_losses`.

    Returns: JSON. Positions are counted from the start of the document, in ranges that double.
    """
    documents = texts.encode(tokenizer)
    losses = token_losses(model, documents, policy, **options)
    base = base_model(model)
    segment, longest = base.mnemic.layout.segment, max(len(document) for document in documents)
    edges = [0, *(2**k for k in range(6, longest.bit_length() + 1))]
    settings = {k: v for k, v in options.items() if k not in ("batch_size", "progress")}
    return {
        "text": {"name": texts.name, "unit": texts.unit, "sha256": texts.sha256, "documents": len(documents)},
        "tokenizer": "bytes" if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "policy": {"name": policy, **settings},
        "model": {k: v for k, v in describe(base).items() if k in ("memory", "segment", "host")},
        **summarise(losses, sum(texts.words), texts.bytes),
        "by_position": by_position(losses, edges),
        "by_segment": by_segment(losses, segment),
    }


def _exp(value: float) -> float:
    return math.exp(min(value, 700))
