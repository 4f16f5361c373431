"""A server's sessions from the command line, by the standard library alone."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ..core.errors import InputError


class Remote:
    """
    Args:
        url: of the server, such as http://127.0.0.1:8000. key: for servers with tenants.

    Raises: every call `InputError`, with what the server says, or that there is none.
    """

    def __init__(self, url: str, key: str | None = None):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--server {url!r}: expected an address such as http://127.0.0.1:8000.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def call(self, method: str, path: str, body: Any = None) -> Any:
        with self._open(method, path, body) as response:
            return json.loads(response.read())

    def answer(self, model: str, session: str, text: str, max_tokens: int) -> Iterator[str]:
        """Pieces of the likeliest answer to a message; the session has stored it when they end."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_completion_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        with self._open("POST", "/v1/chat/completions", body, {"X-Session-Id": session}) as response:
            for event in _events(response):
                for choice in event.get("choices", ()):
                    yield choice["delta"].get("content") or ""

    def feed(self, session: str, path: Path) -> Iterator[dict[str, Any]]:
        """Progress of reading a text file; the last one is of the whole document."""
        headers = {
            "Accept": "text/event-stream",
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Length": str(path.stat().st_size),
        }
        with path.open("rb") as file, self._open("POST", f"/v1/sessions/{session}/documents", file, headers) as sent:
            yield from _events(sent)

    def _open(self, method: str, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        headers = {**self.headers, **(headers or {})}
        if isinstance(body, dict):
            headers["Content-Type"], body = "application/json", json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            return urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            raise InputError(f"The server says: {_message(error)}") from error
        except (OSError, HTTPException) as error:
            raise InputError(f"Cannot reach {self.url} ({getattr(error, 'reason', error)}); is it running?") from error


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """Of a stream of server-sent events with one line of data each, up to [DONE]."""
    try:
        for line in response:
            data = line.decode().strip().removeprefix("data:").strip()
            if data == "[DONE]":
                return
            if not data:
                continue
            event = json.loads(data)
            if "error" in event:
                raise InputError(f"The server says: {event['error']['message']}")
            yield event
    except (OSError, HTTPException) as error:
        raise InputError(f"The connection broke off ({error}).") from error
    raise InputError("The connection ended before the answer did; the session is at its last commit.")


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
