"""Log-probabilities of tokens as the OpenAI interface writes them."""

from collections.abc import Sequence
from typing import Any

from ..requests import Token


class TokenTexts:
    """Texts of single tokens; without a tokenizer their ids."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, token: int) -> str:
        return f"token_id:{token}" if self.tokenizer is None else self.tokenizer.decode([token])

    def chat(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [{**self._entry(t.id, t.logprob), "top_logprobs": self._top(t)} for t in tokens]
        return {"content": content, "refusal": None}

    def completion(self, tokens: Sequence[Token], offset: int = 0) -> dict[str, Any]:
        """offset: characters of the text before the first of them."""
        offsets: list[int] = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [self(t.id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{self(i): logprob for i, logprob in reversed(t.top or ())} for t in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> list[dict[str, Any]]:
        return [self._entry(i, logprob) for i, logprob in token.top or ()]

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self(token)
        # A piece of a character has no text of its own.
        known = self.tokenizer is not None and "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}
