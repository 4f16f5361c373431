"""Sessions as files: export and import of streams."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from ..errors import InvalidRequest, TooLarge
from .calling import ERRORS, Caller, Serving
from .sessions import check_new, shown

IMPORT_PATH = "/v1/sessions/import"
router = APIRouter(prefix="/v1/sessions", tags=["sessions"], responses=ERRORS)
_BYTES: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.get("/{session_id}/export", response_class=Response, responses={200: {"content": _BYTES}})
async def export(session_id: str, server: Serving, tenant: Caller, version: int | None = None) -> Response:
    """The newest or the given version, as a file that `mnemic stream --load` reads."""
    record, data = await server.manager.call(server.store.load, tenant.name, session_id, version)
    if not data:
        raise InvalidRequest(f"Session {record.id} has read nothing; there is nothing to export.")
    await server.audit(tenant, "export", session_id, f"version {version or record.version}")
    headers = {"Content-Disposition": f'attachment; filename="{record.id}.mnemic"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.post("/import", status_code=201, openapi_extra={"requestBody": {"required": True, "content": _BYTES}})
async def take_in(
    request: Request,
    server: Serving,
    tenant: Caller,
    id: str | None = None,
    ttl: Annotated[float | None, Field(description="Seconds.")] = None,
) -> dict[str, Any]:
    """A new session from the bytes of a saved stream, of the model that is served."""
    ttl = await check_new(server, tenant, ttl)
    most, data = server.settings.max_import, bytearray()
    with server.tenants.running(tenant):
        async for part in request.stream():
            data += part
            if len(data) > most:
                raise TooLarge(f"The state has more than {most:,} bytes.")
        record = await server.manager.take_in(tenant.name, bytes(data), most, session_id=id, ttl=ttl)
    await server.audit(tenant, "import", record.id)
    return shown(server, record)
