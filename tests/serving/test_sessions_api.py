"""/v1/sessions: what is made, listed, fed, forked, rolled back, exported, imported and deleted."""

import threading
import time

import pytest

from mnemic.hosts.stream import Stream
from mnemic.serving.errors import StoreUnavailable
from mnemic.serving.store import open_store
from mnemic.serving.uploads import PIECE, Pieces
from tests.serving.http_tests import TOKENIZER, client_of, complete, events_of, ids, new_session, refused
from tests.serving.serving_models import served_model


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    with client_of(tmp_path_factory.mktemp("sessions"), model) as client:
        yield client


def fed(model, text):
    return model.stream(tokenizer=TOKENIZER).feed(text)


def exported(client, model, session, **params):
    response = client.get(f"/v1/sessions/{session}/export", params=params)
    assert response.status_code == 200
    return Stream.from_bytes(model, response.content)


def feed(client, session, text, **options):
    return client.post(f"/v1/sessions/{session}/documents", content=text.encode(), **options)


def test_a_new_session_has_read_nothing(client):
    made = client.post("/v1/sessions", json={"id": "mine", "ttl": 60, "metadata": {"topic": "cats"}})
    assert made.status_code == 201
    shown = client.get("/v1/sessions/mine").json()
    assert shown == made.json()
    assert (shown["object"], shown["version"], shown["tokens_seen"], shown["metadata"]) == (
        "session", 0, 0, {"topic": "cats"},
    )  # fmt: skip
    assert shown["expires"] == pytest.approx(shown["created"] + 60)
    assert "tenant" not in shown
    refused(client.post("/v1/sessions", json={"id": "mine"}), 400, param="session_id")
    refused(client.get("/v1/sessions/mine/export"), 400)


def test_lists_have_pages(tmp_path, model):
    with client_of(tmp_path, model) as client:
        made = [new_session(client) for _ in range(5)]
        first = client.get("/v1/sessions", params={"limit": 2}).json()
        rest = client.get("/v1/sessions", params={"limit": 3, "after": first["data"][-1]["id"]}).json()
        assert [s["id"] for s in first["data"] + rest["data"]] == made[::-1]
        assert (first["has_more"], rest["has_more"]) == (True, False)
        for limit in (0, -1, 1001):
            refused(client.get("/v1/sessions", params={"limit": limit}), 400, param="limit")
        refused(client.get("/v1/sessions", params={"after": "nobody"}), 400, param="after")


def test_a_document_is_read_whole_and_is_one_commit(client, model):
    session, text = new_session(client), "w5 w6 w7 w8\n" * 40
    response = feed(client, session, text)
    body = response.json()
    assert response.status_code == 200
    assert (body["tokens_read"], body["bytes_read"], body["session"]["version"]) == (160, len(text), 1)
    assert exported(client, model, session).to_bytes() == fed(model, text).to_bytes()
    # Then it can be asked.
    expected = fed(model, text).generate([[9, 10]], return_ids=True, max_new_tokens=4, do_sample=False)
    assert ids(complete(client, [9, 10], session=session)) == expected


def test_a_form_with_a_file_and_events_are_the_same(client, model):
    session, text = new_session(client), "w5 w6 w7 w8\n" * 30
    url = f"/v1/sessions/{session}/documents"
    parts = {"note": (None, b"w9 w9"), "file": ("a.txt", text.encode())}
    response = client.post(url, files=parts, headers={"Accept": "text/event-stream"})
    last = events_of(response)[-1]
    assert (last["object"], last["tokens_read"], last["session"]["version"]) == ("document", 120, 1)
    assert exported(client, model, session).to_bytes() == fed(model, text).to_bytes()


