"""Whether the server is alive, and whether it can work."""

from fastapi import APIRouter, Response

from ..auth import OPEN
from ..errors import ServingError
from .calling import Serving

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> dict[str, str]:
    """Always, while the process answers."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"description": "The engine does not run, or the store does not answer."}})
async def ready(server: Serving, response: Response) -> dict[str, str]:
    """Whether requests would be taken."""
    status = {"status": "ok", "engine": "ok" if server.engine.running else "stopped", "store": "ok"}
    try:
        await server.manager.call(server.store.usage, OPEN)
    except ServingError as error:
        status["store"] = error.code or "unavailable"
    if not server.engine.running or status["store"] != "ok":
        status["status"], response.status_code = "unavailable", 503
    return status
