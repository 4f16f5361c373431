"""The web page: a few static files, which ask nothing of anybody but this server."""

from functools import cache
from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.exceptions import HTTPException

# Of text Starlette says that it is UTF-8.
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A new release must not run with an old one's scripts.
    "Cache-Control": "no-cache",
}
router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> Response:
    """Anybody gets it; what it shows needs the key that the server asks for."""
    return _file("index.html")


@router.get("/page/{name}")
async def file(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    content = _contents().get(name)
    if content is None:
        raise HTTPException(404)
    return Response(content, media_type=_TYPES[PurePath(name).suffix], headers=_HEADERS)


@cache
def _contents() -> dict[str, bytes]:
    folder = files("mnemic.serving") / "page"
    return {part.name: part.read_bytes() for part in folder.iterdir() if PurePath(part.name).suffix in _TYPES}