def test_a_bad_document_changes_nothing(client):
    session = new_session(client)
    feed(client, session, "w5 w6")
    url = f"/v1/sessions/{session}/documents"
    for content in (b"", b"  \n ", b"w5 \xff w6", b"w5 \xe4"):
        refused(client.post(url, content=content), 400)
    streamed = client.post(url, content=b"w5 \xff", headers={"Accept": "text/event-stream"})
    assert '"error"' in streamed.text
    assert "[DONE]" not in streamed.text
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for content in (b"", b"--x\r\n", b"nonsense", b"--x--\r\n"):
        refused(client.post(url, content=content, headers=form), 400)
    refused(client.post(url, files=[("a", ("a", b"w5")), ("b", ("b", b"w6"))]), 400)
    refused(client.post(url, content=b"w5", headers={"Content-Type": "multipart/form-data"}), 400)
    refused(client.post(url, content=b"w5", headers={"Content-Type": "application/pdf"}), 400)
    refused(client.post(url, content=b"w5", headers={"Content-Type": "text/plain; charset=latin-1"}), 400)
    assert client.get(f"/v1/sessions/{session}").json()["version"] == 1


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_pieces_join_to_the_document_however_its_bytes_come(size):
    text = "\ufeff" + "grüße 你好\n" * 20 + "ä" * 3000 + "\n" + "word " * (PIECE // 2)
    data, pieces, found = text.encode(), Pieces(), []
    for i in range(0, len(data), size):
        found += pieces.add(data[i : i + size])
    found.append(pieces.end())
    assert "".join(found) == text.removeprefix("\ufeff")
    assert len(found) > 2
    assert all(piece.endswith("\n") or following.startswith(" ") for piece, following in zip(found, found[1:]))  # noqa: B905, RUF007


def test_a_fork_goes_its_own_way(client, model):
    session = new_session(client)
    complete(client, [5, 9, 12], session=session)
    complete(client, [20, 21], session=session)
    twin = client.post(f"/v1/sessions/{session}/fork", json={"id": "twin"}).json()
    old = client.post(f"/v1/sessions/{session}/fork", json={"version": 1}).json()
    assert twin["parent"] == old["parent"] == session
    assert ids(complete(client, [30], session="twin")) == ids(complete(client, [30], session=session))
    stream = model.stream()
    stream.generate([[5, 9, 12]], return_ids=True, max_new_tokens=4, do_sample=False)
    expected = stream.generate([[30]], return_ids=True, max_new_tokens=4, do_sample=False)
    assert ids(complete(client, [30], session=old["id"])) == expected
    refused(client.post(f"/v1/sessions/{session}/fork", json={"version": 99}), 400, param="version")
    refused(client.post(f"/v1/sessions/{session}/fork", json={"id": "twin"}), 400, param="session_id")


def test_rollback_goes_back_and_loses_nothing(client):
    session = new_session(client)
    complete(client, [5, 9, 12], session=session)
    second = ids(complete(client, [20, 21], session=session))
    back = client.post(f"/v1/sessions/{session}/rollback", json={"version": 1}).json()
    assert (back["version"], back["tokens_seen"]) == (3, 7)
    assert ids(complete(client, [20, 21], session=session)) == second
    commits = client.get(f"/v1/sessions/{session}/commits").json()["data"]
    assert [c["version"] for c in commits] == [4, 3, 2, 1]
    assert [c["note"] for c in commits] == ["completion", "rollback to 1", "completion", "completion"]
    refused(client.post(f"/v1/sessions/{session}/rollback", json={"version": 99}), 400, param="version")


def test_an_exported_session_can_be_imported_and_read_by_a_local_stream(client, model):
    session = new_session(client)
    complete(client, [5, 9, 12], session=session)
    data = client.get(f"/v1/sessions/{session}/export")
    assert data.headers["content-disposition"] == f'attachment; filename="{session}.mnemic"'
    expected = Stream.from_bytes(model, data.content).generate(
        [[30]], return_ids=True, max_new_tokens=4, do_sample=False
    )
    made = client.post("/v1/sessions/import", params={"id": "copy"}, content=data.content)
    assert made.status_code == 201
    assert made.json()["tokens_seen"] == 7
    assert ids(complete(client, [30], session="copy")) == expected


def test_deleted_is_deleted(client, tmp_path):
    session = new_session(client)
    complete(client, [5], session=session)
    assert client.delete(f"/v1/sessions/{session}").json()["deleted"]
    for call in (
        client.get(f"/v1/sessions/{session}"),
        client.delete(f"/v1/sessions/{session}"),
        client.get(f"/v1/sessions/{session}/commits"),
        client.get(f"/v1/sessions/{session}/export"),
        client.post(f"/v1/sessions/{session}/fork"),
        client.post(f"/v1/sessions/{session}/rollback", json={"version": 1}),
        feed(client, session, "w5"),
        complete(client, [5], session=session),
    ):
        refused(call, 404, "session_not_found")


def test_sessions_expire(tmp_path, model, monkeypatch):
    monkeypatch.setattr("mnemic.serving.server.SWEEP_SECONDS", 0.05)
    with client_of(tmp_path, model, ttl=0.2) as client:
        kept = new_session(client, ttl=600)
        gone = new_session(client)
        until = time.monotonic() + 10
        while client.get(f"/v1/sessions/{gone}").status_code == 200:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert client.get(f"/v1/sessions/{kept}").status_code == 200


def test_two_writers_never_mix(client, model):
    session, results = new_session(client), []

    def write(prompt):
        results.append((prompt, ids(complete(client, prompt, session=session))))

    writers = [threading.Thread(target=write, args=([5 + i, 6],)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stream = model.stream()
    # Some order of whole turns explains what all of them got.
    for prompt, found in results:
        assert found == stream.generate([prompt], return_ids=True, max_new_tokens=4, do_sample=False)
    assert client.get(f"/v1/sessions/{session}").json()["version"] == 4


def test_a_writer_that_waits_too_long_gets_409(tmp_path, model):
    store = open_store(tmp_path / "store")
    with client_of(tmp_path, model, store=store, wait=0.1) as client:
        session = new_session(client)
        lease = store.acquire("default", session, "another server", 60)
        refused(complete(client, [5], session=session), 409, "session_busy")
        store.release(lease)
        assert complete(client, [5], session=session).status_code == 200


def test_a_store_that_fails_is_503_and_loses_nothing(tmp_path, model, monkeypatch):
    store = open_store(tmp_path / "store")
    with client_of(tmp_path, model, store=store) as client:
        session = new_session(client)
        complete(client, [5, 9], session=session)
        expected = ids(complete(client, [7], session=client.post(f"/v1/sessions/{session}/fork").json()["id"]))

        def full(*args, **options):
            raise StoreUnavailable("The disk is full.")

        with monkeypatch.context() as patched:
            patched.setattr(store, "commit", full)
            refused(complete(client, [7], session=session), 503, "store_unavailable")
            # The status of a stream was sent long before; it ends with the error instead of [DONE].
            streamed = complete(client, [7], session=session, stream=True)
            assert '"store_unavailable"' in streamed.text
            assert "[DONE]" not in streamed.text
            assert '"finish_reason":"length"' not in streamed.text
        with monkeypatch.context() as patched:
            patched.setattr(store, "usage", full)
            assert client.get("/ready").status_code == 503
        assert client.get("/ready").status_code == 200
        assert ids(complete(client, [7], session=session)) == expected
