"""Keys, tenants and quotas: nobody sees or touches what is another's."""

import random
import threading

import pytest

from mnemic.core.errors import ConfigError
from mnemic.serving.auth import Tenant, hash_of, new_key
from mnemic.serving.config import Settings
from tests.serving.http_tests import client_of, complete, new_session, refused
from tests.serving.serving_models import served_model

KEYS = {name: new_key()[0] for name in ("alice", "bob", "carol")}


def tenant(name, **quota):
    return Tenant(name=name, keys=[hash_of(KEYS[name])], **quota)


TENANTS = {
    "alice": tenant("alice"),
    "bob": tenant("bob", max_sessions=2, max_running=1),
    "carol": tenant("carol", max_bytes=1),
}


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    with client_of(tmp_path_factory.mktemp("auth"), model, tenants=TENANTS) as client:
        yield client


class As:
    """The client with a key."""

    def __init__(self, client, key):
        self.client, self.key = client, key

    def __getattr__(self, method):
        def call(path, **options):
            headers = {"Authorization": f"Bearer {self.key}", **options.pop("headers", {})}
            return getattr(self.client, method)(path, headers=headers, **options)

        return call


def calls(client, session):
    """Everything that can be asked of a session."""
    return [
        client.get(f"/v1/sessions/{session}"),
        client.get(f"/v1/sessions/{session}/commits"),
        client.get(f"/v1/sessions/{session}/export"),
        client.get(f"/v1/sessions/{session}/memory"),
        client.post(f"/v1/sessions/{session}/fork"),
        client.post(f"/v1/sessions/{session}/rollback", json={"version": 1}),
        client.post(f"/v1/sessions/{session}/documents", content=b"w5"),
        client.delete(f"/v1/sessions/{session}"),
        complete(client, [5], session=session),
        complete(client, [5], session=session, stream=True),
        client.post(
            "/v1/chat/completions",
            json={"model": "tiny", "messages": [{"role": "user", "content": "w5"}], "metadata": {"session": session}},
        ),
    ]


