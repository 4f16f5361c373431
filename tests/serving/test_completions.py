"""/v1/completions: what a local stream gives, in OpenAI's form."""

import pytest
import torch

from tests.serving.http_tests import client_of, complete, events_of, ids, new_session, refused
from tests.serving.serving_models import served_model


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    with client_of(tmp_path_factory.mktemp("completions"), model) as client:
        yield client


def local(model, ids, count, stream=None):
    stream = model.stream() if stream is None else stream
    return stream.generate([ids], return_ids=True, max_new_tokens=count, do_sample=False), stream


def test_a_stateless_request_gives_what_a_fresh_stream_gives(client, model):
    response = complete(client, [5, 9, 12], 6)
    body = response.json()
    expected, _ = local(model, [5, 9, 12], 6)
    assert ids(response) == expected
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["choices"][0]["text"] == " ".join(f"w{i}" for i in expected)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert "session" not in body


def test_text_and_ids_are_the_same_prompt(client):
    assert ids(complete(client, "w5 w9 w12")) == ids(complete(client, [5, 9, 12]))


def test_several_prompts_and_choices_are_answered_in_order(client):
    body = complete(client, [[5, 9], [7, 8, 9]], n=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    each = [choice["token_ids"] for choice in body["choices"]]
    assert each[0] == each[1] == ids(complete(client, [5, 9]))
    assert each[2] == each[3] == ids(complete(client, [7, 8, 9]))
    texts = complete(client, ["w5 w9", "w7 w8 w9"]).json()["choices"]
    assert [choice["token_ids"] for choice in texts] == [each[0], each[2]]


def test_seeds_repeat_and_choices_have_their_own(client):
    def sampled(seed, n=1):
        choices = complete(client, [5, 9], 8, temperature=1.5, seed=seed, n=n).json()["choices"]
        return [choice["token_ids"] for choice in choices]

    assert sampled(3) == sampled(3)
    both = sampled(3, n=2)
    assert both[:1] == sampled(3)
    assert both[0] != both[1]
    assert sampled(3) != sampled(4)
    assert sampled(2**63 - 1, n=3) == sampled(2**63 - 1, n=3)


def test_streamed_pieces_join_to_the_whole_answer(client):
    whole = complete(client, [5, 9, 12], 6, logprobs=2).json()
    response = complete(client, [5, 9, 12], 6, logprobs=2, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events_of(response)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [i for choice in choices for i in choice.get("token_ids", ())] == whole["choices"][0]["token_ids"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    offsets = [o for choice in choices[:-1] for o in choice["logprobs"]["text_offset"]]
    assert offsets == whole["choices"][0]["logprobs"]["text_offset"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


def test_stop_strings_end_the_text_and_are_not_part_of_it(client):
    free = complete(client, [5, 9, 12], 6).json()["choices"][0]
    words = free["text"].split()
    stopped = complete(client, [5, 9, 12], 6, stop=[f" {words[2]}"]).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == free["text"].partition(f" {words[2]}")[0]


def test_log_probabilities_are_the_models_own(client, model):
    choice = complete(client, [5, 9, 12], 2, logprobs=3).json()["choices"][0]
    stream = model.stream().feed([5, 9, 12])
    expected = torch.log_softmax(stream.cache.last_logits[0].float(), -1)
    found = choice["logprobs"]
    first = choice["token_ids"][0]
    assert found["token_logprobs"][0] == pytest.approx(expected[first].item(), abs=1e-5)
    top = expected.topk(3)
    assert found["top_logprobs"][0] == pytest.approx(
        {f"w{i}": value for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)}, abs=1e-5
    )
    assert found["tokens"] == [f"w{i}" for i in choice["token_ids"]]


def test_a_bias_decides_the_token(client):
    assert ids(complete(client, [5, 9], 3, logit_bias={"33": 100})) == [33, 33, 33]


def test_a_session_goes_on_where_it_stopped(client, model):
    session = new_session(client)
    first = complete(client, [5, 9, 12], 4, session=session)
    second = complete(client, [20, 21], 5, session=session)
    expected, stream = local(model, [5, 9, 12], 4)
    assert ids(first) == expected
    assert first.json()["session"] == {"id": session, "version": 1, "tokens_seen": 7}
    assert ids(second) == local(model, [20, 21], 5, stream)[0]
    assert second.json()["session"] == {"id": session, "version": 2, "tokens_seen": 14}
    # An empty prompt goes on without new text, and metadata names a session too.
    third = complete(client, "", 3, metadata={"session": session})
    assert ids(third) == stream.generate(return_ids=True, max_new_tokens=3, do_sample=False)


def test_requests_without_a_session_leave_nothing_behind(client):
    before = client.get("/v1/sessions").json()["data"]
    assert ids(complete(client, [5, 9])) == ids(complete(client, [5, 9]))
    assert client.get("/v1/sessions").json()["data"] == before


def test_a_stream_of_a_session_says_its_version_at_the_end(client):
    session = new_session(client)
    *_, last = events_of(complete(client, [5, 9], 3, session=session, stream=True))
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["session"]["version"] == 1


def test_what_a_session_cannot_do_is_refused(client):
    session = new_session(client)
    refused(complete(client, [5], n=2, session=session), 400, param="n")
    refused(complete(client, [[5], [6]], session=session), 400, param="prompt")
    refused(complete(client, [], session=session), 400, param="prompt")
    refused(complete(client, [5], session=session, metadata={"session": "other"}), 400, param="metadata")
    assert client.get(f"/v1/sessions/{session}").json()["version"] == 0


def test_a_model_without_a_tokenizer_takes_and_gives_ids(tmp_path, model):
    with client_of(tmp_path, model, tokenizer=None) as client:
        choice = complete(client, [5, 9, 12], logprobs=1).json()["choices"][0]
        assert choice["token_ids"] == local(model, [5, 9, 12], 4)[0]
        assert choice["text"] == ""
        assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
        refused(complete(client, "w5"), 400, param="prompt")
        refused(complete(client, [5], stop="x"), 400, param="stop")
        messages = [{"role": "user", "content": "w5"}]
        refused(client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages}), 400)
