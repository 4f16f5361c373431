"""Around every request: its id, its line in the log, its metrics; and none is let in once the server is closing."""

import asyncio
import json

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .calls import Call, new_call, route_of
from .errors import ServingError, ShuttingDown
from .logging import log_request
from .server import Server

ALWAYS = frozenset(("/health", "/ready", "/metrics"))
"""Answered also while the server is closing, and not worth a line in the log."""


def response_of(error: ServingError) -> Response:
    # In ASCII: names of fields come from the client, and may be halves of characters.
    return Response(json.dumps(error.body()), error.status, error.headers, "application/json")


class Watch:
    """Middleware, around all others."""

    def __init__(self, app: ASGIApp, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        server, quiet = self.server, scope["path"] in ALWAYS
        call = new_call(scope, keeps_text=server.settings.log_text, on_first=server.metrics.first_token.observe)
        sender = _Sender(call, scope, send, server)
        try:
            if quiet:
                await self.app(scope, receive, sender)
            elif server.requests.closed:
                await sender.refuse("The server is shutting down and takes no more requests.")
            else:
                await self._let_in(scope, receive, sender)
        except Exception:
            call.error = call.error or ServingError.type
            raise
        finally:
            call.session = call.session or (scope.get("path_params") or {}).get("session_id")
            route = route_of(scope)
            server.metrics.request(call, route)
            log_request(call, route, quiet)

    async def _let_in(self, scope: Scope, receive: Receive, sender: "_Sender") -> None:
        with self.server.requests.entered() as request:
            try:
                await self.app(scope, receive, sender)
            except asyncio.CancelledError:
                if not request.ended:
                    raise
                request.task.uncancel()
                await sender.refuse("The server is shutting down; the session is as it was at its last commit.")


class _Sender:
    def __init__(self, call: Call, scope: Scope, send: Send, server: Server):
        self.call, self.scope, self.send, self.server = call, scope, send, server
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.call.status = True, message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.call.id.encode())]
            if self.server.requests.closed and self.scope["http_version"].startswith("1"):
                # A client that keeps its connection would come back to this server.
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self.send(message)

    async def refuse(self, message: str) -> None:
        """Unless a response has begun: that breaks off."""
        error = ShuttingDown(message)
        self.call.error = error.code
        if not self.begun:
            await response_of(error)(self.scope, _nothing, self)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
