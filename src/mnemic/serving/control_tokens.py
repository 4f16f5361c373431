"""Control tokens in text that comes from others: there they are text, and only a chat template's own begin a turn.

A tokenizer takes every "<|im_end|>" for the end of a turn, whoever wrote it. So those in messages are marked before the
template renders them. Then a copy of the tokenizer reads the result: it does not know control tokens by their names,
but by secret ones, which are put where the template wrote them. All else, spaces at the ends of pieces included, is as
in the tokenizer itself; text without control tokens is read by that one.
"""

import re
import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from .errors import InvalidRequest

# For private use, and taken out of messages.
_BEGIN, _END = "\U0010fffc", "\U0010fffd"


class ControlTokens:
    """All special tokens of a tokenizer but the unknown one, and those of its added tokens that the template writes.

    Raises, where text is read:
        InvalidRequest: the tokenizer has no other tokens for this text.
    """

    def __init__(self, tokenizer: Any, template: str = ""):
        self.tokenizer = tokenizer
        try:
            added = tokenizer.added_tokens_decoder
        except NotImplementedError:
            # That of mistral-common, which finds no control tokens in text.
            added = {}
        self.tokens: dict[int, AddedToken] = {
            i: token
            for i, token in added.items()
            if (token.special or token.content in template)
            and token.content != tokenizer.unk_token
            # Some tokenizers add "\n", which is text in every message.
            and not token.content.isspace()
        }
        longest_first = sorted((t.content for t in self.tokens.values()), key=len, reverse=True)
        special = {t.content for t in self.tokens.values() if t.special}
        any_of = _any_of(longest_first)
        self._any = re.compile(any_of)
        self._special = re.compile(_any_of([name for name in longest_first if name in special]))
        self._told_apart = re.compile(f"{_BEGIN}({any_of}){_END}|({any_of})|[{_BEGIN}{_END}]")

    def mark(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message whose control tokens are marked as text. An answer's own thoughts or calls stay as they are."""
        found = self._special if message.get("role") == "assistant" else self._any
        return {name: _marked(value, found) if name != "role" else value for name, value in message.items()}

    def is_marked(self, text: str) -> bool:
        return _BEGIN in text or _END in text

    def ids(self, marked: str) -> list[int]:
        """Ids of rendered text with marks: control tokens where there is none."""
        expected: list[int] = []

        def told(match: re.Match[str]) -> str:
            theirs, own = match.groups()
            if own is None:
                # Templates cut texts, so a mark may stand alone.
                return theirs or ""
            expected.append(self._id_of[own])
            return self._names[own]

        text = self._told_apart.sub(told, marked)
        ids = self._read(text, begins=False)
        self._check(ids, expected)
        return ids

    def plain(self, text: str, begins: bool) -> list[int] | None:
        """Ids of text in which nothing is a control token, but for those that begin a stream. None where that makes no
        difference, and the tokenizer itself should read it."""
        if not self._any.search(text):
            return None
        ids, bare = self._read(text, begins), self._read(text, begins=False)
        self._check(bare, [])
        return ids

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {token.content: i for i, token in self.tokens.items()}

    @cached_property
    def _names(self) -> dict[str, str]:
        # None begins with another one.
        secret = secrets.token_hex(16)
        return {token.content: f"q{secret}q{i}q" for i, token in self.tokens.items()}

    @cached_property
    def _copy(self) -> Tokenizer:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InvalidRequest(
                "The text holds control tokens of the model, and its tokenizer has no other tokens for them: leave "
                "them out."
            )
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        # Special ones are those that it does not look for.
        copy.add_special_tokens([_like(t, t.content, special=True) for t in self.tokens.values()])
        copy.add_tokens([_like(t, self._names[t.content], special=False) for t in self.tokens.values()])
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _real(self) -> dict[int, int]:
        """Ids of secret names -> ids of what they stand for."""
        found = {}
        for i, token in self.tokens.items():
            theirs = self._copy.token_to_id(self._names[token.content])
            assert theirs is not None
            found[theirs] = i
        return found

    def _read(self, text: str, begins: bool) -> list[int]:
        return [self._real.get(i, i) for i in self._copy.encode(text, add_special_tokens=begins).ids]

    def _check(self, ids: list[int], expected: list[int]) -> None:
        # Some models know control tokens as words, too.
        found = [i for i in ids if i in self.tokens]
        if found != expected:
            wrong = next((i for i in found if found.count(i) != expected.count(i)), None)
            name = "control tokens" if wrong is None else repr(self.tokens[wrong].content)
            raise InvalidRequest(
                f"The tokenizer has no other tokens for {name} in this text than the control token: leave it out."
            )


def _marked(value: Any, found: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return found.sub(f"{_BEGIN}\\g<0>{_END}", value.replace(_BEGIN, "").replace(_END, ""))
    if isinstance(value, Mapping):
        return {name: _marked(inner, found) for name, inner in value.items()}
    return [_marked(inner, found) for inner in value] if isinstance(value, list | tuple) else value


def _any_of(names: list[str]) -> str:
    # Without names: what matches nothing.
    return "|".join(map(re.escape, names)) or r"(?!)"


def _like(token: AddedToken, content: str, special: bool) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=special,
    )
