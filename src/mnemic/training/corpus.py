"""Training data from prepared folders: samples of a random number of segments, and rows that read documents on and on.

Both are endless, depend on their seed alone, and have a position: the number of samples given out. A position is found
again without reading a token.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..core.errors import ConfigError, DataError
from .data import IGNORED, Example, SegmentLaw
from .mixture import Mixture, shuffled
from .positions import Positioned

SHORT = ("pad", "refuse")


class Stretch(NamedTuple):
    """Tokens `start` to `stop` of a document; reset: a row begins with them, and forgets what it read before."""

    part: int
    document: int
    start: int
    stop: int
    reset: bool


class _Corpus(Positioned):
    """What both kinds share: the documents, and turning stretches into token ids."""

    def __init__(self, mixture: Mixture, segment: int, short: str):
        if short not in SHORT:
            raise ConfigError(f"short = {short!r}, expected {' or '.join(SHORT)}.")
        if segment < 1:
            raise ConfigError(f"segment = {segment}, expected at least 1.")
        if short == "refuse":
            mixture.check_lengths(segment)
        self.mixture, self.segment = mixture, segment
        self._settings: tuple = (segment, short)

    def _ids(self, stretch: Stretch) -> list[int]:
        return self.mixture.parts[stretch.part].store[stretch.document][stretch.start : stretch.stop].tolist()

    def _content(self) -> Iterator[Any]:
        yield self.mixture.fingerprint(), self._settings


class CorpusSamples(_Corpus):
    """Next-token samples: stretches of documents, each a number of segments that `law` draws.

    Every token is as likely as any other to be where a sample is taken; a sample begins at a segment border of its
    document, earlier where the document would end too soon, and no sample spans two documents.

    Args:
        segment: tokens of a segment. loss_segments: only the last so many segments of a sample carry a loss; None for
            all. short: documents shorter than a segment are kept ("pad": the batch pads them) or an error ("refuse").

    Raises:
        ConfigError: settings that cannot be. DataError: a short document that is refused.
    """

    def __init__(
        self, mixture: Mixture, segment: int, law: SegmentLaw, *, loss_segments: int | None = None, short: str = "pad"
    ):
        super().__init__(mixture, segment, short)
        if loss_segments is not None and loss_segments < 1:
            raise ConfigError(f"loss_segments = {loss_segments}, expected at least 1.")
        self.law, self.loss_segments = law, loss_segments
        self._settings += (law.content(), loss_segments)

    def _draws(self) -> Iterator[Stretch]:
        mixture, turns = self.mixture, self.mixture.turns()
        drawn = [0] * len(mixture.parts)
        for count in self.law.draw(mixture.seed):
            part = turns.next()
            store = mixture.parts[part].store
            # One place in each stretch of `segment` tokens of the store, in a new order and elsewhere in each epoch.
            slots = -(-store.tokens // self.segment)
            epoch, place = divmod(drawn[part], slots)
            key = f"{mixture.seed}|{part}|{epoch}"
            slot = shuffled(place, slots, key)
            within = shuffled(0, self.segment, f"{key}|{slot}")
            document, offset = store.at(min(slot * self.segment + within, store.tokens - 1))
            length = store.length(document)
            taken = min(count * self.segment, length)
            start = min(offset // self.segment * self.segment, length - taken)
            drawn[part] += 1
            turns.spend(part, taken)
            yield Stretch(part, document, start, start + taken, True)

    def _example(self, drawn: Stretch) -> Example:
        ids = self._ids(drawn)
        labels = list(ids)
        if self.loss_segments is not None:
            before = (-(-len(ids) // self.segment) - self.loss_segments) * self.segment
            labels[: max(before, 0)] = [IGNORED] * max(before, 0)
        return {"input_ids": ids, "labels": labels}


class StatefulRows(_Corpus):
    """Stateful batches: row b of a batch reads on where row b of the batch before stopped.

    Samples come row by row: sample i is row i % rows of batch i // rows. Each takes the next `segments` segments of the
    row's document; the last stretch of a document is shorter, and padded by the batch. A row whose document has ended
    takes the next one in the mixture's order, with "reset" set: the row's state begins anew.
    The first token of a stretch carries no loss, because nothing in the same call predicts it; so a last stretch of one
    token is left out, and so is a document of one token.

    Args:
        rows: of a whole batch, over all processes. segments: of a call. short: as in `CorpusSamples`.

    Raises:
        ConfigError: settings that cannot be. DataError: a short document that is refused, or none with two tokens.
    """

    def __init__(self, mixture: Mixture, segment: int, segments: int, rows: int, *, short: str = "pad"):
        super().__init__(mixture, segment, short)
        if segments < 1 or rows < 1 or segment * segments < 2:
            raise ConfigError(
                f"{segments} segments of {segment} tokens, {rows} rows: expected at least 1 of each, 2 tokens a call."
            )
        for part in mixture.parts:
            if part.store.tokens == len(part.store):
                raise DataError(f"{part.store.folder}: every document has one token, and nothing can be predicted.")
        self.rows, self.width = rows, segment * segments
        self._settings += (segments, rows)

    def _draws(self) -> Iterator[Stretch]:
        documents = self.mixture.documents()
        rows: list[tuple[int, int, int, int] | None] = [None] * self.rows
        while True:
            for b, row in enumerate(rows):
                part, document, start, length = row or (0, 0, 0, 0)
                while length < 2:
                    part, document = next(documents)
                    length = self.mixture.parts[part].store.length(document)
                stop = min(start + self.width, length)
                rows[b] = (part, document, stop, length) if length - stop > 1 else None
                yield Stretch(part, document, start, stop, reset=row is None)

    def _example(self, drawn: Stretch) -> Example:
        ids = self._ids(drawn)
        return {"input_ids": ids, "labels": [IGNORED, *ids[1:]], "reset": drawn.reset}
