"""Text of an answer, piece by piece: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 16


class Detokeniser:
    """Token ids to pieces of text. Joined, the pieces are `tokenizer.decode` of all ids (special tokens left out).

    Bytes that make no character become U+FFFD once it is known that they do not, and at the end. Exception: decoders
    that look at runs of byte tokens as a whole may, after an invalid byte, call bytes invalid that were right so far;
    what was given out stays.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        # Decoded together; a window instead of all ids, which begins where a piece began.
        self.ids: list[int] = []
        self.given = ""
        self.last = 0

    def add(self, token: int) -> str:
        """The text that has become certain with this token."""
        self.ids.append(token)
        text = self._decoded(self.ids)
        if text.endswith(_INCOMPLETE) or len(text) <= len(self.given):
            return ""
        piece = text[len(self.given) :]
        self.given = text
        if len(self.ids) > _WINDOW:
            # Some decoders treat the first token of a text in their own way, so a token that was given out leads.
            del self.ids[: self.last]
            self.given = self._decoded(self.ids)
        self.last = len(self.ids)
        return piece

    def end(self) -> str:
        """What is left."""
        return self._decoded(self.ids)[len(self.given) :]

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class StopStrings:
    """Holds text back while it may be the beginning of a stop string.

    The text ends where the first stop string is complete; of several that end there, the longest counts. So the cut
    does not depend on how the text is divided into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = sorted(stops, key=len, reverse=True)
        self.held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """The text that can be given out. After a stop string (`found`) there is no more."""
        if self.found is not None:
            return ""
        text = self.held + piece
        ends = [(at + len(stop), -len(stop), stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            end, _, self.found = min(ends)
            self.held = ""
            return text[: end - len(self.found)]
        keep = max((self._overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back and is no stop string."""
        held, self.held = self.held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest beginning of `stop` that `text` ends with."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class AnswerText:
    """The text of one answer; without a tokenizer there is none."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.decoder = None if tokenizer is None else Detokeniser(tokenizer)
        self.stops = StopStrings(stops)

    @property
    def stop(self) -> str | None:
        return self.stops.found

    def add(self, token: int, last: bool) -> str:
        """The piece to give out with this token; `last`: the answer ends with it."""
        if self.decoder is None:
            return ""
        piece = self.stops.add(self.decoder.add(token))
        return piece + self.stops.add(self.decoder.end()) + self.stops.end() if last else piece
