"""What every route needs to know of a call."""

from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from ..auth import Tenant
from ..calls import call_of
from ..server import Server

_bearer = HTTPBearer(auto_error=False, description="A key of the server, where it has tenants.")

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {
        "description": text,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type", "param", "code"],
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "param": {"type": ["string", "null"]},
                                "code": {"type": ["string", "null"]},
                            },
                        }
                    },
                }
            }
        },
    }
    for code, text in {
        400: "The request cannot be used.",
        401: "No key, or one that is not known.",
        404: "No such session or model, or not this tenant's.",
        409: "Somebody else is writing to the session.",
        413: "More bytes or tokens than the server takes.",
        429: "The server is full, or a quota is; see Retry-After.",
        500: "The model failed on this request.",
        503: "The session store does not answer, the device has no room, or the server is shutting down.",
        504: "The request took longer than it may.",
    }.items()
}
"""Of the OpenAPI document."""


def _server(request: Request) -> Server:
    return request.app.state.server


async def _tenant(
    request: Request, server: Annotated[Server, Depends(_server)], _: Annotated[Any, Depends(_bearer)]
) -> Tenant:
    tenant = server.tenants.of(request.headers.get("authorization"))
    call_of(request.scope).tenant = tenant.name
    return tenant


Serving = Annotated[Server, Depends(_server)]
Caller = Annotated[Tenant, Depends(_tenant)]
