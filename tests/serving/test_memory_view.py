"""What a session's memory looks like: right numbers for every memory, of one's own sessions, and no text."""

import json
import re

import pytest
import torch

from mnemic.core.state import State
from mnemic.serving import memory_view as module
from mnemic.serving.auth import Tenant, hash_of, new_key
from mnemic.serving.memory_view import memory_view
from mnemic.serving.store import open_store
from tests.contract.cases import CASES, attached, case
from tests.hosts.models import tiny_model
from tests.serving.http_tests import client_of, complete, new_session, refused
from tests.serving.serving_models import served_model
from tests.tiny import random_ids

EVERY = [c for c in CASES if c.usual and "llama" in c.hosts]
IDS = random_ids(1, 40)


def two(model, more=5):
    """A stream before and after it has read on."""
    before = model.stream().feed(IDS[:, :19])
    return before, before.fork().feed(IDS[:, 19 : 19 + more])


@pytest.mark.parametrize("c", EVERY, ids=lambda c: c.id)
def test_every_memory_has_one_that_json_can_hold_and_nothing_changes(c):
    model = attached(c)
    if model.memory.whole_segments:
        pytest.skip("reads whole segments only, and is not served")
    before, stream = two(model)
    held = stream.to_bytes()
    view = json.loads(json.dumps(memory_view(stream, before), allow_nan=False))
    assert stream.to_bytes() == held
    assert sum(view["bytes"].values()) == stream.state_bytes
    names = {*stream.state, *(f"buffers/{name}" for name in stream.cache.buffers)}
    assert {tensor["name"] for tensor in view["tensors"]} == names
    for tensor in view["tensors"]:
        # Whole numbers count, or stand for tokens.
        assert (tensor["norm"] is None) == ("float" not in tensor["dtype"])
    for found in view["maps"]:
        assert len(found["norms"]) == len(found["rows"])
        # Memories that grow have no earlier tensor of the same shape.
        assert found["changes"] is None or list(map(len, found["changes"])) == list(map(len, found["norms"]))


def test_norms_and_changes_are_those_of_the_slots():
    model = served_model("lm2", memory_scope="per_layer")
    before, stream = two(model)
    (found,) = memory_view(stream, before)["maps"]
    now, then = stream.state["bank"][0], before.state["bank"][0]
    norms = [[float(now[i, j].square().sum()) ** 0.5 for j in range(8)] for i in range(2)]
    changes = [[float((now[i, j] - then[i, j]).square().sum()) ** 0.5 for j in range(8)] for i in range(2)]
    assert (found["name"], found["rows"], found["each"], found["blocks"]) == ("bank", [0, 1], [1, 1], False)
    for seen, expected in ((found["norms"], norms), (found["changes"], changes)):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-5, atol=0)
    assert max(max(row) for row in changes) > 0
    (tensor,) = memory_view(stream, before)["tensors"]
    assert tensor["change"] == pytest.approx(sum(c * c for row in changes for c in row) ** 0.5, rel=1e-5)
    alone = memory_view(stream)
    assert alone["maps"][0]["changes"] is None
    assert alone["tensors"][0]["change"] is None


def test_tensors_of_blocks_are_joined():
    stream = served_model("gated-deltanet").stream().feed(IDS[:, :19])
    found = next(one for one in memory_view(stream)["maps"] if one["name"] == "matrix")
    expected = [[float(stream.state[f"{i}/matrix"][0, head].norm()) for head in range(4)] for i in range(2)]
    assert (found["rows"], found["blocks"]) == ([0, 1], True)
    torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(expected), rtol=1e-5, atol=0)


def test_many_rows_and_columns_are_drawn_together(monkeypatch):
    stream = served_model("lm2", memory_scope="per_layer").stream().feed(IDS[:, :21])
    whole = memory_view(stream)
    monkeypatch.setattr(module, "MOST_ROWS", 1)
    monkeypatch.setattr(module, "MOST_COLUMNS", 3)
    few = memory_view(stream)
    (norms,), squares = few["maps"][0]["norms"], torch.tensor(whole["maps"][0]["norms"]).square().sum(0)
    assert few["maps"][0]["each"] == [2, 3]
    assert few["maps"][0]["rows"] == [0]
    assert norms == pytest.approx([float(s.sum()) ** 0.5 for s in squares.split(3)], rel=1e-4)
    for one, joined in zip(whole["reads"], few["reads"], strict=True):
        assert joined["each"] == 3
        assert joined["shares"] == pytest.approx([sum(one["shares"][i : i + 3]) for i in (0, 3, 6)], abs=1e-5)


def test_gates_are_those_of_a_write_at_this_place():
    # The same weights, written after five tokens: what the host itself says of that write.
    model, early = tiny_model("lm2"), tiny_model("lm2", segment=5)
    view = memory_view(model.stream().feed(IDS[:, :5]))
    with torch.no_grad():
        output = early(IDS[:, :5], use_cache=False, memory_diagnostics=True)
    assert view["tokens_open"] == 5
    expected = {name: float(value) for name, value in output.memory_diagnostics.items()}
    assert view["diagnostics"] == pytest.approx(expected, rel=1e-4)
    assert {"block0/gate_in", "block1/gate_forget"} <= set(view["diagnostics"])


