"""`mnemic serve` as a process: its log, and how it ends."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mnemic.hosts.saving import save
from mnemic.serving.store import open_store
from tests.serving.http_tests import TOKENIZER
from tests.serving.serving_models import served_model

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

BODY = {"model": "tiny", "prompt": "w5 w9", "max_tokens": 3, "temperature": 0}


class Started:
    def __init__(self, folder, *, shutdown_seconds, durability="durable"):
        save(served_model(), folder / "tiny", whole=True)
        TOKENIZER.save_pretrained(folder / "tiny")
        settings = folder / "serve.toml"
        settings.write_text(f"shutdown_seconds = {shutdown_seconds}\ndurability = '{durability}'\n[limits]\n"
                            "max_tokens = 1000000\n")  # fmt: skip
        self.store = folder / "store"
        command = [sys.executable, "-m", "mnemic", "serve", folder / "tiny", "--config", settings]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [*map(str, command), "--store", str(self.store), "--port", "0", "--threads", "1"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root / "src"), "HF_HUB_OFFLINE": "1"},
        )
        self.lines = []
        self.reading = threading.Thread(target=self._read)
        self.reading.start()
        self.port = self._port()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def _port(self):
        until = time.monotonic() + 300
        while time.monotonic() < until and self.process.poll() is None:
            for line in list(self.lines):
                if "running on" in line:
                    return int(json.loads(line)["message"].partition("127.0.0.1:")[2].split()[0])
            time.sleep(0.05)
        raise AssertionError(self.lines)

    def ask(self, method, path, body=None, session=None):
        """The response's head; the body is to be read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        # So the socket goes with the response.
        headers = {"Content-Type": "application/json", "Connection": "close"}
        headers |= {} if session is None else {"X-Session-Id": session}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse()

    def call(self, method, path, body=None, session=None):
        response = self.ask(method, path, body, session)
        return response.status, json.loads(response.read()), response.getheader("Retry-After")

    def ended(self, seconds):
        """The exit code."""
        code = self.process.wait(seconds)
        self.reading.join()
        return code

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.ended(60)
        self.process.stderr.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_lets_answers_end(tmp_path):
    server = Started(tmp_path, shutdown_seconds=1000, durability="fast")
    try:
        assert server.call("POST", "/v1/sessions", {"id": "s"})[0] == 201
        assert server.call("POST", "/v1/completions", BODY, "s")[0] == 200
        answering = server.ask("POST", "/v1/completions", {**BODY, "max_tokens": 1000, "stream": True}, "s")
        answering.readline()
        server.process.send_signal(signal.SIGTERM)
        status, _, again = server.call("GET", "/ready")
        assert (status, again) == (503, "5")
        assert server.call("POST", "/v1/completions", BODY)[1]["error"]["code"] == "shutting_down"
        assert answering.read().decode().endswith("data: [DONE]\n\n")
        assert server.ended(120) == 0
        records = [json.loads(line) for line in server.lines]
        assert any(record["message"].startswith("shutting down") for record in records)
        statuses = [record["status"] for record in records if record["message"] == "request"]
        assert statuses == [201, 200, 503, 200]
        assert "w5" not in "".join(server.lines)
    finally:
        server.close()
    store = open_store(server.store)
    # Durable, and nobody's.
    store.release(store.acquire("default", "s", "me", 1))
    assert store.get("default", "s").version == 2
    store.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_signal_ends_answers(tmp_path):
    server = Started(tmp_path, shutdown_seconds=1000)
    try:
        server.call("POST", "/v1/sessions", {"id": "s"})
        assert server.call("POST", "/v1/completions", BODY, "s")[0] == 200
        answering = server.ask("POST", "/v1/completions", {**BODY, "max_tokens": 1_000_000, "stream": True}, "s")
        answering.readline()
        server.process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert "shutting_down" in answering.read().decode()
        assert server.ended(120) == 0
    finally:
        server.close()
    store = open_store(server.store)
    assert store.get("default", "s").version == 1
    store.close()
