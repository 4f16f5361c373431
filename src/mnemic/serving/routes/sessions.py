"""/v1/sessions: conversations that are kept."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from pydantic import BaseModel, ConfigDict, Field

from ..auth import Tenant
from ..server import Server
from ..store import SessionRecord
from .calling import ERRORS, Caller, Serving

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], responses=ERRORS)
_MOST = 1000


class NewSession(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    id: Annotated[str | None, Field(description="1 to 128 letters, digits and _ . - (no dot first).")] = None
    ttl: Annotated[float | None, Field(description="Seconds without a change after which it expires.")] = None
    metadata: dict[str, str] | None = None


class Fork(NewSession):
    version: int | None = None


class Rollback(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    version: int


def shown(server: Server, record: SessionRecord) -> dict[str, Any]:
    """A session as clients see it."""
    fed = server.feeding.get((record.tenant, record.id))
    feeding = None if fed is None else {"bytes_read": fed[0], "tokens_read": fed[1]}
    fields = {name: value for name, value in asdict(record).items() if name != "tenant"}
    return {"object": "session", **fields, "feeding": feeding}


async def check_new(server: Server, tenant: Tenant, ttl: float | None) -> float | None:
    """The ttl of a new session. Raises `QuotaExceeded`."""
    await server.check_room(tenant, sessions=1)
    return server.settings.ttl if ttl is None else ttl


@router.post("", status_code=201)
async def create(server: Serving, tenant: Caller, new: Annotated[NewSession | None, Body()] = None) -> dict[str, Any]:
    """A session that has read nothing."""
    new = new or NewSession()
    ttl = await check_new(server, tenant, new.ttl)
    record = await server.manager.call(
        server.store.create, tenant.name, session_id=new.id, ttl=ttl, metadata=new.metadata
    )
    await server.audit(tenant, "create", record.id)
    return shown(server, record)


@router.get("")
async def sessions(
    server: Serving, tenant: Caller, after: str | None = None, limit: Annotated[int, Query()] = 100
) -> dict[str, Any]:
    """Newest first; `after`: those behind this one."""
    # One more, to know whether there are more.
    asked = limit + 1 if 0 < limit < _MOST else limit
    found = await server.manager.call(server.store.sessions, tenant.name, after=after, limit=asked)
    page = found[:limit]
    more = len(found) > limit or len(page) == _MOST
    return {"object": "list", "data": [shown(server, record) for record in page], "has_more": more}


@router.get("/{session_id}")
async def show(session_id: str, server: Serving, tenant: Caller) -> dict[str, Any]:
    """`feeding`: what has been read of a document that is being fed."""
    return shown(server, await server.manager.call(server.store.get, tenant.name, session_id))


@router.delete("/{session_id}")
async def delete(session_id: str, server: Serving, tenant: Caller) -> dict[str, Any]:
    """The record and every version's bytes, at once; a request that writes to it fails."""
    await server.manager.delete(tenant.name, session_id)
    await server.audit(tenant, "delete", session_id)
    return {"object": "session.deleted", "id": session_id, "deleted": True}


@router.get("/{session_id}/commits")
async def commits(session_id: str, server: Serving, tenant: Caller) -> dict[str, Any]:
    """The versions that are kept, newest first."""
    found = await server.manager.call(server.store.commits, tenant.name, session_id)
    return {"object": "list", "data": [{"object": "commit", **asdict(commit)} for commit in found]}


@router.post("/{session_id}/fork", status_code=201)
async def fork(
    session_id: str, server: Serving, tenant: Caller, new: Annotated[Fork | None, Body()] = None
) -> dict[str, Any]:
    """A new session that has read the same, now or as of `version`."""
    new = new or Fork()
    ttl = await check_new(server, tenant, new.ttl)
    record = await server.manager.call(
        server.store.fork, tenant.name, session_id, new.version, new_id=new.id, ttl=ttl, metadata=new.metadata
    )
    await server.audit(tenant, "fork", record.id, f"of {session_id}")
    return shown(server, record)


@router.post("/{session_id}/rollback")
async def rollback(session_id: str, to: Rollback, server: Serving, tenant: Caller) -> dict[str, Any]:
    """Back to what a version had read, as a new version: nothing is lost while it is kept."""
    async with server.manager.open(tenant.name, session_id, load=False) as turn:
        record = await turn.rollback(to.version)
    await server.audit(tenant, "rollback", session_id, f"to {to.version}")
    return shown(server, record)
