"""The application: routes, errors and limits around one `Server`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ..core.errors import MissingExtraError
from .config import Settings
from .errors import InvalidRequest, ServingError, TooLarge
from .server import Server
from .store import SessionStore

try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response
except ImportError as error:
    raise MissingExtraError("The server needs FastAPI: pip install 'mnemic[serve]'.") from error

from .body_limit import BodyLimit
from .calls import call_of
from .routes import chat, completions, documents, health, memory, models, page, sessions, states
from .watching import Watch, response_of

_CLIENT_LEFT = 499


def create_app(model: Any, tokenizer: Any, store: SessionStore, settings: Settings | None = None) -> FastAPI:
    """An ASGI application; its `state.server` is the `Server`, which starts and stops with it.

    More can be added to it like to any FastAPI application, until it starts: routes, mounts, middleware, and
    `state.server.observers`.

    Raises:
        UnsupportedError: a memory that cannot be served. MissingExtraError: FastAPI is not installed.
    """
    server = Server(model, tokenizer, store, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            await server.stop()

    # The pages of documentation that come with FastAPI load scripts from elsewhere.
    app = FastAPI(title="mnemic", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    for routes in (health, models, completions, chat, sessions, documents, states, memory):
        app.include_router(routes.router)
    if server.settings.page:
        app.include_router(page.router)
    app.add_middleware(BodyLimit, most=server.settings.max_body, unlimited=(documents.PATH, states.IMPORT_PATH))
    app.add_middleware(Watch, server=server)
    app.add_exception_handler(ServingError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _unknown)
    return app


def _response(request: Request, error: ServingError) -> Response:
    call_of(request.scope).error = error.code or error.type
    return response_of(error)


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return _response(request, error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # Of a place in the body: the field, without the numbers and names of types that follow it.
    place = [part for part in first["loc"] if isinstance(part, str)]
    param = place[1] if len(place) > 1 else None
    what = "the body is no JSON" if first["type"] == "json_invalid" else f"{param or 'the body'}: {first['msg']}"
    return _response(request, InvalidRequest(f"The request cannot be used: {what}.", param=param))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == TooLarge.status:
        return _response(request, TooLarge(str(error.detail)))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    body = {"message": str(error.detail), "type": InvalidRequest.type, "param": None, "code": code}
    return JSONResponse({"error": body}, error.status_code, error.headers)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _unknown(request: Request, error: Exception) -> Response:
    # The server logs the traceback; what it says is nobody else's business.
    response = _response(request, ServingError("The server failed on this request."))
    # This response is sent from outside of all middleware.
    response.headers["X-Request-Id"] = call_of(request.scope).id
    return response
