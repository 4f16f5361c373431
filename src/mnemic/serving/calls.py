"""What is known of a call while it runs: for its line in the log and for the metrics."""

import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_SCOPE = "mnemic.call"
_SAFE = re.compile(r"[\w.-]{1,128}", re.ASCII)
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


@dataclass(eq=False)
class Call:
    """
    id: the client's own X-Request-Id where that is short and plain, else a new one. tenant, session: names, once they
    are known. error: code of the error that the client was told. read, made: tokens of prompt and answers.
    first: seconds until the first token. asked, answered: text by choice, where the log keeps it.
    """

    id: str
    method: str
    keeps_text: bool = False
    on_first: Callable[[float], object] = lambda seconds: None
    began: float = field(default_factory=time.perf_counter)
    status: int = 500
    tenant: str | None = None
    session: str | None = None
    error: str | None = None
    read: int | None = None
    made: int | None = None
    first: float | None = None
    asked: Any = None
    answered: dict[int, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def token(self, choice: int, text: str) -> None:
        """A token has been made."""
        if self.first is None:
            self.first = self.seconds
            self.on_first(self.first)
        if self.keeps_text:
            self.answered[choice] = self.answered.get(choice, "") + text

    def fields(self, route: str) -> dict[str, Any]:
        """Of the line in the log; what is not known is left out."""
        found = {
            "request": self.id,
            "method": self.method if self.method in METHODS else "other",
            "route": route,
            "status": self.status,
            "seconds": round(self.seconds, 4),
            "first_token_seconds": None if self.first is None else round(self.first, 4),
            "prompt_tokens": self.read,
            "completion_tokens": self.made,
            "tenant": self.tenant,
            # What cannot be an id may be anything.
            "session": self.session if self.session and _SAFE.fullmatch(self.session) else None,
            "error": self.error,
        }
        if self.keeps_text:
            found |= {"asked": self.asked, "answered": list(self.answered.values()) or None}
        return {name: value for name, value in found.items() if value is not None}


def new_call(scope: Any, **given: Any) -> Call:
    """The call of an ASGI scope, which holds it from now on."""
    named = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
    request_id = named if _SAFE.fullmatch(named) else uuid.uuid4().hex
    call = scope[_SCOPE] = Call(request_id, scope["method"], **given)
    return call


def call_of(scope: Mapping[str, Any]) -> Call:
    """Of a request's scope."""
    return scope[_SCOPE]


def route_of(scope: Mapping[str, Any]) -> str:
    """The template of the path: whatever a client asks for, there are only as many as the application has routes."""
    template = getattr(scope.get("route"), "path", None)
    return template if isinstance(template, str) else "other"
