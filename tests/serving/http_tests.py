"""Applications with tiny models, called in this process or over a socket."""

import contextlib
import json
import threading
from typing import Any

import pytest

from tests.hosts.models import word_tokenizer
from tests.serving.serving_models import served_model

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from fastapi.testclient import TestClient

from mnemic.serving.app import create_app
from mnemic.serving.config import Settings
from mnemic.serving.store import open_store

TOKENIZER = word_tokenizer()


def app_of(folder: Any, model: Any = None, *, tokenizer: Any = TOKENIZER, store: Any = None, **settings: Any) -> Any:
    store = open_store(folder / "store") if store is None else store
    return create_app(model or served_model(), tokenizer, store, Settings(name="tiny", **settings))


@contextlib.contextmanager
def client_of(folder: Any, model: Any = None, **given: Any) -> Any:
    with TestClient(app_of(folder, model, **given), raise_server_exceptions=False) as client:
        yield client


@contextlib.contextmanager
def address_of(app: Any) -> Any:
    """The address of a server that runs in a thread meanwhile."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def complete(client: Any, prompt: Any, max_tokens: int = 4, **given: Any) -> Any:
    """The response to a greedy completion; `session`: its id."""
    session = given.pop("session", None)
    headers = {} if session is None else {"X-Session-Id": session}
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
    return client.post("/v1/completions", json={**body, **given}, headers=headers)


def ids(response: Any) -> list[int]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def new_session(client: Any, **given: Any) -> str:
    response = client.post("/v1/sessions", json=given)
    assert response.status_code == 201, response.text
    return response.json()["id"]


def refused(response: Any, status: int, code: str | None = None, param: str | None = None) -> str:
    """The message of an error as OpenAI writes them."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    if code is not None:
        assert error["code"] == code, error
    if param is not None:
        assert error["param"] == param, error
    return error["message"]


def events_of(response: Any) -> list[Any]:
    """Of a stream that has ended as it should."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
