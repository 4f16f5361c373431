"""A server that is killed under load: every turn that it answered is there afterwards, and no session is mixed.

MNEMIC_KILLS=100 pytest tests/serving/test_kills.py -m slow -s
"""

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.store_cases import url_of

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
from tests.serving.forked_servers import ForkedServer
from tests.serving.talking import Client, local_model

KILLS, SESSIONS = int(os.environ.get("MNEMIC_KILLS", "4")), 4
LEASE = 2.0
"""Seconds. Of a server in PostgreSQL that was killed; a new one waits for it."""


def talk(client, server, killed):
    while not killed.is_set() and client.turn(server):
        pass


@pytest.mark.slow
@pytest.mark.timeout(120 + 20 * KILLS)
@pytest.mark.parametrize("kind", ["embedded", "postgres"])
def test_every_answered_turn_survives_kill_9(kind, tmp_path):
    model, draw, url = local_model(), random.Random(7), url_of(kind, tmp_path)
    clients = [Client(model, f"s{i}", seed=i) for i in range(SESSIONS)]
    began, unanswered = time.monotonic(), 0
    with ThreadPoolExecutor(SESSIONS) as threads:
        for round_ in range(KILLS + 1):
            server, killed = ForkedServer(tmp_path / "server", url, name="tiny", lease=LEASE), threading.Event()
            try:
                for client in clients if round_ == 0 else ():
                    assert server.call("POST", "/v1/sessions", {"id": client.session})[0] == 201
                unanswered += sum(bool(c.told) and c.told[-1].version is None for c in clients)
                # All at once, since each may wait for a lease.
                states = list(threads.map(Client.settle, clients, [server] * SESSIONS))
                for client, state in zip(clients, states, strict=True):
                    client.check(state)
                print(f"\r{kind}: {round_} kills", end="", flush=True)
                if round_ == KILLS:
                    break
                talking = [threads.submit(talk, client, server, killed) for client in clients]
                time.sleep(draw.uniform(0.05, 0.8))
                server.kill()
                killed.set()
                for one in talking:
                    one.result()
            finally:
                killed.set()
                server.kill()
    answered = sum(client.answered for client in clients)
    print(
        f"\n{kind}: {KILLS} kills in {time.monotonic() - began:.0f} s, {answered} turns answered and all there, "
        f"{unanswered} cut off by a kill"
    )
    # More than those that were made to check, and kills that hit turns.
    assert answered > (KILLS + 1) * SESSIONS
    assert unanswered > KILLS


@pytest.mark.slow
def test_a_server_that_is_asked_to_end_ends(tmp_path):
    client, store = Client(local_model(), "s", seed=1), str(tmp_path / "store")
    server = ForkedServer(tmp_path / "first", store, name="tiny")
    server.call("POST", "/v1/sessions", {"id": "s"})
    assert client.turn(server)
    server.kill(signal.SIGTERM)
    again = ForkedServer(tmp_path / "second", store, name="tiny")
    client.check(client.settle(again))
    again.kill(signal.SIGTERM)
