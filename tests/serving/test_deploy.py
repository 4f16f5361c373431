"""The files in deploy/: what they name exists, and what they set fits together."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from mnemic.core.errors import ConfigError
from mnemic.serving.auth import Tenant, new_key
from mnemic.serving.config import Settings
from mnemic.serving.requests import Limits
from tests.serving.http_tests import TOKENIZER, app_of
from tests.serving.serving_models import served_model

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def flags_exist(arguments):
    from typer.main import get_command

    from mnemic.cli import app

    known = {flag for parameter in get_command(app).commands["serve"].params for flag in parameter.opts}
    asked = {argument for argument in arguments if argument.startswith("--")}
    assert asked <= known, asked - known


def seconds(text):
    return float(re.fullmatch(r"(\d+)s?", str(text)).group(1))


def test_the_example_settings_are_settings(tmp_path):
    text = (DEPLOY / "serve.toml").read_text()
    given = Settings.read(DEPLOY / "serve.toml")
    assert given.limits == Limits()
    # And so is what stands in comments, with a key.
    whole = re.sub(r"^#(?=[a-z\[])", "", text, flags=re.M).replace("HASH", new_key()[1])
    (tmp_path / "whole.toml").write_text(whole)
    table = tomllib.loads(whole)
    read = Settings.read(tmp_path / "whole.toml")
    assert set(table) == {f.name for f in fields(Settings)}
    assert set(table["limits"]) == {f.name for f in fields(Limits)}
    assert set(table["tenants"]["alice"]) == {f.name for f in fields(Tenant)} - {"name"}
    for kind, values in ((Settings, read), (Limits, read.limits)):
        for f in fields(kind):
            line = re.search(rf"^#{f.name} = .*", text, flags=re.M)
            if f.name == "name" or line is None or "example" in line.group().lower() or f.default is MISSING:
                continue
            assert getattr(values, f.name) == f.default, f.name


def test_the_unit(tmp_path):
    text = (DEPLOY / "mnemic.service").read_text()
    assert seconds(re.search(r"^TimeoutStopSec=(.*)", text, flags=re.M).group(1)) > Settings.shutdown_seconds + 10
    command = shlex.split(re.search(r"^ExecStart=(.*)", text, flags=re.M).group(1))
    assert command[1] == "serve"
    flags_exist(command)
    # The store of the example is the folder that the unit makes.
    folder = re.search(r"^StateDirectory=(.*)", text, flags=re.M).group(1)
    assert Settings.read(DEPLOY / "serve.toml").store == f"/var/lib/{folder}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path):
    unit = tmp_path / "mnemic.service"
    unit.write_text((DEPLOY / "mnemic.service").read_text().replace("/opt/mnemic/bin/mnemic", sys.executable))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")
    # In tenths of systemd's scale from 0, closed, to 10.
    strict = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]
    rated = subprocess.run(strict, capture_output=True, text=True, timeout=60)
    assert rated.returncode == 0, rated.stdout[-500:]


def test_the_image():
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    sent = {line.removeprefix("!") for line in (DEPLOY / "Dockerfile.dockerignore").read_text().split() if "!" in line}
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.*)", text, flags=re.M):
        copied |= set(line.split()[:-1])
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    # What the build of the package reads.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", project["readme"], *project["license-files"]} <= copied
    (extras,) = re.findall(r"'\.\[(.*)\]'", text)
    assert set(extras.split(",")) <= set(EXTRAS)
    least = project["requires-python"].removeprefix(">=")
    assert {tuple(map(int, v.split("."))) for v in re.findall(r"^FROM python:([\d.]+)", text, flags=re.M)} == {
        tuple(map(int, least.split(".")))
    }
    command = [
        part for word in ("ENTRYPOINT", "CMD") for part in json.loads(re.search(rf"^{word} (.*)", text, re.M)[1])
    ]
    assert command[:2] == ["mnemic", "serve"]
    flags_exist(command)
    asked = re.search(r"127\.0\.0\.1:(\d+)(/\w+)", text)
    assert int(asked[1]) == Settings.port
    assert re.search(r"^USER (?!root)", text, flags=re.M)


def test_the_services():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    replicas = [name for name, service in services["services"].items() if service.get("image") == "mnemic"]
    assert len(replicas) == 2
    for name, service in services["services"].items():
        assert set(service.get("depends_on", ())) <= set(services["services"]), name
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).is_file(), source
            elif not source.startswith("${"):
                assert source in services["volumes"], source
    one = services["services"][replicas[0]]
    assert (DEPLOY / one["build"]["context"] / one["build"]["dockerfile"]).is_file()
    assert seconds(one["stop_grace_period"]) > Settings.shutdown_seconds + 10
    flags_exist(one["command"])
    places = {f"{name}:{Settings.port}" for name in replicas}
    assert set(services["services"]["caddy"]["environment"]["REPLICAS"].split()) == places
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert set(job["static_configs"][0]["targets"]) == places
    mounted = [
        volume.rpartition(":ro")[0].rpartition(":")[2] for volume in services["services"]["prometheus"]["volumes"]
    ]
    assert job["authorization"]["credentials_file"] in mounted


def test_the_balancer_asks_for_what_there_is(tmp_path):
    text = (DEPLOY / "Caddyfile").read_text()
    app = app_of(tmp_path, served_model())
    paths = set(app.openapi()["paths"])
    app.state.server.store.close()
    assert re.search(r"health_uri (\S+)", text)[1] in paths
    closed = re.search(r"@inside path (.*)", text)[1].split()
    assert set(closed) == {path for path in paths if not path.startswith("/v1/")}
    # A stream must not wait for more of it.
    assert re.search(r"^\s*flush_interval -1$", text, flags=re.M)


@pytest.mark.skipif(shutil.which("caddy") is None, reason="caddy is not installed")
def test_caddy_takes_its_file():
    command = ["caddy", "adapt", "--validate", "--adapter", "caddyfile", "--config", DEPLOY / "Caddyfile"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr


class FakeServe(types.ModuleType):
    """Of ray.serve what the application uses."""

    def __init__(self):
        super().__init__("ray.serve")

    def ingress(self, build):
        return lambda: build

    def deployment(self, build, **options):
        return types.SimpleNamespace(bind=lambda: (build, options))


def test_the_application_for_ray(tmp_path, monkeypatch):
    from mnemic.hosts.saving import save
    from mnemic.serving.store import open_store

    ray = types.ModuleType("ray")
    ray.serve = FakeServe()
    monkeypatch.setitem(sys.modules, "ray", ray)
    # A store in a folder in place of the database.
    opened = []
    monkeypatch.setattr(
        "mnemic.serving.store.open_store", lambda url, **o: opened.append(url) or open_store(tmp_path / "s", **o)
    )
    application = runpy.run_path(str(DEPLOY / "ray_serve.py"))["application"]
    save(served_model(), tmp_path / "tiny", whole=True)
    TOKENIZER.save_pretrained(tmp_path / "tiny")
    key, hashed = new_key()
    tenants, url = f"[tenants.alice]\nkeys = ['{hashed}']\n", "postgresql://mnemic@db/mnemic"
    file = tmp_path / "serve.toml"
    given = {"model": str(tmp_path / "tiny"), "settings": str(file), "replicas": "3"}
    for text, reason in ((tenants, "store"), (f"store = '{url}'\n", "tenants")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            application(given)
    file.write_text(f"name = 'tiny'\nshutdown_seconds = 7\nstore = '{url}'\n{tenants}")
    with pytest.raises(ConfigError, match="replica"):
        application({**given, "replica": "3"})
    build, options = application(given)
    assert options["num_replicas"] == 3
    assert options["graceful_shutdown_timeout_s"] > 7 + 10

    from fastapi.testclient import TestClient

    with TestClient(build()) as client:
        assert client.get("/ready").json()["status"] == "ok"
        assert client.get("/v1/models").status_code == 401
        found = client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).json()
        assert (found["data"][0]["id"], found["data"][0]["chat"]) == ("tiny", True)
    assert opened == [url]
