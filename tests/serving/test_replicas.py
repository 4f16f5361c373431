"""Two servers on one PostgreSQL: sessions move between them under load, and when one is killed the other goes on."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.store_cases import new_schema

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
from tests.serving.forked_servers import ForkedServer, prepare
from tests.serving.talking import Client, local_model

LEASE = 2.0
"""Seconds after which the other server takes over a session whose server is gone."""


@pytest.fixture
def replicas(tmp_path):
    # Meanwhile PostgreSQL starts.
    prepare()
    url = new_schema()
    both = [ForkedServer(tmp_path / name, url, name="tiny", lease=LEASE) for name in ("one", "two")]
    yield both
    for server in both:
        server.kill()


def new_clients(server, count):
    model = local_model()
    clients = [Client(model, f"s{i}", seed=i) for i in range(count)]
    for client in clients:
        assert server.call("POST", "/v1/sessions", {"id": client.session})[0] == 201
    return clients


def check(threads, clients, server):
    states = list(threads.map(Client.settle, clients, [server] * len(clients)))
    for client, state in zip(clients, states, strict=True):
        client.check(state)


@pytest.mark.parametrize(
    "sessions, turns", [(3, 6), pytest.param(16, 40, marks=[pytest.mark.slow, pytest.mark.timeout(400)])]
)
def test_sessions_move_between_replicas_under_load(replicas, sessions, turns):
    clients = new_clients(replicas[0], sessions)

    def talk(client):
        draw = random.Random(client.session)
        for _ in range(turns):
            # Every answer is that of one local stream, wherever it was made.
            assert client.turn(draw.choice(replicas))

    with ThreadPoolExecutor(sessions) as threads:
        list(threads.map(talk, clients))
        check(threads, clients, replicas[1])
    # Each of them has read a good part.
    made = [server.call("GET", "/v1/sessions/s0")[1]["version"] for server in replicas]
    assert made == [clients[0].version] * 2
    assert all(client.answered >= turns for client in clients)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_the_other_goes_on(replicas, killed):
    clients, rest = new_clients(replicas[0], 12), replicas[1 - killed]
    dead, enough = threading.Event(), threading.Event()
    waited = []

    def talk(client):
        draw = random.Random(client.session)
        while not enough.is_set():
            server = rest if dead.is_set() else draw.choice(replicas)
            began = time.monotonic()
            if not client.turn(server):
                # Whether that one was stored shows in the version of the next.
                assert server is replicas[killed]
                dead.set()
                began = time.monotonic()
                assert client.turn(rest)
                waited.append(time.monotonic() - began)

    with ThreadPoolExecutor(len(clients)) as threads:
        talking = [threads.submit(talk, client) for client in clients]
        time.sleep(4)
        replicas[killed].kill()
        time.sleep(2 * LEASE)
        enough.set()
        for one in talking:
            one.result()
        check(threads, clients, rest)
    answered = sum(client.answered for client in clients)
    print(f"\n{answered} turns answered and all there; {len(waited)} cut off, and answered by the other after "
          f"{max(waited):.1f} s at most")  # fmt: skip
    assert waited
    # Sessions that the killed one held are there after its lease, long before clients give up.
    assert max(waited) < LEASE + 20
    assert answered > 4 * len(clients)
