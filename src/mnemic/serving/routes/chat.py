"""/v1/chat/completions: messages are answered."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from ..errors import InvalidRequest
from ..requests import Token, Work
from ..server import Server
from ..turns import Turn
from .answering import respond
from .calling import ERRORS, Caller, Serving
from .fields import Fields, seeded
from .logprobs import TokenTexts

router = APIRouter(prefix="/v1/chat/completions", tags=["answers"], responses=ERRORS)


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    # Templates put it between control tokens or their halves.
    name: Annotated[str, Field(pattern=r"^[^\s<|\\/>\[\]]{1,64}$")] | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        plain = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return plain if self.name is None else {**plain, "name": self.name}


class TextFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]


class ChatFields(Fields):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: TextFormat | None = None
    store: Annotated[Literal[False] | None, Field(description="Answers are not stored; sessions are.")] = None

    def asked(self) -> Any:
        return [message.plain() for message in self.messages]


@router.post("", response_model=None)
async def chat(fields: ChatFields, request: Request, server: Serving, tenant: Caller) -> Response:
    """Answer messages. With a session, `messages` are those that are new in it; without one, all of them."""
    server.check_model(fields.model)
    template = server.chat_template()
    n = fields.choices(server.settings.max_choices)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("top_logprobs goes with logprobs = true.", param="top_logprobs")
    if fields.max_completion_tokens is not None and fields.max_tokens is not None:
        raise InvalidRequest("max_tokens is the old name of max_completion_tokens: give one.", param="max_tokens")
    given: dict[str, Any] = {"logprobs": (fields.top_logprobs or 0) if fields.logprobs else None}
    if fields.max_completion_tokens is not None:
        given["max_tokens"] = fields.max_completion_tokens
    sampling = fields.sampling(server.engine.limits.max_tokens, stop=(*fields.stops(), *template.stop), **given)
    messages = [message.plain() for message in fields.messages]

    def works(turn: Turn | None) -> list[Work]:
        stream = None if turn is None else turn.stream
        ids = template.first(messages) if stream is None else template.following(messages)
        return [
            Work(
                prompt=ids,
                sampling=replace(sampling, seed=seeded(sampling.seed, i)),
                stream=stream,
                closing=template.closing,
                tenant=tenant.name,
            )
            for i in range(n)
        ]

    return await respond(server, request, tenant, fields, _Form(server, fields), works, "chat")


class _Form:
    def __init__(self, server: Server, fields: ChatFields):
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": server.settings.name,
        }
        self.texts = TokenTexts(server.tokenizer)
        self.logprobs, self.ids = bool(fields.logprobs), bool(fields.return_token_ids)

    def opening(self, choices: int) -> list[dict[str, Any]]:
        return [self._piece(i, {"role": "assistant", "content": ""}, [], None) for i in range(choices)]

    def piece(self, choice: int, token: Token) -> dict[str, Any] | None:
        if not (token.text or self.logprobs or self.ids):
            return None
        return self._piece(choice, {"content": token.text}, [token], None)

    def end(self, choice: int, reason: str) -> dict[str, Any]:
        return self._piece(choice, {}, [], reason)

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": choices}

    def whole(self, answers: Sequence[tuple[list[Token], str]]) -> dict[str, Any]:
        choices = []
        for i, (tokens, reason) in enumerate(answers):
            message = {"role": "assistant", "content": "".join(t.text for t in tokens), "refusal": None}
            logprobs = self.texts.chat(tokens) if self.logprobs else None
            choices.append(self._with_ids({"index": i, "message": message, "logprobs": logprobs}, tokens, reason))
        return {**self.head, "object": "chat.completion", "choices": choices}

    def _piece(self, index: int, delta: dict[str, Any], tokens: list[Token], reason: str | None) -> dict[str, Any]:
        logprobs = self.texts.chat(tokens) if self.logprobs and tokens else None
        return self._with_ids({"index": index, "delta": delta, "logprobs": logprobs}, tokens, reason)

    def _with_ids(self, choice: dict[str, Any], tokens: list[Token], reason: str | None) -> dict[str, Any]:
        choice = {**choice, "finish_reason": reason}
        return {**choice, "token_ids": [t.id for t in tokens]} if self.ids else choice
