"""A server on a socket: the official client, streams as they come, clients that leave."""

import http.client
import json
import socket
import time
from urllib.parse import urlsplit

import pytest

from mnemic.serving.requests import Limits
from tests.serving.http_tests import address_of, app_of
from tests.serving.serving_models import served_model

PIECE = 1024
openai = pytest.importorskip("openai", reason="openai is not installed")


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def app(model, tmp_path_factory):
    return app_of(tmp_path_factory.mktemp("live"), model, limits=Limits(max_tokens=100_000))


@pytest.fixture(scope="module")
def address(app):
    with address_of(app) as address:
        yield address


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr("mnemic.serving.uploads.PIECE", PIECE)


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def say(text):
    return [{"role": "user", "content": text}]


def call(address, method, path, body=None, headers=None, **options):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        connection.request(method, path, body, headers or {}, **options)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def post(address, path, body):
    return call(address, "POST", path, json.dumps(body), {"Content-Type": "application/json"})


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_client_lists_the_model(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mnemic"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_the_client_chats(client):
    asked = {"model": "tiny", "messages": say("w5 w9"), "max_completion_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 6
    text, usage = "", None
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage
    assert text == whole.choices[0].message.content
    assert usage == whole.usage


def test_the_client_gets_logprobs_seeds_and_stops(client):
    asked = {"model": "tiny", "messages": say("w5 w9"), "max_tokens": 6}
    first, second = (client.chat.completions.create(**asked, seed=5, temperature=1.2) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    greedy = client.chat.completions.create(**asked, temperature=0, logprobs=True, top_logprobs=2)
    content = greedy.choices[0].logprobs.content
    assert [len(token.top_logprobs) for token in content] == [2] * 6
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)
    word = greedy.choices[0].message.content.split()[2]
    stopped = client.chat.completions.create(**asked, temperature=0, stop=[f" {word}"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == greedy.choices[0].message.content.partition(f" {word}")[0]


def test_the_client_completes(client):
    asked = {"model": "tiny", "prompt": [5, 9, 12], "max_tokens": 5, "temperature": 0, "logprobs": 1}
    whole = client.completions.create(**asked)
    assert len(whole.choices[0].logprobs.token_logprobs) == 5
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    assert streamed == whole.choices[0].text


def test_the_client_goes_on_with_a_session(client, address):
    session = post(address, "/v1/sessions", {})[1]["id"]
    asked = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    first = client.chat.completions.create(**asked, messages=say("w5"), extra_headers={"X-Session-Id": session})
    second = client.chat.completions.create(**asked, messages=say("w5"), metadata={"session": session})
    assert (first.session["version"], second.session["version"]) == (1, 2)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**asked, messages=say("w5"), metadata={"session": "nobody"})
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=say("w5"), temperature=7)


def test_tokens_come_while_others_are_made(client, app):
    with client.completions.create(model="tiny", prompt=[5, 9], max_tokens=100_000, stream=True) as stream:
        next(iter(stream))
        assert app.state.server.engine.stats().decoding == 1
    # The client has left, so the work is over long before its 100,000 tokens.
    until(lambda: app.state.server.engine.stats().decoding == 0)


def open_request(address, body, session):
    """A socket with a request on its way."""
    place = urlsplit(address)
    opened = socket.create_connection((place.hostname, place.port))
    content = json.dumps(body).encode()
    opened.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Session-Id: {session}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return opened


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_work_and_its_session_is_at_the_last_commit(address, app, stream):
    session = post(address, "/v1/sessions", {})[1]["id"]
    body = {"model": "tiny", "prompt": [5, 9, 12], "max_tokens": 4, "temperature": 0}
    assert post(address, "/v1/completions", {**body, "metadata": {"session": session}})[0] == 200
    before, engine = call(address, "GET", f"/v1/sessions/{session}")[1], app.state.server.engine
    opened = open_request(address, {**body, "max_tokens": 100_000, "stream": stream}, session)
    until(lambda: engine.stats().decoding == 1)
    opened.close()
    until(lambda: engine.stats().decoding == 0)
    assert call(address, "GET", f"/v1/sessions/{session}")[1] == before
    # The session can be written at once.
    answered = post(address, "/v1/completions", {**body, "metadata": {"session": session}})[1]
    assert answered["session"]["version"] == 2


def test_a_client_that_leaves_while_it_sends_a_document_changes_nothing(address, app):
    session = post(address, "/v1/sessions", {})[1]["id"]
    place = urlsplit(address)
    opened = socket.create_connection((place.hostname, place.port))
    text = b"w5 w6 w7 w8\n" * 200
    opened.sendall(
        f"POST /v1/sessions/{session}/documents HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
        f"Content-Length: {2 * len(text)}\r\n\r\n".encode()
        + text
    )
    key = ("default", session)
    until(lambda: app.state.server.feeding.get(key, (0, 0))[1] > 0)
    opened.close()
    until(lambda: key not in app.state.server.feeding)
    assert call(address, "GET", f"/v1/sessions/{session}")[1]["version"] == 0


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_documents_are_read_as_they_come_and_progress_shows(address, accept):
    session, seen = post(address, "/v1/sessions", {})[1]["id"], []
    line = b"w5 w6 w7 w8 w9 w10 w11\n"
    block = line * (PIECE // len(line) + 1)

    def tokens():
        feeding = call(address, "GET", f"/v1/sessions/{session}")[1]["feeding"]
        return 0 if feeding is None else feeding["tokens_read"]

    def body():
        for _ in range(2):
            yield block
            before = seen[-1] if seen else 0
            # What came so far is being read while the rest is still to come.
            until(lambda before=before: tokens() > before)
            seen.append(tokens())

    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    headers = {"Transfer-Encoding": "chunked", "Accept": accept}
    connection.request("POST", f"/v1/sessions/{session}/documents", body(), headers, encode_chunked=True)
    text = connection.getresponse().read().decode()
    connection.close()
    last = text if accept == "application/json" else text.split("\n\n")[-3].removeprefix("data: ")
    assert json.loads(last)["tokens_read"] == 2 * 7 * block.count(b"\n")
    assert len(seen) == 2
    assert call(address, "GET", f"/v1/sessions/{session}")[1]["feeding"] is None
