"""From works to a response: whole or as events; with a session, its state is stored before the answer's end is sent."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ..auth import Tenant
from ..calls import Call, call_of
from ..errors import InvalidRequest, ServingError
from ..requests import Event, Finished, Progress, Token, Usage, Work
from ..server import Server
from ..store import SessionRecord
from ..turns import Turn
from .fields import Fields
from .merging import Merged
from .streaming import DONE, EventStream, packed, unless_left

REASONS = {"end": "stop", "stop": "stop", "length": "length"}


class Form(Protocol):
    """How answers are written down."""

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        ...

    def piece(self, choice: int, token: Token) -> dict[str, Any] | None:
        """The chunk of a token; None where it adds nothing."""
        ...

    def end(self, choice: int, reason: str) -> dict[str, Any]:
        """The last chunk of a choice."""
        ...

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What chunks of choices are sent in."""
        ...

    def whole(self, answers: Sequence[tuple[list[Token], str]]) -> dict[str, Any]:
        """The answers, each with its reason."""
        ...


async def respond(
    server: Server,
    request: Request,
    tenant: Tenant,
    fields: Fields,
    form: Form,
    works: Callable[[Turn | None], Sequence[Work]],
    note: str,
) -> Response:
    """
    Args:
        works: makes the works for a session's turn, or for none; runs in a thread.
        note: of the commit.
    """
    session_id = fields.session(request.headers.get("x-session-id"))
    if session_id is not None and fields.choices(server.settings.max_choices) > 1:
        raise InvalidRequest("A session goes on in one way: expected n = 1, or fork the session.", param="n")

    call = call_of(request.scope)
    call.session = session_id
    if call.keeps_text:
        call.asked = fields.asked()

    async def work() -> Response:
        async with AsyncExitStack() as held:
            held.enter_context(server.tenants.running(tenant))
            turn = None
            if session_id is not None:
                await server.check_room(tenant)
                turn = await held.enter_async_context(server.manager.open(tenant.name, session_id))
            todo, answers = await asyncio.to_thread(works, turn), []
            prompts = sum(len(one.prompt) for one in todo)
            server.tenants.need_tokens(tenant, prompts)
            for one in todo:
                answers.append(await held.enter_async_context(server.engine.submit(one)))
            server.tenants.took_tokens(tenant, prompts)
            made = partial(server.tenants.took_tokens, tenant, 1)
            events = await held.enter_async_context(Merged(answers))
            answering = _Answering(form, events, turn, note, len(answers), call, made)
            if not fields.stream:
                return JSONResponse(await answering.whole())
            # What fails before the first token has a status of its own.
            await answering.begin()
            usage = bool(fields.stream_options and fields.stream_options.include_usage)
            return EventStream(answering.chunks(usage), held.pop_all())
        raise AssertionError

    return await unless_left(request, work())


class _Answering:
    def __init__(
        self,
        form: Form,
        events: Merged,
        turn: Turn | None,
        note: str,
        count: int,
        call: Call,
        on_token: Callable[[], None],
    ):
        self.form, self.events, self.turn, self.note, self.count = form, events, turn, note, count
        self.call, self.on_token = call, on_token
        self.tokens: list[list[Token]] = [[] for _ in range(count)]
        self.finished: dict[int, Finished] = {}
        self.first: tuple[int, Event] | None = None

    async def begin(self) -> None:
        async for i, event in self.events:
            if not isinstance(event, Progress):
                self._note(i, event)
                self.first = (i, event)
                return

    async def whole(self) -> dict[str, Any]:
        async for i, event in self._following():
            if isinstance(event, Token):
                self.tokens[i].append(event)
        record = await self._commit()
        reasons = [REASONS[self.finished[i].reason] for i in range(self.count)]
        body = self.form.whole(list(zip(self.tokens, reasons, strict=True)))
        return {**body, "usage": self._usage(), **_session(record)}

    async def chunks(self, usage: bool) -> AsyncIterator[str]:
        extra = {"usage": None} if usage else {}

        def sent(choices: list[dict[str, Any]], **more: Any) -> str:
            return packed({**self.form.chunk(choices), **extra, **more})

        try:
            for choice in self.form.opening(self.count):
                yield sent([choice])
            async for i, event in self._following():
                if isinstance(event, Token):
                    piece = self.form.piece(i, event)
                    if piece is not None:
                        yield sent([piece])
            record = await self._commit()
            for i in range(self.count):
                yield sent([self.form.end(i, REASONS[self.finished[i].reason])], **_session(record))
            if usage:
                yield sent([], usage=self._usage())
            yield DONE
        except ServingError as error:
            # The status has been sent; the client's library raises on this.
            self.call.error = error.code or error.type
            yield packed(error.body())

    async def _following(self) -> AsyncIterator[tuple[int, Event]]:
        if self.first is not None:
            yield self.first
        async for i, event in self.events:
            self._note(i, event)
            yield i, event

    def _note(self, i: int, event: Event) -> None:
        if isinstance(event, Token):
            self.on_token()
            self.call.token(i, event.text)
        elif isinstance(event, Finished):
            self.finished[i] = event
            self.call.read = (self.call.read or 0) + event.usage.prompt_tokens
            self.call.made = (self.call.made or 0) + event.usage.completion_tokens

    async def _commit(self) -> SessionRecord | None:
        return None if self.turn is None else await self.turn.commit(self.finished[0].stream, self.note)

    def _usage(self) -> dict[str, Any]:
        usages: list[Usage] = [self.finished[i].usage for i in range(self.count)]
        read, made = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def _session(record: SessionRecord | None) -> dict[str, Any]:
    """Beside what OpenAI has."""
    if record is None:
        return {}
    return {"session": {"id": record.id, "version": record.version, "tokens_seen": record.tokens_seen}}
