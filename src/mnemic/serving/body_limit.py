"""A limit on the bytes of a request, known or found out while they come."""

from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import TooLarge


class BodyLimit:
    """Middleware. unlimited: path templates of routes that limit themselves."""

    def __init__(self, app: ASGIApp, most: int, unlimited: Collection[str] = ()):
        self.app, self.most = app, most
        self.unlimited = [compile_path(path)[0] for path in unlimited]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or any(path.match(scope["path"]) for path in self.unlimited):
            await self.app(scope, receive, send)
            return
        count = 0

        async def limited() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.most:
                raise HTTPException(TooLarge.status, f"The request has more than {self.most:,} bytes.")
            return message

        await self.app(scope, limited, send)
