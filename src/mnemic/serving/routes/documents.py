"""Documents for sessions, of any size."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..calls import Call, call_of
from ..errors import InvalidRequest, ServingError
from ..feeding import Feeding
from ..server import Server
from ..store import SessionRecord
from ..uploads import file_of
from .calling import ERRORS, Caller, Serving
from .sessions import shown
from .streaming import DONE, EventStream, packed, unless_left

PATH = "/v1/sessions/{session_id}/documents"
EVERY = 0.5
"""Seconds between two events of progress."""

router = APIRouter(tags=["sessions"], responses=ERRORS)
_DOCUMENT: dict[str, Any] = {
    "required": True,
    "content": {
        "text/plain": {"schema": {"type": "string"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary"}},
            }
        },
    },
}


@router.post(PATH, response_model=None, openapi_extra={"requestBody": _DOCUMENT})
async def feed(session_id: str, request: Request, server: Serving, tenant: Caller) -> Response:
    """Let a session read a document: UTF-8 text as the body, or one file of a form.

    All of it is read, or nothing. With `Accept: text/event-stream` progress comes as events; without, `feeding` of the
    session shows it.
    """
    body_read, call = asyncio.Event(), call_of(request.scope)
    body = _body(request, body_read)
    async with AsyncExitStack() as held:
        held.enter_context(server.tenants.running(tenant))
        await server.check_room(tenant)
        turn = await held.enter_async_context(server.manager.open(tenant.name, session_id))
        feeding = Feeding(server, tenant, turn, body)
        held.callback(lambda: setattr(call, "read", feeding.tokens_read))
        if "text/event-stream" in request.headers.get("accept", ""):
            return EventStream(_events(server, feeding, call), held.pop_all(), body_read)
        record = await _while_there(request, feeding, body_read)
        await server.audit(tenant, "document", session_id, f"{feeding.tokens_read} tokens")
        return JSONResponse(_done(server, feeding, record))
    raise AssertionError


def _body(request: Request, body_read: asyncio.Event) -> AsyncIterator[bytes]:
    kind, _, rest = request.headers.get("content-type", "text/plain").partition(";")
    options = dict(part.strip().split("=", 1) for part in rest.split(";") if "=" in part)
    kind = kind.strip().lower()
    if kind == "multipart/form-data":
        boundary = options.get("boundary", "").strip('"')
        if not boundary:
            raise InvalidRequest("multipart/form-data without a boundary.")
        return file_of(_told(request, body_read), boundary.encode("latin-1"))
    charset = options.get("charset", "utf-8").strip('"').lower()
    if not (kind.startswith("text/") or kind == "application/octet-stream") or charset not in ("utf-8", "utf8"):
        raise InvalidRequest(f"A document of type {kind!r} in {charset!r}: expected UTF-8 text, or a form with a file.")
    return _told(request, body_read)


async def _told(request: Request, body_read: asyncio.Event) -> AsyncIterator[bytes]:
    try:
        async for data in request.stream():
            if data:
                yield data
    finally:
        body_read.set()


async def _while_there(request: Request, feeding: Feeding, body_read: asyncio.Event) -> SessionRecord:
    """Cancels the feeding when the client leaves: while the body comes, reading it tells, afterwards waiting does."""
    running = asyncio.ensure_future(feeding.run())
    reading = asyncio.ensure_future(body_read.wait())
    try:
        await asyncio.wait({running, reading}, return_when=asyncio.FIRST_COMPLETED)
        return running.result() if running.done() else await unless_left(request, _result(running))
    finally:
        reading.cancel()
        running.cancel()
        await asyncio.wait({running, reading})


async def _result(running: "asyncio.Future[SessionRecord]") -> SessionRecord:
    return await running


async def _events(server: Server, feeding: Feeding, call: Call) -> AsyncIterator[str]:
    running = asyncio.ensure_future(feeding.run())
    try:
        # Progress is sampled, so a client that reads slowly, or only after it has sent all, holds nothing up.
        while not (await asyncio.wait({running}, timeout=EVERY))[0]:
            yield packed(_progress(feeding))
        record = running.result()
        await server.audit(feeding.tenant, "document", record.id, f"{feeding.tokens_read} tokens")
        yield packed(_done(server, feeding, record))
        yield DONE
    except ServingError as error:
        call.error = error.code or error.type
        yield packed(error.body())
    finally:
        running.cancel()
        await asyncio.wait({running})


def _progress(feeding: Feeding) -> dict[str, Any]:
    counts = {"bytes_read": feeding.bytes_read, "tokens_read": feeding.tokens_read}
    return {"object": "document.progress", **counts}


def _done(server: Server, feeding: Feeding, record: SessionRecord) -> dict[str, Any]:
    return {**_progress(feeding), "object": "document", "session": shown(server, record)}
