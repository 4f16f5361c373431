"""Whether the server is alive, whether it can work, and what it does: for balancers and monitors."""

import hmac

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ..auth import OPEN, hash_of
from ..errors import ServingError, ShuttingDown, Unauthorised
from ..server import Server
from .calling import ERRORS, Serving

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> dict[str, str]:
    """Always, while the process answers."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"description": "The server is closing, or engine or store do not work."}})
async def ready(server: Serving, response: Response) -> dict[str, str]:
    """Whether requests would be taken."""
    status = {"status": "ok", "engine": "ok" if server.engine.running else "stopped", "store": "ok"}
    if server.requests.closed:
        response.status_code = 503
        response.headers.update(ShuttingDown("").headers)
        # The store may be on its way out.
        return {"status": "shutting_down", "engine": status["engine"], "store": "unknown"}
    try:
        await server.manager.call(server.store.usage, OPEN)
    except ServingError as error:
        status["store"] = error.code or "unavailable"
    if not server.engine.running or status["store"] != "ok":
        status["status"], response.status_code = "unavailable", 503
    return status


@router.get("/metrics", response_class=PlainTextResponse, responses={401: ERRORS[401]})
async def metrics(request: Request, server: Serving) -> Response:
    """For Prometheus. Where the server has tenants it takes a key of its own, `metrics_key`."""
    _check_monitor(server, request.headers.get("authorization", ""))
    return Response(await server.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _check_monitor(server: Server, authorization: str) -> None:
    expected = server.settings.metrics_key
    if expected is None:
        if server.tenants.required:
            raise Unauthorised("This server has no metrics_key in its settings, so nobody can read its metrics.")
        return
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(hash_of(key.strip()), expected):
        raise Unauthorised("The metrics need their key: send the header `Authorization: Bearer KEY`.")
