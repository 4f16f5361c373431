"""Requests that cannot be used: the right status, an error as OpenAI writes them, and a server that lives on."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemic.serving.requests import Limits
from tests.serving.http_tests import client_of, complete, ids, new_session, refused
from tests.serving.serving_models import served_model
from tests.tiny import VOCABULARY

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"model": "tiny", "prompt": [5, 9], "max_tokens": 2}
SAID = {"model": "tiny", "messages": [{"role": "user", "content": "w5"}], "max_tokens": 2}
LIMITS = Limits(max_prompt=1000, max_tokens=50)
HUGE = 10**400


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    with client_of(tmp_path_factory.mktemp("bad"), model, limits=LIMITS, max_body=50_000, max_import=50_000) as client:
        yield client
        # After all of it, the server answers as before.
        assert ids(complete(client, [5, 9, 12])) == model.stream().generate(
            [[5, 9, 12]], return_ids=True, max_new_tokens=4, do_sample=False
        )


BOTH = [
    ("temperature", [-1, 2.1, "1", True, [], HUGE]),
    ("top_p", [0, -0.1, 1.1, "x"]),
    ("top_k", [-1, 1.5, "x"]),
    ("n", [0, -1, 17, 10**9, HUGE, 1.5, "2"]),
    ("max_tokens", [0, -1, 51, 10**12, HUGE, 2.5, "2"]),
    ("seed", [2**63, -(2**63) - 1, 1.5, "x"]),
    ("stop", ["", [""], ["x"] * 17, "x" * 600, [1], 5, {}]),
    ("logit_bias", [{"x": 1}, {"-1": 1}, {"1": 101}, {"1": "x"}, {str(VOCABULARY): 1}, {"9" * 5000: 1}, {"²": 1}, [1]]),
    ("presence_penalty", [3, "x"]),
    ("frequency_penalty", [-3, "x"]),
    ("stream", ["yes", 1]),
    ("stream_options", [{"include_usage": True}, {"x": 1}, 5]),
    ("metadata", [{"session": 5}, "x", {"a": None}]),
    ("model", [None, 5, ["tiny"]]),
    ("nonsense", [1]),
]
CASES = [
    *((path, base, name, value) for path, base in ((COMPLETIONS, PROMPT), (CHAT, SAID)) for name, values in BOTH for value in values),  # noqa: E501
    *((COMPLETIONS, PROMPT, "logprobs", value) for value in (-1, 21, "x", True)),
    *((COMPLETIONS, PROMPT, "prompt", value) for value in (None, "", [], [[]], [[5], []], 5, {}, [5, "x"], [5.5])),
    *((COMPLETIONS, PROMPT, "prompt", value) for value in ([-1], [VOCABULARY], [HUGE], [2**70], [True], [[5], 6])),
    *((COMPLETIONS, PROMPT, name, value) for name, value in (("echo", True), ("suffix", "x"), ("best_of", 3))),
    *((CHAT, SAID, "messages", value) for value in (None, [], {}, "hi", [{}], [5], [{"role": "user"}])),
    *((CHAT, SAID, "messages", [message]) for message in (
        {"role": "wizard", "content": "w5"},
        {"role": "user", "content": None},
        {"role": "user", "content": 5},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]},
        {"role": "user", "content": "w5", "chat_template": "{{ 7 * 7 }}"},
    )),
    (CHAT, SAID, "top_logprobs", 2),
    (CHAT, SAID, "max_completion_tokens", 3),
    (CHAT, SAID, "tools", []),
    (CHAT, SAID, "chat_template", "{{ 7 * 7 }}"),
    (CHAT, SAID, "response_format", {"type": "json_object"}),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_values_that_cannot_be_used_are_refused(client, stream):
    for path, base, name, value in CASES:
        body = {**base, **({"stream": True} if stream else {}), name: value}
        if stream and name in ("stream", "stream_options"):
            continue
        response = client.post(path, json=body)
        message = refused(response, 400)
        assert len(message) < 1000, (path, name, value)


def test_errors_name_the_field(client):
    for path, base, name, value in CASES:
        if isinstance(value, int | float | str) and name != "max_completion_tokens":
            refused(client.post(path, json={**base, name: value}), 400, param=name)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"5", b'"x"', b"{'model': 1}", b"\xff\xfe", b'{"model": "\xff"}',
        b'{"model": "tiny", "prompt": "\\ud800"}', b'{"model": "tiny", "prompt": NaN}',
        b'{"model": "tiny", "prompt": [5], "temperature": NaN}',
        b'{"model": "tiny", "prompt": [5], "temperature": 1e999}',
        b'{"model": "tiny", "prompt": [5], "\\ud800": 5}', b'{"model": "tiny", "prompt": [5], "seed": "\\ud800"}',
        b"[" * 20_000, b'{"model":' * 5000, b'{"model": "tiny", "prompt": ' + b"9" * 6000 + b"}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(client, content):
    for path in (COMPLETIONS, CHAT):
        refused(client.post(path, content=content, headers={"Content-Type": "application/json"}), 400)


def test_bodies_of_another_type(client):
    content = json.dumps(PROMPT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "image/png", "nonsense"):
        refused(client.post(COMPLETIONS, content=content, headers={"Content-Type": kind}), 400)


def test_names_that_nobody_has(client):
    refused(client.post(COMPLETIONS, json={**PROMPT, "model": "gpt-5"}), 404, "model_not_found", "model")
    refused(client.post(CHAT, json={**SAID, "model": ""}), 404, "model_not_found", "model")
    half = json.dumps({**PROMPT, "model": "\ud800"}).encode()
    assert client.post(COMPLETIONS, content=half, headers={"Content-Type": "application/json"}).status_code in (
        400,
        404,
    )
    refused(client.get("/v1/models/a/b"), 404, "model_not_found")
    refused(complete(client, [5], session="f" * 32), 404, "session_not_found")
    refused(complete(client, [5], metadata={"session": ""}), 404, "session_not_found")
    refused(client.get("/v2/nothing"), 404)
    refused(client.put("/v1/models"), 405)
    for name in ("..", "%2e%2e%2fx", "%00", "a%00b", "x" * 5000, "%F0%9F%8E%89", "a%0Ab", "~", "c:", "%ff"):
        response = client.get(f"/v1/sessions/{name}/commits")
        refused(response, 404)
        header = {"X-Session-Id": name}
        refused(client.post(COMPLETIONS, json=PROMPT, headers=header), 404, "session_not_found")
    refused(client.post(COMPLETIONS, json=PROMPT, headers={"X-Session-Id": b"\xff\xfe"}), 404, "session_not_found")


def test_too_much(client):
    # Tokens, then bytes: known before they come, and found out while they do.
    refused(complete(client, [5] * 1001), 413, "too_large", "prompt")
    refused(complete(client, "w5 " * 1001), 413, "too_large", "prompt")
    refused(complete(client, [5] * 30_000), 413, "too_large")
    body = json.dumps({**PROMPT, "prompt": [5] * 30_000}).encode()
    for path in (COMPLETIONS, CHAT, "/v1/sessions", "/v1/sessions/x/fork"):
        pieces = (body[i : i + 10_000] for i in range(0, len(body), 10_000))
        refused(client.post(path, content=pieces, headers={"Content-Type": "application/json"}), 413, "too_large")
    refused(client.post("/v1/sessions/import", content=b"x" * 60_000), 413, "too_large")


@pytest.mark.parametrize(
    "body",
    [
        {"id": 5}, {"id": ""}, {"id": "../x"}, {"id": "a/b"}, {"id": "a\0b"}, {"id": "x" * 129}, {"id": "ä"},
        {"id": ".hidden"}, {"ttl": 0}, {"ttl": -1}, {"ttl": "x"}, {"ttl": HUGE}, {"metadata": {"a": 5}},
        {"metadata": {"a": "\0"}}, {"metadata": {"a": "x" * 20_000}}, {"metadata": []}, {"nonsense": 1}, [], 5,
    ],
)  # fmt: skip
def test_sessions_that_cannot_be_made(client, body):
    refused(client.post("/v1/sessions", json=body), 400)
    source = new_session(client)
    refused(client.post(f"/v1/sessions/{source}/fork", json=body), 400)
    client.delete(f"/v1/sessions/{source}")


def test_versions_that_are_no_versions(client):
    session = new_session(client)
    complete(client, [5], session=session)
    for version in (0, -1, 2, HUGE, 2**63, 1.5, "x", None, True):
        refused(client.post(f"/v1/sessions/{session}/rollback", json={"version": version}), 400)
    for version in (-1, 2, 2**63, 2**70, 1.5, "x"):
        refused(client.post(f"/v1/sessions/{session}/fork", json={"version": version}), 400)
        refused(client.get(f"/v1/sessions/{session}/export", params={"version": version}), 400)
    for limit in ("x", 2**70, -5):
        refused(client.get("/v1/sessions", params={"limit": limit}), 400)


def test_damaged_and_foreign_states_are_not_taken_in(client, model):
    good = bytearray(model.stream().feed([5, 9, 12]).to_bytes())
    generator = torch.Generator().manual_seed(1)
    places = torch.randint(len(good), (250,), generator=generator).tolist()
    damaged = [bytes(good[:p]) + bytes([good[p] ^ 0x55]) + bytes(good[p + 1 :]) for p in places]
    cut = [bytes(good[:p]) for p in places]
    foreign = served_model("rmt").stream().feed([5]).to_bytes()
    batch = model.stream(batch_size=2).feed([[5], [6]]).to_bytes()
    before = client.get("/v1/sessions").json()
    for data in (*damaged, *cut, b"", b"x", b"\x80\x04.", foreign, batch):
        refused(client.post("/v1/sessions/import", content=data), 400)
    refused(client.post("/v1/sessions/import", params={"id": "../x"}, content=bytes(good)), 400, param="session_id")
    refused(client.post("/v1/sessions/import", params={"ttl": "nan"}, content=bytes(good)), 400)
    assert client.get("/v1/sessions").json() == before


def test_a_failing_model_fails_one_request_and_says_nothing_of_itself(tmp_path, monkeypatch):
    model = served_model()
    session_prompt, secret = [7, 8], "the secret of the host"
    with client_of(tmp_path, model) as client:
        session = new_session(client)
        complete(client, [5], session=session)
        forward = type(model).forward

        def failing(self, input_ids=None, *args, **options):
            if input_ids is not None and bool((input_ids == 33).any()):
                raise RuntimeError(secret)
            return forward(self, input_ids, *args, **options)

        monkeypatch.setattr(type(model), "forward", failing)
        for options in ({}, {"stream": True}):
            response = complete(client, [33], session=session, **options)
            assert response.status_code == 500
            refused(response, 500, "step_failed")
        monkeypatch.undo()
        assert client.get(f"/v1/sessions/{session}").json()["version"] == 1
        assert complete(client, session_prompt, session=session).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    ["temperature", "prompt", "messages", "stop", "n", "logit_bias", "seed", "metadata", "logprobs"]
)


@given(values=st.dictionaries(NAMES, JSON, min_size=1, max_size=3), chat=st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_json_brings_the_server_down(client, values, chat):
    path, base = (CHAT, SAID) if chat else (COMPLETIONS, PROMPT)
    content = json.dumps({**base, **values}).encode()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code < 500, response.text
