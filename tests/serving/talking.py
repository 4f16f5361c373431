"""Clients of sessions that know what they were answered, and check all of it against one local stream each."""

import http.client
import json
import random
from dataclasses import dataclass
from typing import Any

import torch

import mnemic
from mnemic.hosts.stream import Stream
from tests.serving.forked_servers import ForkedServer, model_folder

NEW = 3
"""Tokens of an answer."""

CLOSE = 1e-6
"""Sums in batches round differently, and a memory carries that on; another token read makes a difference of 1e-2."""

_GONE = (OSError, http.client.HTTPException, ValueError)


def local_model() -> Any:
    """The model that is served."""
    model = mnemic.load(model_folder(), dtype=torch.float64).eval()
    assert not model.generation_config.eos_token_id
    return model


@dataclass
class Told:
    """A turn. version, tokens: as answered; None where no whole answer came, and it may have been stored or not."""

    kind: str
    prompt: list[int]
    version: int | None = None
    tokens: list[int] | None = None


class Client:
    """One session, one turn at a time: whole answers, streamed ones, documents.

    answered: turns of which the server has said that they are done.
    """

    def __init__(self, model: Any, session: str, seed: int):
        self.session, self.model = session, model
        self.draw = random.Random(seed)
        self.stream, self.version = model.stream(), 0
        self.told: list[Told] = []
        self.answered = 0

    def turn(self, server: ForkedServer) -> bool:
        """Whether the server answered."""
        kind = self.draw.choice(("whole", "streamed", "document"))
        told = Told(kind, [self.draw.randrange(3, 61) for _ in range(self.draw.randint(1, 20))])
        self.told.append(told)
        try:
            getattr(self, f"_{kind}")(server, told)
        except _GONE:
            return False
        self.answered += 1
        return True

    def settle(self, server: ForkedServer) -> bytes:
        """The session's state, after a turn whose version tells whether one without an answer was stored."""
        while not self.told or self.told[-1].version is None:
            assert self.turn(server)
        with server.opened("GET", f"/v1/sessions/{self.session}/export") as response:
            assert response.status == 200
            return response.read()

    def check(self, state: bytes) -> None:
        """Everything that was answered is in the state, in this order and once, and nothing else.

        A turn without an answer is there or not, as a whole.
        """
        unknown = None
        for told in self.told:
            if told.version is None:
                assert unknown is None
                unknown = told
                continue
            if unknown is not None and told.version == self.version + 2:
                self._read(unknown)
            unknown = None
            self._read(told)
            assert told.version == self.version, (self.session, told)
        self.told.clear()
        theirs = Stream.from_bytes(self.model, state)
        assert theirs.tokens_seen == self.stream.tokens_seen
        for name, tensor in self.stream.state.items():
            torch.testing.assert_close(theirs.state[name], tensor, rtol=CLOSE, atol=CLOSE)
        torch.testing.assert_close(theirs.cache.last_logits, self.stream.cache.last_logits, rtol=CLOSE, atol=CLOSE)
        # What both have read is the same, so over hundreds of turns they must not drift apart by rounding.
        self.stream = theirs

    def _read(self, told: Told) -> None:
        """The same locally."""
        self.stream.feed([told.prompt])
        tokens = []
        for _ in range(NEW if told.kind != "document" else 0):
            assert self.stream.cache.last_logits is not None
            tokens.append(int(self.stream.cache.last_logits[0].argmax()))
            self.stream.feed([tokens[-1:]])
        assert told.tokens in (None, tokens), (self.session, told, tokens)
        self.version += 1

    def _body(self, told: Told, **more: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": told.prompt, "max_tokens": NEW, "temperature": 0, "return_token_ids": True}
        return {**body, "metadata": {"session": self.session}, **more}

    def _whole(self, server: ForkedServer, told: Told) -> None:
        status, answer = server.call("POST", "/v1/completions", self._body(told))
        assert status == 200, answer
        told.tokens, told.version = answer["choices"][0]["token_ids"], answer["session"]["version"]

    def _streamed(self, server: ForkedServer, told: Told) -> None:
        with server.opened("POST", "/v1/completions", json.dumps(self._body(told, stream=True))) as response:
            assert response.status == 200, response.read()
            events = [line[6:] for line in response.read().split(b"\n\n") if line]
        if not events or events[-1] != b"[DONE]":
            raise ValueError("cut short")
        chunks = [json.loads(event) for event in events[:-1]]
        assert not any("error" in chunk for chunk in chunks), chunks
        told.tokens = [i for chunk in chunks for choice in chunk["choices"] for i in choice.get("token_ids", [])]
        told.version = chunks[-1]["session"]["version"]

    def _document(self, server: ForkedServer, told: Told) -> None:
        path, text = f"/v1/sessions/{self.session}/documents", " ".join(f"w{i}" for i in told.prompt)
        with server.opened("POST", path, text, "text/plain") as response:
            content = response.read()
            assert response.status == 200, content
        told.tokens, told.version = [], json.loads(content)["session"]["version"]
