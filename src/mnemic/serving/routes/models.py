"""The model that is served, as OpenAI lists models."""

from typing import Any

from fastapi import APIRouter

from ..server import Server
from .calling import ERRORS, Caller, Serving

router = APIRouter(prefix="/v1/models", tags=["models"], responses={k: ERRORS[k] for k in (401,)})


@router.get("")
async def models(server: Serving, tenant: Caller) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(server)]}


@router.get("/{model:path}", responses={k: ERRORS[k] for k in (404,)})
async def model(model: str, server: Serving, tenant: Caller) -> dict[str, Any]:
    """The model, if it is called so."""
    server.check_model(model)
    return _model(server)


def _model(server: Server) -> dict[str, Any]:
    limits = server.engine.limits
    return {
        "id": server.settings.name,
        "object": "model",
        "created": server.since,
        "owned_by": "mnemic",
        "memory": server.engine.base.memory.name,
        "max_prompt_tokens": limits.max_prompt,
        "max_tokens": limits.max_tokens,
        "chat": server.template is not None,
    }
