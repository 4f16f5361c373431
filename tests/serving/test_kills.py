"""A server that is killed under load: every turn that it answered is there afterwards, and no session is mixed."""

import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.serving.serving_models import served_model

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

KILLS, SESSIONS = 4, 4
SERVER = """
import sys
from pathlib import Path
import torch, uvicorn
torch.set_num_threads(1)
from tests.serving.http_tests import app_of

class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)

Server(uvicorn.Config(app_of(Path(sys.argv[1])), port=0, log_level="error")).run()
"""


class Killable:
    def __init__(self, folder):
        root = Path(__file__).parents[2]
        paths = f"import sys; sys.path[:0] = [{str(root / 'src')!r}, {str(root)!r}]\n"
        command = [sys.executable, "-c", paths + SERVER, str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server did not start"
        self.port = int(line)

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def kill(self, how=signal.SIGKILL):
        self.process.send_signal(how)
        self.process.wait(30)
        self.process.stdout.close()


def turn(server, session, prompt):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    status, answer = server.call("POST", "/v1/completions", {**body, "metadata": {"session": session}})
    assert status == 200, answer
    return answer["choices"][0]["token_ids"], answer["session"]


def talk(server, session, read, draw, killed):
    """Turns until the server is gone; read: (prompt, tokens, version) of each, None without an answer."""
    while not killed.is_set():
        prompt = [draw.randrange(3, 61) for _ in range(draw.randint(1, 9))]
        try:
            tokens, record = turn(server, session, prompt)
        except (OSError, http.client.HTTPException, ValueError):
            read.append((prompt, None, None))
            return
        read.append((prompt, tokens, record["version"]))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_answered_turn_survives_kill_9(tmp_path):
    model, draw = served_model(), random.Random(7)
    names = [f"s{i}" for i in range(SESSIONS)]
    streams = {name: model.stream() for name in names}
    read = {name: [] for name in names}
    checked = dict.fromkeys(names, 0)
    for round_ in range(KILLS + 1):
        server, killed = Killable(tmp_path), threading.Event()
        try:
            for name in names:
                if round_ == 0:
                    assert server.call("POST", "/v1/sessions", {"id": name})[0] == 201
                version = server.call("GET", f"/v1/sessions/{name}")[1]["version"]
                # The last turn may have been stored without its answer getting through; no answered one is missing.
                turns = read[name][checked[name] :]
                if turns and turns[-1][1] is None and version < checked_version(read[name]) + 1:
                    read[name].pop()
                    turns = turns[:-1]
                for prompt, tokens, _ in turns:
                    expected = streams[name].generate([prompt], return_ids=True, max_new_tokens=3, do_sample=False)
                    assert tokens is None or tokens == expected
                checked[name] = len(read[name])
                assert version == len(read[name])
                # What was stored is what was read.
                tokens, _ = turn(server, name, [9, 8, 7])
                expected = streams[name].generate([[9, 8, 7]], return_ids=True, max_new_tokens=3, do_sample=False)
                assert tokens == expected
                read[name].append(([9, 8, 7], tokens, version + 1))
                checked[name] += 1
            if round_ == KILLS:
                break
            talking = [
                threading.Thread(target=talk, args=(server, name, read[name], random.Random(draw.random()), killed))
                for name in names
            ]
            for thread in talking:
                thread.start()
            time.sleep(draw.uniform(0.3, 1.5))
            server.kill()
            killed.set()
            for thread in talking:
                thread.join()
        finally:
            if server.process.poll() is None:
                server.kill()
    answered = sum(tokens is not None for turns in read.values() for _, tokens, _ in turns)
    # More than those that were made to check.
    assert answered > 2 * SESSIONS * KILLS


def checked_version(turns):
    return max((version for _, _, version in turns if version is not None), default=0)


@pytest.mark.slow
def test_a_server_that_is_asked_to_end_ends(tmp_path):
    server = Killable(tmp_path)
    server.call("POST", "/v1/sessions", {"id": "s"})
    _, record = turn(server, "s", [5, 9])
    server.kill(signal.SIGTERM)
    assert server.process.returncode in (0, -signal.SIGTERM)
    again = Killable(tmp_path)
    assert again.call("GET", "/v1/sessions/s")[1]["version"] == record["version"] == 1
    again.kill(signal.SIGTERM)
