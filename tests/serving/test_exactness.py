"""A long session through the server, with everything that may happen to it, is one local stream."""

import random
import threading

import pytest

from mnemic.serving.requests import Limits
from tests.serving.http_tests import client_of, complete, ids, new_session
from tests.serving.serving_models import served_model

TURNS = 50


def turns(seed, count):
    draw = random.Random(seed)
    return [([draw.randrange(3, 61) for _ in range(draw.randint(1, 12))], draw.randint(1, 5)) for _ in range(count)]


def local(model, work):
    stream = model.stream()
    return [stream.generate([p], return_ids=True, max_new_tokens=n, do_sample=False) for p, n in work], stream


@pytest.mark.parametrize("memory", ["lm2", pytest.param("titans", marks=pytest.mark.slow)])
def test_fifty_turns_with_forks_restarts_and_spills_are_one_local_stream(memory, tmp_path):
    model, works = served_model(memory), [turns(1, TURNS), turns(2, 24)]
    expected = [local(model, work) for work in works]
    size = expected[0][1].state_bytes
    found = [[] for _ in works]
    names = []
    # Room for one state on the device and one or two in host memory.
    tight = {"device_bytes": size + 1000, "host_bytes": 2 * size + 60_000, "limits": Limits(prefill_chunk=5)}

    def talk(client, i, begin, end):
        draw, turns = random.Random(i), len(works[i])
        for prompt, count in works[i][int(begin * turns) : int(end * turns)]:
            if draw.random() < 0.2:
                # Go on with a twin; the one that was left reads something else.
                old, names[i] = names[i], client.post(f"/v1/sessions/{names[i]}/fork").json()["id"]
                complete(client, [60, 3, 60], 2, session=old)
            if draw.random() < 0.2:
                version = client.get(f"/v1/sessions/{names[i]}").json()["version"]
                complete(client, [4, 4], 3, session=names[i])
                if version:
                    client.post(f"/v1/sessions/{names[i]}/rollback", json={"version": version})
                else:
                    names[i] = new_session(client)
            found[i].append(ids(complete(client, prompt, count, session=names[i])))

    for begin, end in ((0, 0.4), (0.4, 0.7), (0.7, 1)):
        with client_of(tmp_path, model, **tight) as client:
            names = names or [new_session(client) for _ in works]
            talking = [threading.Thread(target=talk, args=(client, i, begin, end)) for i in range(len(works))]
            for thread in talking:
                thread.start()
            for thread in talking:
                thread.join()
            stats = client.app.state.server.manager.stats()
            assert stats.spilled > 0
            tokens = [client.get(f"/v1/sessions/{name}").json()["tokens_seen"] for name in names]
    assert found == [answers for answers, _ in expected]
    assert tokens == [stream.tokens_seen for _, stream in expected]
