"""/v1/completions: text or token ids go on."""

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from ..errors import InvalidRequest
from ..requests import Token, Work
from ..server import Server
from ..turns import Turn
from .answering import respond
from .calling import ERRORS, Caller, Serving
from .fields import Fields, seeded
from .logprobs import TokenTexts

router = APIRouter(prefix="/v1/completions", tags=["answers"], responses=ERRORS)


class CompletionFields(Fields):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int | None, Field(description="How many of the likeliest tokens to report.")] = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def asked(self) -> Any:
        return self.prompt


@router.post("", response_model=None)
async def complete(fields: CompletionFields, request: Request, server: Serving, tenant: Caller) -> Response:
    """Go on with a text. With a session, `prompt` is what is new in it; an empty one goes on where it stands."""
    server.check_model(fields.model)
    for name in ("echo", "suffix"):
        if getattr(fields, name):
            raise InvalidRequest(f"{name}: this server does not do that; leave it out.", param=name)
    n = fields.choices(server.settings.max_choices)
    if fields.best_of not in (None, n):
        raise InvalidRequest("best_of: expected the same as n.", param="best_of")
    sampling = fields.sampling(server.engine.limits.max_tokens, stop=fields.stops(), logprobs=fields.logprobs)
    prompts = _prompts(fields.prompt)
    most = server.settings.max_choices
    if len(prompts) * n > most:
        raise InvalidRequest(f"{len(prompts)} prompts with n = {n}, expected at most {most} answers.", param="prompt")

    def works(turn: Turn | None) -> list[Work]:
        stream = None if turn is None else turn.stream
        if turn is not None and len(prompts) > 1:
            raise InvalidRequest("A session reads one prompt at a time.", param="prompt")
        ids = [server.encode(p, begins=stream is None) if isinstance(p, str) else p for p in prompts]
        return [
            Work(prompt=p, sampling=replace(sampling, seed=seeded(sampling.seed, i)), stream=stream, tenant=tenant.name)
            for p in ids
            for i in range(n)
        ]

    form = _Form(server, fields)
    return await respond(server, request, tenant, fields, form, works, "completion")


def _prompts(prompt: Any) -> list[Any]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt is an empty list: expected text, token ids, or lists of them.", param="prompt")
    return prompt


class _Form:
    def __init__(self, server: Server, fields: CompletionFields):
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.settings.name,
        }
        self.texts = TokenTexts(server.tokenizer)
        self.logprobs, self.ids = fields.logprobs is not None, bool(fields.return_token_ids)
        self.characters: Counter[int] = Counter()

    def opening(self, choices: int) -> list[dict[str, Any]]:
        return []

    def piece(self, choice: int, token: Token) -> dict[str, Any] | None:
        if not (token.text or self.logprobs or self.ids):
            return None
        made = self._choice(choice, [token], None, self.characters[choice])
        self.characters[choice] += len(token.text)
        return made

    def end(self, choice: int, reason: str) -> dict[str, Any]:
        return {"index": choice, "text": "", "logprobs": None, "finish_reason": reason}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "choices": choices}

    def whole(self, answers: Sequence[tuple[list[Token], str]]) -> dict[str, Any]:
        return self.chunk([self._choice(i, tokens, reason, 0) for i, (tokens, reason) in enumerate(answers)])

    def _choice(self, index: int, tokens: list[Token], reason: str | None, offset: int) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": "".join(t.text for t in tokens),
            "logprobs": self.texts.completion(tokens, offset) if self.logprobs else None,
            "finish_reason": reason,
        }
        return {**choice, "token_ids": [t.id for t in tokens]} if self.ids else choice