def test_without_a_known_key_there_is_nothing(client):
    for headers in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": f"Basic {KEYS['alice']}"},
        {"Authorization": f"Bearer {KEYS['alice']}x"},
        # The hash itself is no key.
        {"Authorization": f"Bearer {hash_of(KEYS['alice'])}"},
        {"Authorization": b"Bearer \xff\xfe"},
    ):
        for path in ("/v1/models", "/v1/sessions", "/v1/sessions/x", "/v1/sessions/x/export"):
            response = client.get(path, headers=headers)
            refused(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        refused(client.post("/v1/completions", json={"model": "tiny", "prompt": [5]}, headers=headers), 401)
    assert client.get("/health").status_code == 200


def test_another_tenants_session_does_not_exist(client):
    alice, bob = As(client, KEYS["alice"]), As(client, KEYS["bob"])
    session = new_session(alice)
    complete(alice, [5, 9], session=session)
    before = alice.get(f"/v1/sessions/{session}").json()
    # Word for word what is said of a session that never was.
    for other, never in zip(calls(bob, session), calls(bob, "f" * 32), strict=True):
        assert refused(other, 404, "session_not_found") == refused(never, 404).replace("f" * 32, session)
    assert alice.get(f"/v1/sessions/{session}").json() == before
    assert bob.get("/v1/sessions").json()["data"] == []
    refused(bob.get("/v1/sessions", params={"after": session}), 400)
    # The same id is free for others.
    assert new_session(bob, id=session) == session
    assert alice.get(f"/v1/sessions/{session}").json() == before
    assert bob.delete(f"/v1/sessions/{session}").status_code == 200


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_random_calls_of_random_tenants_leak_nothing(client, count):
    draw = random.Random(5)
    people = {name: As(client, KEYS[name]) for name in ("alice", "bob")}
    strangers = [As(client, key) for key in ("", "x", KEYS["alice"][:-1], KEYS["bob"].upper(), hash_of(KEYS["bob"]))]
    own = {name: {new_session(someone)} for name, someone in people.items()}
    for someone, sessions in ((people[name], own[name]) for name in people):
        complete(someone, [5], session=next(iter(sessions)))
    calls = [
        lambda s, p: p.get(f"/v1/sessions/{s}"),
        lambda s, p: p.get(f"/v1/sessions/{s}/commits"),
        lambda s, p: p.get(f"/v1/sessions/{s}/export"),
        lambda s, p: p.post(f"/v1/sessions/{s}/rollback", json={"version": 99}),
        lambda s, p: p.get(f"/v1/sessions/{s}/export", params={"version": 98}),
        lambda s, p: p.post(f"/v1/sessions/{s}/fork", json={"version": 97}),
        lambda s, p: p.post(f"/v1/sessions/{s}/documents", content=b"\xff"),
        lambda s, p: complete(p, [99], session=s),
    ]
    for _ in range(count):
        name, owner = draw.choice(list(people)), draw.choice(list(people))
        session = draw.choice(sorted(own[owner]))
        if draw.random() < 0.2:
            refused(draw.choice(calls)(session, draw.choice(strangers)), 401)
            continue
        guessed = draw.random() < 0.2
        session = session[:-1] + draw.choice("0123456789abcdef") if guessed else session
        response = draw.choice(calls)(session, people[name])
        assert (response.status_code == 404) == (session not in own[name]), response.text
        listed = {s["id"] for s in people[name].get("/v1/sessions", params={"limit": 1000}).json()["data"]}
        assert own[name] <= listed
        assert not listed & own["bob" if name == "alice" else "alice"]
    for name, sessions in own.items():
        for session in sessions:
            assert people[name].get(f"/v1/sessions/{session}").json()["version"] == 1
            people[name].delete(f"/v1/sessions/{session}")


def test_quotas_of_sessions_and_bytes(client):
    bob, carol = As(client, KEYS["bob"]), As(client, KEYS["carol"])
    first = new_session(bob)
    new_session(bob)
    for full in (
        bob.post("/v1/sessions"),
        bob.post(f"/v1/sessions/{first}/fork"),
        bob.post("/v1/sessions/import", content=b"x"),
    ):
        refused(full, 429, "quota_exceeded")
    bob.delete(f"/v1/sessions/{first}")
    new_session(bob)
    session = new_session(carol)
    assert complete(carol, [5], session=session).status_code == 200
    refused(complete(carol, [5], session=session), 429, "quota_exceeded")
    refused(carol.post(f"/v1/sessions/{session}/documents", content=b"w5"), 429, "quota_exceeded")
    # What keeps nothing is not refused.
    assert complete(carol, [5]).status_code == 200


def test_a_tenant_runs_only_so_many_requests_at_once(client):
    bob, alice = As(client, KEYS["bob"]), As(client, KEYS["alice"])
    running = threading.Thread(target=complete, args=(bob, [5], 400))
    running.start()
    engine = client.app.state.server.engine
    while not engine.stats().decoding:
        assert running.is_alive()
    response = complete(bob, [5])
    assert refused(response, 429, "overloaded")
    assert response.headers["retry-after"] == "1"
    assert complete(alice, [5]).status_code == 200
    running.join()
    assert complete(bob, [5]).status_code == 200


def test_what_tenants_do_is_written_down(client):
    alice = As(client, KEYS["alice"])
    session = new_session(alice)
    alice.post(f"/v1/sessions/{session}/documents", content=b"w5 w6")
    twin = alice.post(f"/v1/sessions/{session}/fork").json()["id"]
    alice.delete(f"/v1/sessions/{session}")
    entries = client.app.state.server.store.audited("alice", limit=4)
    assert [(e.action, e.session_id) for e in entries] == [
        ("delete", session), ("fork", twin), ("document", session), ("create", session),
    ]  # fmt: skip
    assert not any("w5" in e.detail for e in entries)


def test_settings_are_read_and_checked(tmp_path):
    file = tmp_path / "server.toml"
    key = hash_of("x")
    file.write_text(f'port = 9\nwait = 3\n[limits]\nmax_rows = 5\n[tenants.a]\nkeys = ["{key}"]\nmax_sessions = 2\n')
    settings = Settings.read(file, port=10, name=None)
    assert (settings.port, settings.wait, settings.limits.max_rows, settings.name) == (10, 3, 5, "mnemic")
    assert settings.tenants["a"] == Tenant(name="a", keys=[key], max_sessions=2)
    for text in (
        "prt = 9",
        'port = "9"',
        "port = true",
        "port = 70000",
        "wait = -1",
        "lease = 0",
        'durability = "some"',
        "limits = 3",
        "[limits]\nrows = 3",
        "[limits]\nmax_rows = 0",
        "[tenants]\na = 3",
        '[tenants.a]\nkeys = ["short"]',
        f'[tenants.a]\nkeys = ["{key}"]\nmax_sessions = 0',
        f'[tenants."a b"]\nkeys = ["{key}"]',
        "nonsense",
    ):
        file.write_text(text)
        with pytest.raises(ConfigError):
            Settings.read(file)


def test_keys_are_one_tenants_and_tenants_have_keys(tmp_path, model):
    key = hash_of("x")
    for tenants in (
        {"a": Tenant(name="a", keys=[key]), "b": Tenant(name="b", keys=[key])},
        {"a": Tenant(name="a")},
    ):
        with pytest.raises(ConfigError), client_of(tmp_path, model, tenants=tenants):
            pass
