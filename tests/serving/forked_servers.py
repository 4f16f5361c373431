"""`mnemic serve` many times over: one process imports everything once, and every server is a fork of it.

A server begins in a fraction of a second so, and is a process like any other: it loads its model, opens its store,
and can be killed.
"""

import atexit
import contextlib
import functools
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mnemic.hosts.saving import save
from tests.serving.http_tests import TOKENIZER
from tests.serving.serving_models import served_model

_FORKER = """
import json, os, signal, sys
sys.path[:0] = [{src!r}]
import torch
torch.set_num_threads(1)
import mnemic.cli, mnemic.cli.serve, mnemic.serving.app, mnemic.serving.process, mnemic.serving.store.embedded
try:
    import mnemic.serving.store.postgres
except Exception:
    # Only servers on PostgreSQL need it, and they say so.
    pass
# What is imported late: the host's classes, and its tokenizer's.
from mnemic.cli._shared import quiet
from mnemic.cli.stream import open_model, tokenizer_for
quiet()
tokenizer_for({model!r}, open_model({model!r}, None, None), None)
# The kernel takes away servers that have ended.
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target in (1, 2):
            os.dup2(os.open(order["log"], os.O_WRONLY | os.O_APPEND), target)
        sys.argv = ["mnemic", *order["arguments"]]
        code = 1
        try:
            mnemic.cli.main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        finally:
            os._exit(code)
    print(child, flush=True)
"""
_PORT = re.compile(r"running on http://127\.0\.0\.1:(\d+)")
_PATIENCE = 60


@functools.cache
def model_folder() -> Path:
    """A tiny model with its tokenizer, in float64, saved whole."""
    folder = tempfile.TemporaryDirectory(prefix="mnemic-test-")
    atexit.register(folder.cleanup)
    save(served_model(), Path(folder.name) / "tiny", whole=True)
    TOKENIZER.save_pretrained(Path(folder.name) / "tiny")
    return Path(folder.name) / "tiny"


@functools.cache
def prepare() -> "subprocess.Popen[str]":
    """Let the process that forks begin its imports; the first server waits for them."""
    text = _FORKER.format(src=str(Path(__file__).parents[2] / "src"), model=str(model_folder()))
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    forker = subprocess.Popen(
        [sys.executable, "-c", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, "HF_HUB_OFFLINE": "1"},
    )
    assert forker.stdin is not None
    atexit.register(forker.wait, 10)
    atexit.register(forker.stdin.close)
    return forker


@functools.cache
def _forker() -> "subprocess.Popen[str]":
    forker = prepare()
    assert forker.stdout is not None
    assert forker.stdout.readline() == "ready\n"
    return forker


class ForkedServer:
    """`mnemic serve` of the tiny model with these settings, on a port of its own. folder: of its log and settings."""

    def __init__(self, folder: Path, store: str, **settings: float | str):
        folder.mkdir(parents=True, exist_ok=True)
        self.log, config = folder / "log", folder / "serve.toml"
        config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
        self.log.write_text("")
        arguments = ["serve", model_folder(), "--config", config, "--store", store, "--port", "0", "--threads", "1"]
        forker = _forker()
        assert forker.stdin is not None
        assert forker.stdout is not None
        forker.stdin.write(json.dumps({"log": str(self.log), "arguments": [str(a) for a in arguments]}) + "\n")
        forker.stdin.flush()
        self.pid = int(forker.stdout.readline())
        self.port = self._port()

    @contextlib.contextmanager
    def opened(
        self, method: str, path: str, body: str | None = None, kind: str = "application/json"
    ) -> Iterator[http.client.HTTPResponse]:
        """A response. Raises OSError, HTTPException or ValueError where the server is gone."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and content of a response. Raises as `opened`."""
        with self.opened(method, path, None if body is None else json.dumps(body)) as response:
            return response.status, json.loads(response.read())

    @property
    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self, how: int = signal.SIGKILL) -> None:
        """Returns when the process is gone."""
        try:
            os.kill(self.pid, how)
        except ProcessLookupError:
            return
        until = time.monotonic() + _PATIENCE
        while self.alive:
            assert time.monotonic() < until
            time.sleep(0.002)

    def _port(self) -> int:
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            alive = self.alive
            found = _PORT.search(self.log.read_text())
            if found:
                return int(found[1])
            assert alive, f"The server did not start:\n{self.log.read_text()}"
            time.sleep(0.005)
        raise AssertionError(f"The server said nothing of a port:\n{self.log.read_text()}")
