"""The server over HTTP: sessions together against one at a time, waiting times, and fairness beside a document.

The server is a process of its own, with sessions in a folder of this machine, every answer stored before it ends. The
clients here hold one connection each and read events as they come. Times are theirs, from a request's first byte.
"""

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import Progress

from benchmarks.serving_common import VOCABULARY, build, ids, prompt_of, spread, summary, waits

_LINE = 1 << 16
_PIECE = 1 << 13
"""Tokens of a document sent at once."""


async def http(arguments: argparse.Namespace, bar: Progress) -> dict[str, Any]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(arguments, folder, theirs))
        process.start()
        try:
            # An end of the pipe that is left open here would hide that the other process is gone.
            theirs.close()
            port = await asyncio.to_thread(ours.recv)
            return await _measured(_Clients(port, psutil.Process(process.pid), arguments), arguments, bar)
        finally:
            process.terminate()
            process.join()


async def _measured(clients: "_Clients", arguments: argparse.Namespace, bar: Progress) -> dict[str, Any]:
    rounds: dict[str, list[dict[str, float]]] = {"one_at_a_time": [], "together": [], "with_document": []}
    task = bar.add_task("over HTTP", total=3 * arguments.rounds)
    await clients.answers(2, alone=False)
    for _ in range(arguments.rounds):
        rounds["one_at_a_time"].append(await clients.answers(arguments.alone, alone=True))
        bar.advance(task)
        rounds["together"].append(await clients.answers(arguments.sessions, alone=False))
        bar.advance(task)
        rounds["with_document"].append(await clients.beside_a_document())
        bar.advance(task)
    found: dict[str, Any] = {kind: summary(each) for kind, each in rounds.items()}
    for name, kind in (("speedup", "tokens_per_second"), ("processor_speedup", "tokens_per_processor_second")):
        pairs = zip(rounds["together"], rounds["one_at_a_time"], strict=True)
        found[name] = spread([a[kind] / b[kind] for a, b in pairs])
    return found


class _Clients:
    def __init__(self, port: int, server: psutil.Process, arguments: argparse.Namespace):
        self.port, self.server, self.arguments = port, server, arguments

    async def answers(self, count: int, *, alone: bool) -> dict[str, float]:
        """Of as many new sessions, each with a prompt of its own."""
        sessions = [json.loads(await self._call("POST", "/v1/sessions"))["id"] for _ in range(count)]
        began, worked = time.perf_counter(), self._worked()
        if alone:
            times = [await self._answer(session, seed) for seed, session in enumerate(sessions)]
        else:
            times = await asyncio.gather(*(self._answer(session, seed) for seed, session in enumerate(sessions)))
        seconds, worked = time.perf_counter() - began, self._worked() - worked
        for session in sessions:
            await self._call("DELETE", f"/v1/sessions/{session}")
        tokens = sum(map(len, times))
        assert tokens == count * self.arguments.tokens
        return {
            "tokens_per_second": tokens / seconds,
            "tokens_per_processor_second": tokens / worked,
            **waits(times),
        }

    async def beside_a_document(self) -> dict[str, float]:
        """The same while one more session reads a document, from its first tokens on."""
        session = json.loads(await self._call("POST", "/v1/sessions"))["id"]
        feeding = asyncio.create_task(self._feed(session))
        while not (before := await self._fed(session)):
            assert not feeding.done(), "the document was read before anything was measured"
            await asyncio.sleep(0.02)
        began = time.perf_counter()
        found = await self.answers(self.arguments.sessions, alone=False)
        after, seconds = await self._fed(session), time.perf_counter() - began
        assert after, "the document was read before all was measured: give a longer one"
        # The client leaves, and with it its document.
        feeding.cancel()
        await asyncio.wait({feeding})
        while await self._fed(session):
            await asyncio.sleep(0.02)
        await self._call("DELETE", f"/v1/sessions/{session}")
        return {**found, "document_tokens_per_second": (after - before) / seconds}

    def _worked(self) -> float:
        times = self.server.cpu_times()
        return times.user + times.system

    async def _fed(self, session: str) -> int:
        feeding = json.loads(await self._call("GET", f"/v1/sessions/{session}"))["feeding"]
        return 0 if feeding is None else feeding["tokens_read"]

    async def _answer(self, session: str, seed: int) -> list[float]:
        """Seconds until each token."""
        body = {
            "model": "mnemic", "prompt": prompt_of(self.arguments, seed).tolist(), "temperature": 0, "stream": True,
            "max_tokens": self.arguments.tokens, "return_token_ids": True, "metadata": {"session": session},
        }  # fmt: skip
        began, times = time.perf_counter(), []
        async for line in self._lines("POST", "/v1/completions", json.dumps(body).encode()):
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                if any(choice.get("token_ids") for choice in event["choices"]):
                    times.append(time.perf_counter() - began)
        return times

    async def _feed(self, session: str) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, self.arguments.document, _PIECE):
                count = min(_PIECE, self.arguments.document - start)
                yield (" ".join(f"w{i}" for i in ids(count, start).tolist()) + "\n").encode()

        async for _ in self._lines("POST", f"/v1/sessions/{session}/documents", pieces(), "text/plain"):
            pass

    async def _call(self, method: str, path: str) -> bytes:
        return b"".join([line async for line in self._lines(method, path)])

    async def _lines(
        self, method: str, path: str, body: bytes | AsyncIterator[bytes] = b"", kind: str = "application/json"
    ) -> AsyncIterator[bytes]:
        """The content's lines; what frames chunks of it is left out, as long as no line of the content looks so."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=_LINE)
        try:
            length = f"Content-Length: {len(body)}" if isinstance(body, bytes) else "Transfer-Encoding: chunked"
            head = (f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Type: {kind}", length)
            writer.write("\r\n".join((*head, "", "")).encode() + (body if isinstance(body, bytes) else b""))
            if not isinstance(body, bytes):
                async for piece in body:
                    writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                    await writer.drain()
                writer.write(b"0\r\n\r\n")
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            chunked = False
            while (line := await reader.readline()).strip():
                chunked = chunked or line.lower().startswith(b"transfer-encoding: chunked")
            assert status < 300, (status, await reader.read())
            async for line in reader:
                if not (chunked and line.endswith(b"\r\n")):
                    yield line
        finally:
            writer.close()


def _serve(arguments: argparse.Namespace, folder: str, told: Connection) -> None:
    import uvicorn

    from mnemic.serving.app import create_app
    from mnemic.serving.config import Settings
    from mnemic.serving.requests import Limits
    from mnemic.serving.store import open_store

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            told.send(self.servers[0].sockets[0].getsockname()[1])

    if arguments.server_threads:
        torch.set_num_threads(arguments.server_threads)
    settings = Settings(limits=Limits(max_rows=arguments.sessions + 1), page=False)
    app = create_app(build(arguments), _words(), open_store(str(Path(folder) / "store")), settings)
    Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False)).run()


def _words() -> Any:
    """A tokenizer with a word for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner)