def test_reads_are_the_mean_attention_of_the_tokens_since_the_last_write():
    model = served_model("lm2")
    stream = model.stream().feed(IDS[:, :21])
    reads = memory_view(stream)["reads"]
    memory, bank = model.memory, stream.state["bank"][0, 0]
    for i, found in enumerate(reads):
        width, heads = 32 // 4, 4
        total = torch.zeros(8, dtype=torch.float64)
        keys = memory.prepare(State({"bank": bank[None, None]}))[f"{i}/keys"][0]
        for t in range(5):
            query = stream.cache.trace[i]["query"][0, t]
            for h in range(heads):
                scores = torch.stack([query[h * width : (h + 1) * width] @ keys[h, n] for n in range(8)]) / width**0.5
                total += scores.softmax(0) / (5 * heads)
        assert found["block"] == i
        assert found["shares"] == pytest.approx(total.tolist(), rel=1e-4)
        assert sum(found["shares"]) == pytest.approx(1, rel=1e-4)


def test_right_after_a_write_nothing_has_been_read():
    view = memory_view(served_model("lm2").stream().feed(IDS[:, :16]))
    assert (view["tokens_open"], view["reads"], view["diagnostics"]) == (0, [], {})


def test_a_memory_that_needs_a_whole_segment_tells_nothing_before():
    model = attached(case("lm2_identity_route"))
    view = memory_view(model.stream().feed(IDS[:, :5]))
    assert view["tokens_open"] == 5
    assert view["diagnostics"] == {}
    assert [len(one["shares"]) for one in view["reads"]] == [8, 8]


@pytest.fixture(scope="module")
def model():
    return served_model()


KEYS = {name: new_key()[0] for name in ("alice", "bob")}


def headers(name):
    return {"Authorization": f"Bearer {KEYS[name]}"}


def test_only_its_tenant_sees_it_and_sees_no_text(tmp_path, model):
    tenants = {name: Tenant(name=name, keys=[hash_of(key)]) for name, key in KEYS.items()}
    with client_of(tmp_path, model, tenants=tenants) as client:
        session = client.post("/v1/sessions", headers=headers("alice")).json()["id"]
        path, given = f"/v1/sessions/{session}/memory", {"headers": headers("alice")}
        empty = client.get(path, **given).json()
        assert (empty["version"], empty["compared_with"], empty["tokens_seen"]) == (0, None, 0)
        assert (empty["reads"], empty["diagnostics"]) == ([], {})
        client.post(f"/v1/sessions/{session}/documents", content=b"w51 w52 w53 w51 w57", **given)
        response = client.get(path, **given)
        assert response.status_code == 200
        assert (response.json()["version"], response.json()["compared_with"]) == (1, None)
        assert re.search(r"w5[1237]", response.text) is None
        refused(client.get(path), 401)
        others = refused(client.get(path, headers=headers("bob")), 404, "session_not_found")
        assert others == refused(client.get(path, headers=headers("bob")), 404)
        nobody = client.get("/v1/sessions/nobody/memory", headers=headers("bob"))
        assert refused(nobody, 404).replace("nobody", session) == others


def test_it_is_compared_with_the_commit_kept_before(tmp_path, model):
    with client_of(tmp_path, model, store=open_store(tmp_path / "two", keep=2)) as client:
        session = new_session(client)
        path = f"/v1/sessions/{session}/memory"
        seen = []
        for _ in range(3):
            complete(client, [5, 6, 7, 8, 9, 10], session=session)
            seen.append(client.get(path).json())
        assert [one["compared_with"] for one in seen] == [None, 1, 2]
        assert seen[2]["tensors"][0]["change"] > 0
        # Back to version 2, as version 4: compared with 3, and as far from it as that was from 2.
        assert client.post(f"/v1/sessions/{session}/rollback", json={"version": 2}).status_code == 200
        back = client.get(path).json()
        assert (back["version"], back["compared_with"]) == (4, 3)
        assert back["tensors"][0]["change"] == pytest.approx(seen[2]["tensors"][0]["change"])
        assert back["maps"][0]["norms"] == seen[1]["maps"][0]["norms"]
    with client_of(tmp_path, model, store=open_store(tmp_path / "one", keep=1)) as client:
        session = new_session(client)
        for _ in range(2):
            complete(client, [5, 6, 7], session=session)
        assert client.get(f"/v1/sessions/{session}/memory").json()["compared_with"] is None


def test_looking_takes_no_part_in_the_session(tmp_path, model):
    # States leave the memory of the machine at once, and are read from the store.
    with client_of(tmp_path, model, device_bytes=0, host_bytes=0) as client:
        session = new_session(client)
        complete(client, [5, 6, 7], session=session)
        before = client.get(f"/v1/sessions/{session}").json()
        export = client.get(f"/v1/sessions/{session}/export").content
        assert client.get(f"/v1/sessions/{session}/memory").status_code == 200
        assert client.get(f"/v1/sessions/{session}").json() == before
        assert client.get(f"/v1/sessions/{session}/export").content == export
