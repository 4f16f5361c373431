"""One BABILong sample: whole, or with a context that is read piece by piece in constant memory."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain

from ...core.errors import InputError
from ..haystack import Codec

_BLOCK = 8_192  # tokens of a piece: enough for many segments, little beside a model


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFacts:
    """What is known of a sample besides its context.

    Attributes:
        task: "qa1" .. "qa20".
        length: N in tokens; 0 means facts only.
        question, target: as in bAbI; the question may end in a blank.
        seed: the seed of the stream it came from.
        provenance: facts and background documents, for reports.
        fact_slots: for each fact, how many background sentences stand before it.
        slots: number of slots (background sentences + 1).
        fact_offsets: for each fact, the token of the context at which it begins.
        tokens: tokens of the context, as assembled (sentence by sentence).
        supporting: which facts the answer rests on, by number.
    """

    task: str
    length: int
    question: str
    target: str
    seed: int
    provenance: str
    fact_slots: tuple[int, ...]
    slots: int
    fact_offsets: tuple[int, ...]
    tokens: int
    supporting: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BabilongSample(SampleFacts):
    """One sample. context: facts and background."""

    context: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedSample(SampleFacts):
    """One sample whose context is made while it is read, as often as wanted, equal each time.

    Pieces are some 8,000 tokens long and begin where a sentence begins.

    Attributes:
        codec: decodes. parts: starts the token ids of facts and sentences over, in order.
        plain: the context, where it is facts alone.
    """

    codec: Codec = field(repr=False, compare=False)
    parts: Callable[[], Iterator[Sequence[int]]] = field(repr=False, compare=False)
    plain: str | None = field(repr=False, compare=False)

    def ids(self) -> "Iterator[array[int]]":
        """Token ids of the context: `tokens` in all, as assembled, without special tokens."""
        return (ids for ids, _ in _blocks(self.parts()))

    def text(self) -> Iterator[str]:
        """The context in pieces, to the last character that of `whole`.

        Raises:
            InputError: what the tokenizer decodes changes with what follows, so it has no pieces.
        """
        return _stripped([self.plain] if self.plain is not None else _decoded(self.codec, self.parts()))

    def whole(self) -> BabilongSample:
        """The sample with all of its context in memory."""
        try:
            context = "".join(self.text())
        except InputError:
            # Decoded at once, ten million tokens take a gigabyte more.
            context = self.codec.decode([*chain.from_iterable(self.ids())]).strip()
        known = {one.name: getattr(self, one.name) for one in fields(SampleFacts)}
        return BabilongSample(**known, context=context)


def prompt(sample: BabilongSample) -> str:
    """The plain format for fine-tuned models: context and question. The answer follows as " " + target."""
    return f"{sample.context} {sample.question.strip()}"


def _blocks(parts: Iterable[Sequence[int]]) -> "Iterator[tuple[array[int], int]]":
    """Whole parts joined to `_BLOCK` tokens or a little more, and how long the last part of each is."""
    block = array("I")
    for part in parts:
        block.extend(part)
        if len(block) >= _BLOCK:
            yield block, len(part)
            block = array("I")
    if block:
        yield block, 0


def _decoded(codec: Codec, parts: Iterable[Sequence[int]]) -> Iterator[str]:
    # Tokenizers that join words with blanks write a first word without one: a block is decoded behind the sentence
    # before it.
    before: Sequence[int] = ()
    for block, last in _blocks(parts):
        known = codec.decode(before) if before else ""
        text = codec.decode([*before, *block])
        if not text.startswith(known):
            raise InputError(
                f"The tokenizer decodes {known[-40:]!r} otherwise when more follows, so text cannot be read in "
                "pieces. Read ids(), or the whole() sample."
            )
        yield text[len(known) :]
        before = block[len(block) - last :]


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces without white space around the whole."""
    begun, blank = False, ""
    for piece in pieces:
        text = blank + piece if begun else piece.lstrip()
        body = text.rstrip()
        blank = text[len(body) :]
        if body:
            begun = True
            yield body
