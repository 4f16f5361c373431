"""A server that is told to end: what runs may finish, nothing new begins, and every session is at a commit."""

import contextlib
import http.client
import json
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from mnemic.serving.store import open_store
from tests.serving.http_tests import app_of
from tests.serving.serving_models import served_model

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from mnemic.serving.process import Process

BODY = {"model": "tiny", "prompt": [5, 9, 12], "max_tokens": 3, "temperature": 0}


class Running:
    """A server in a thread. A step of the model takes at least 10 ms, and none ends while `going` is not set."""

    def __init__(self, folder: Path, model, **settings):
        self.folder, self.settings = folder, settings
        self.app = app_of(folder, model, port=0, **settings)
        self.server = self.app.state.server
        self.going = threading.Event()
        self.going.set()
        self.server.observers.append(lambda record: time.sleep(0.01) or self.going.wait(60))
        self.process = Process(self.app)
        self.thread = threading.Thread(target=self.process.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        until(lambda: self.process.started)
        self.port = self.process.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_):
        self.going.set()
        self.process.should_exit = self.server.requests.hurried = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def told(self, sig=signal.SIGTERM):
        self.process.handle_exit(sig, None)

    def ended(self, seconds):
        """Whether the server ends within so many seconds."""
        self.thread.join(seconds)
        return not self.thread.is_alive()

    @contextlib.contextmanager
    def asked(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
            yield connection.getresponse()
        finally:
            connection.close()

    def call(self, method, path, body=None, headers=None):
        with self.asked(method, path, body, headers) as response:
            return response.status, dict(response.getheaders()), json.loads(response.read())

    def later(self, *args, **given):
        """A call in a thread, and where its answer will be."""
        found = []
        thread = threading.Thread(target=lambda: found.append(self.call(*args, **given)))
        thread.start()
        return thread, found

    def version(self, session):
        """Of a session in the store, once the server is gone; nobody holds the session."""
        store = open_store(self.folder / "store")
        try:
            store.release(store.acquire("default", session, "me", 1))
            return store.get("default", session).version
        finally:
            store.close()


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def model():
    return served_model()


def in_session(name):
    return {"X-Session-Id": name}


def test_what_runs_is_finished_and_nothing_new_begins(tmp_path, model):
    with Running(tmp_path, model, shutdown_seconds=60) as running:
        running.call("POST", "/v1/sessions", {"id": "s"})
        with running.asked("POST", "/v1/completions", {**BODY, "max_tokens": 60, "stream": True}, in_session("s")) as r:
            r.readline()
            running.going.clear()
            running.told()
            status, headers, body = running.call("GET", "/ready")
            assert (status, headers["retry-after"], body["status"]) == (503, "5", "shutting_down")
            assert running.call("GET", "/health")[0] == 200
            status, headers, body = running.call("POST", "/v1/completions", BODY)
            assert (status, headers["retry-after"], headers["connection"]) == (503, "5", "close")
            assert body["error"]["code"] == "shutting_down"
            assert running.call("GET", "/v1/sessions")[0] == 503
            assert running.thread.is_alive()
            running.going.set()
            events = r.read().decode().split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert json.loads(events[-3].removeprefix("data: "))["session"]["version"] == 1
        assert running.ended(25)
        with pytest.raises(ConnectionRefusedError):
            running.call("GET", "/health")
    assert running.version("s") == 1


@pytest.mark.parametrize("hurried", [False, True])
def test_what_does_not_finish_in_time_is_told_so_and_changes_nothing(tmp_path, model, monkeypatch, hurried):
    restored = []
    monkeypatch.setattr("mnemic.serving.process.signal.signal", lambda *given: restored.append(given))
    with Running(tmp_path, model, shutdown_seconds=60 if hurried else 0.3) as running:
        for name in ("whole", "streamed", "fed"):
            running.call("POST", "/v1/sessions", {"id": name})
            assert running.call("POST", "/v1/completions", BODY, in_session(name))[0] == 200
        thread, found = running.later("POST", "/v1/completions", {**BODY, "max_tokens": 8000}, in_session("whole"))
        sending = socket.create_connection(("127.0.0.1", running.port))
        sending.sendall(b"POST /v1/sessions/fed/documents HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nw5 w6")
        with running.asked(
            "POST", "/v1/completions", {**BODY, "max_tokens": 8000, "stream": True}, in_session("streamed")
        ) as response:
            response.readline()
            until(lambda: len(running.server.requests) == 3)
            running.told()
            if hurried:
                time.sleep(0.2)
                assert running.thread.is_alive()
                running.told(signal.SIGINT)
                assert {given[1] for given in restored} == {signal.SIG_DFL}
            last = response.read().decode().split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert running.ended(25)
        thread.join()
        assert found[0][0] == 503
        assert found[0][2]["error"]["code"] == "shutting_down"
        # It waited for the rest of a document.
        answer = sending.recv(4096).decode()
        sending.close()
        assert answer.startswith("HTTP/1.1 503")
        assert "retry-after: 5" in answer
    assert [running.version(name) for name in ("whole", "streamed", "fed")] == [1, 1, 1]


def test_what_was_to_be_written_later_is_written(tmp_path, model):
    with Running(tmp_path, model, durability="fast") as running:
        running.call("POST", "/v1/sessions", {"id": "s"})
        store, written = running.server.store.store, threading.Event()
        commit = store.commit
        store.commit = lambda *args, **given: written.wait(60) and commit(*args, **given)
        assert running.call("POST", "/v1/completions", BODY, in_session("s"))[0] == 200
        assert running.server.store.unwritten[0] == 1
        with running.asked("GET", "/metrics") as response:
            assert b"mnemic_unwritten_commits 1.0" in response.read()
        running.told()
        assert not running.ended(0.5)
        written.set()
        assert running.ended(25)
    assert running.version("s") == 1


def test_nobody_waits_for_another_servers_session(tmp_path, model):
    with Running(tmp_path, model, shutdown_seconds=0.2, wait=60) as running:
        running.call("POST", "/v1/sessions", {"id": "s"})
        lease = running.server.store.acquire("default", "s", "another server", 60)
        thread, found = running.later("POST", "/v1/completions", BODY, in_session("s"))
        until(lambda: len(running.server.requests) == 1)
        running.told()
        assert running.ended(25)
        thread.join()
    assert found[0][0] == 503
    store = open_store(tmp_path / "store")
    store.release(lease)
    assert store.get("default", "s").version == 0
    store.close()
