"""/v1/chat/completions: what is sent is what the template makes of it, whole or in turns of a session."""

import pytest

from mnemic.serving.chat import ChatTemplate
from tests.serving.http_tests import client_of, events_of, new_session, refused
from tests.serving.serving_models import served_model
from tests.serving.tokenizers_for_tests import byte_level
from tests.tiny import tiny_host

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_level()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model(tokenizer):
    return served_model(host=tiny_host(vocab_size=len(tokenizer)))


@pytest.fixture(scope="module")
def client(model, tokenizer, tmp_path_factory):
    with client_of(tmp_path_factory.mktemp("chat"), model, tokenizer=tokenizer) as client:
        yield client


def say(text, role="user"):
    return {"role": role, "content": text}


def chat(client, messages, max_tokens=5, session=None, **given):
    headers = {} if session is None else {"X-Session-Id": session}
    body = {"model": "tiny", "messages": messages, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
    return client.post("/v1/chat/completions", json={**body, **given}, headers=headers)


def answer(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def local(stream, ids, count=5):
    return stream.generate([ids], return_ids=True, max_new_tokens=count, do_sample=False)


def test_a_whole_conversation_is_answered(client, model, tokenizer):
    messages = [say("be kind", "system"), say("hello"), say("yes", "assistant"), say("the cat?")]
    response = chat(client, messages)
    text = "".join(f"<s>{m['role']}\n{m['content']}</s>\n" for m in messages) + "<s>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = local(model.stream(), ids)
    choice = answer(response)
    assert choice["token_ids"] == expected
    assert choice["message"] == {
        "role": "assistant", "content": tokenizer.decode(expected, skip_special_tokens=True), "refusal": None,
    }  # fmt: skip
    assert response.json()["usage"] == {
        "prompt_tokens": len(ids), "completion_tokens": 5, "total_tokens": len(ids) + 5,
    }  # fmt: skip


def test_a_session_reads_each_message_once(client, model, tokenizer):
    session, stream, template = new_session(client), model.stream(), ChatTemplate(tokenizer)
    first = chat(client, [say("be kind", "developer"), say("hello")], session=session)
    assert answer(first)["token_ids"] == local(stream, template.first([say("be kind", "system"), say("hello")]))
    for text in ("the cat sat", "naïve 你好"):
        stream.feed(template.closing)
        found = chat(client, [say(text)], session=session)
        assert answer(found)["token_ids"] == local(stream, template.following([say(text)]))
    stream.feed(template.closing)
    assert client.get(f"/v1/sessions/{session}").json()["tokens_seen"] == stream.tokens_seen


def test_a_session_that_read_a_document_is_asked(client, model, tokenizer):
    session, text = new_session(client), "the cat sat on the mat\n" * 5
    client.post(f"/v1/sessions/{session}/documents", content=text.encode())
    stream = model.stream(tokenizer=tokenizer).feed(text)
    expected = local(stream, ChatTemplate(tokenizer).following([say("where?")]))
    assert answer(chat(client, [say("where?")], session=session))["token_ids"] == expected


def test_streamed_deltas_join_to_the_message(client):
    whole = answer(chat(client, [say("grüße")], 8, logprobs=True, top_logprobs=2, n=2))
    response = chat(client, [say("grüße")], 8, logprobs=True, top_logprobs=2, n=2, stream=True)
    chunks = events_of(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for i in range(2):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == i]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == whole["message"]["content"]
        assert (mine[-1]["delta"], mine[-1]["finish_reason"]) == ({}, whole["finish_reason"])
        content = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert [(e["token"], e["bytes"]) for e in content] == [
            (e["token"], e["bytes"]) for e in whole["logprobs"]["content"]
        ]


def test_text_may_come_in_parts(client):
    parts = {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]}
    assert answer(chat(client, [parts]))["token_ids"] == answer(chat(client, [say("the cat")]))["token_ids"]


def test_no_template_of_a_client_is_used(client):
    text = "{{ 7 * 7 }}{% for i in range(9) %}x{% endfor %}"
    response = chat(client, [say(text)])
    plain = client.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": f"<s>user\n{text}</s>\n<s>assistant\n", "max_tokens": 5, "temperature": 0,
              "return_token_ids": True},
    )  # fmt: skip
    assert answer(response)["token_ids"] == plain.json()["choices"][0]["token_ids"]
    refused(chat(client, [say("hi")], chat_template="{{ 7 * 7 }}"), 400, param="chat_template")


def test_what_a_template_refuses_is_a_bad_request(tmp_path, model):
    strict = byte_level()
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m['content'] }}</s>{% endfor %}"
    )
    with client_of(tmp_path, model, tokenizer=strict) as client:
        assert "no system here" in refused(chat(client, [say("x", "system")]), 400, param="messages")
        assert chat(client, [say("x")]).status_code == 200
