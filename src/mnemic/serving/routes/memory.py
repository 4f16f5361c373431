"""/v1/sessions/ID/memory: what a session's memory looks like, as numbers."""

from typing import Any

from fastapi import APIRouter

from ..memory_view import memory_view
from .calling import ERRORS, Caller, Serving

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], responses=ERRORS)


@router.get("/{session_id}/memory")
async def memory(session_id: str, server: Serving, tenant: Caller) -> dict[str, Any]:
    """Names, shapes and norms of its tensors as of the last commit, how they moved since the commit kept before
    (`compared_with`), what was read, gates. No text can be read from it."""
    record, stream, earlier = await server.manager.look(tenant.name, session_id)
    version, before = (None, None) if earlier is None else earlier
    seen = await server.manager.call(memory_view, stream, before)
    return {
        "object": "session.memory",
        "session": record.id,
        "version": record.version,
        "compared_with": version,
        "tokens_seen": record.tokens_seen,
        **seen,
    }
