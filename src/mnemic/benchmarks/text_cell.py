"""Cells of held-out text: pieces of the background texts, read with the state carried and with a new one a segment."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..core.errors import InputError
from .babilong import data_folder
from .background import named
from .catalog_entry import Entry, Request
from .cell import Cell
from .language import token_losses

_SEGMENTS_AT_A_TIME = 64


@dataclass(frozen=True)
class TextCell:
    """Text of a split, cut into pieces of one length.

    Attributes:
        task, length, seed, chance: as of every cell; the seed is of where pieces begin, and of their order.
        pieces: token ids of each, at least two.
    """

    task: str
    length: str
    seed: int
    pieces: tuple[tuple[int, ...], ...] = field(repr=False)
    chance: float | None = None

    def samples(self) -> Iterator[tuple[int, ...]]:
        """The pieces, each once."""
        order = list(range(len(self.pieces)))
        random.Random(f"mnemic.held-out|{self.length}|{self.seed}").shuffle(order)
        return (self.pieces[i] for i in order)

    def answer(self, model: Any, samples: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
        """One record a piece, sums of losses in nats instead of scores.

        "carried" is over all "predicted" tokens: all but the first of the piece, read as one stream. "gained" is what
        they save against a new state for every segment of the model, over the "compared" tokens that both predict.
        "tokens" counts both readings.
        """
        carried = token_losses(model, samples, batch_size=len(samples))
        anew = token_losses(model, samples, "segment", batch_size=_SEGMENTS_AT_A_TIME)
        records = []
        for piece, one, other in zip(samples, carried, anew, strict=True):
            both = ~other.isnan() & ~one.isnan()
            records.append(
                {
                    "predicted": len(piece) - 1,
                    "carried": float(one[1:].sum()),
                    "compared": int(both.sum()),
                    "gained": float((other - one)[both].sum()),
                    "tokens": 2 * len(piece),
                    "truncated": 0,
                }
            )
        return records


def _text(request: Request) -> Cell:
    request.checked(())
    if request.tokenizer is None:
        raise InputError(f"{request.name} is read in words, and the model has no tokenizer: save one in its folder.")
    if request.size < 2:
        raise InputError(f"{request.name} at length {request.length}: a piece needs 2 tokens, one to predict.")
    folder = data_folder(request.data)
    ids = _encoded(request.split, folder, request.tokenizer)
    if len(ids) < request.size:
        raise InputError(
            f"{request.name} at length {request.length}: the {request.split} text has {len(ids)} tokens. Give a "
            "shorter length, or a data folder with books."
        )
    rng = random.Random(f"mnemic.pieces|{request.seed}")
    first = rng.randint(0, len(ids) % request.size)
    starts = range(first, len(ids) - request.size + 1, request.size)
    return TextCell(request.name, request.length, request.seed, tuple(ids[at : at + request.size] for at in starts))


@lru_cache(maxsize=1)
def _encoded(split: str, folder: Any, tokenizer: Any) -> tuple[int, ...]:
    """All documents of the split as one text: the shipped ones are too short for a stream of their own."""
    ids: list[int] = []
    for document in named("auto", split, folder):
        try:
            ids += tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # tokenizers raises no narrower one
            raise InputError(
                f"The model's tokenizer cannot read {document.name!r} ({error}); measure text with a model that was "
                "trained on words."
            ) from error
    return tuple(ids)


ENTRIES = [
    Entry(
        name="text", kind="text", unit="tokens", lengths=("256", "1024"), source="held-out books or prose",
        make=_text,
    )
]  # fmt: skip
