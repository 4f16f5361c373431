"""Metrics and the log: what they hold, and what must never be in them."""

import importlib.util
import json
import logging
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from prometheus_client.parser import text_string_to_metric_families

from mnemic.core.errors import ConfigError, MissingExtraError
from mnemic.serving.auth import Tenant, new_key
from mnemic.serving.config import Settings
from mnemic.serving.errors import StoreUnavailable
from mnemic.serving.logging import Lines
from tests.serving.http_tests import app_of, client_of, complete, events_of, new_session, refused
from tests.serving.serving_models import served_model


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture
def lines():
    """What the log writes meanwhile; the handler's formatter can be changed."""

    class Kept(list, logging.Handler):
        def __init__(self):
            logging.Handler.__init__(self)
            self.setFormatter(Lines())

        def emit(self, record):
            self.append(json.loads(self.format(record)))

        __hash__ = object.__hash__

        def requests(self):
            return [line for line in self if line["message"] == "request"]

    kept, logger = Kept(), logging.getLogger("mnemic")
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    yield kept
    logger.removeHandler(kept)
    logger.setLevel(level)


def read(client, **given):
    """Samples by name and labels."""
    response = client.get("/metrics", **given)
    assert response.status_code == 200, response.text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_the_metrics_count_what_was_done(tmp_path, model):
    with client_of(tmp_path, model) as client:
        session = new_session(client)
        assert complete(client, [5, 9, 12], max_tokens=4, session=session).status_code == 200
        assert complete(client, [5, 9], max_tokens=3, stream=True, session=session).status_code == 200
        fed = client.post(f"/v1/sessions/{session}/documents", content="w5 w6 w7")
        assert fed.status_code == 200
        refused(complete(client, [10**6]), 400)
        found = read(client)
        stats = client.app.state.server.engine.stats()

        def requests(route, status):
            return found["mnemic_requests_total", ("method", "POST"), ("route", route), ("status", status)]

        assert requests("/v1/completions", "200") == 2
        assert requests("/v1/completions", "400") == 1
        assert requests("/v1/sessions/{session_id}/documents", "200") == 1
        seconds = found["mnemic_request_seconds_count", ("method", "POST"), ("route", "/v1/completions")]
        assert seconds == 3
        assert found["mnemic_first_token_seconds_count",] == 2
        assert found["mnemic_tokens_made_total",] == 7
        kinds = [found["mnemic_tokens_read_total", ("kind", kind)] for kind in ("decode", "prefill")]
        assert sum(kinds) == stats.tokens_read
        assert kinds[0] == 7
        for kind, steps in (("decode", stats.decode_steps), ("prefill", stats.prefill_steps)):
            assert found["mnemic_step_seconds_count", ("kind", kind)] == steps
            assert found["mnemic_step_rows_count", ("kind", kind)] == steps
        assert found["mnemic_works_total", ("end", "finished")] == 3
        assert found["mnemic_store_seconds_count", ("call", "commit")] == 3
        assert found["mnemic_store_errors_total", ("call", "commit")] == 0
        live = client.app.state.server.manager.stats()
        assert found["mnemic_live_sessions", ("place", "device")] == live.device == 1
        assert found["mnemic_live_bytes", ("place", "device")] == live.device_bytes > 0
        usage = client.app.state.server.store.usage("default")
        assert (found["mnemic_stored_sessions",], found["mnemic_stored_bytes",]) == (1, usage.bytes)
        assert found["mnemic_ready",] == 1
        assert found["mnemic_requests_running",] == 0
        assert ("mnemic_build_info", ("memory", "lm2"), ("version", __import__("mnemic").__version__)) in found


def test_the_documentation_lists_every_metric(tmp_path, model):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    told = {
        name for line in page.splitlines() if line.startswith("| `mnemic_") for name in re.findall(r"mnemic_\w+", line)
    }
    with client_of(tmp_path, model, durability="fast") as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        # Counters without their _total, and times of creation.
        names = {f.name + "_total" * (f.type == "counter") for f in families if not f.name.endswith("_created")}
    assert told == {name for name in names if name.startswith("mnemic_")}


def test_a_store_that_fails_is_counted(tmp_path, model, monkeypatch):
    with client_of(tmp_path, model) as client:
        session = new_session(client)
        inner = client.app.state.server.store._store

        def failing(*args, **given):
            raise StoreUnavailable("The disk is full.")

        monkeypatch.setattr(inner, "commit", failing)
        response = complete(client, [5, 9], session=session)
        refused(response, 503, "store_unavailable")
        assert response.headers["retry-after"] == "5"
        found = read(client)
        assert found["mnemic_store_errors_total", ("call", "commit")] == 1
        # What the metrics themselves ask of it is no reason to fail.
        monkeypatch.setattr(inner, "usage", failing)
        client.app.state.server.metrics._asked = float("-inf")
        found = read(client)
        assert ("mnemic_stored_sessions",) not in found
        assert found["mnemic_store_errors_total", ("call", "usage")] == 1


def test_no_word_of_a_client_becomes_a_label(tmp_path, model):
    with client_of(tmp_path, model) as client:
        for i in range(3):
            client.get(f"/secret{i}")
            client.request(f"SECRET{i}", "/v1/sessions")
            client.get(f"/v1/sessions/secret{i}")
            client.get(f"/v1/models/secret{i}/more")
            complete(client, "w5", model=f"secret{i}")
            client.get("/v1/models", headers={"X-Request-Id": f"secret{i}"})
        text = client.get("/metrics").text
    assert "secret" not in text.lower()
    assert 'route="/v1/models/{model:path}"' in text
    assert 'route="other"' in text
    assert 'method="other"' in text


def test_without_its_library_the_error_names_the_extra(monkeypatch):
    from mnemic.serving import metrics

    spec = importlib.util.spec_from_file_location("mnemic.serving.metrics_again", metrics.__file__)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"mnemic\[serve\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_two_applications_count_apart(tmp_path, model):
    with client_of(tmp_path / "a", model) as first, client_of(tmp_path / "b") as second:
        new_session(first)
        key = ("mnemic_requests_total", ("method", "POST"), ("route", "/v1/sessions"), ("status", "201"))
        assert read(first)[key] == 1
        assert key not in read(second)


def test_with_tenants_the_metrics_have_a_key_of_their_own(tmp_path, model):
    (key, hashed), (other, hashed_other) = new_key(), new_key()
    tenants = {"alice": Tenant(name="alice", keys=[hashed_other])}
    with client_of(tmp_path / "without", model, tenants=tenants) as client:
        for headers in ({}, {"Authorization": f"Bearer {other}"}):
            assert "metrics_key" in refused(client.get("/metrics", headers=headers), 401)
    with client_of(tmp_path / "with", model, tenants=tenants, metrics_key=hashed) as client:
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {other}"}).status_code == 200
        for given in (None, f"Bearer {other}", f"Bearer {hashed}", f"Basic {key}", "Bearer"):
            refused(client.get("/metrics", headers={} if given is None else {"Authorization": given}), 401)
        found = read(client, headers={"Authorization": f"Bearer {key}"})
        assert ("mnemic_ready",) in found
        assert "alice" not in str(found)
        # It reads metrics and nothing else.
        refused(client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}), 401)
    for wrong in ("x", hashed[:-1], hashed.upper()):
        with pytest.raises(ConfigError, match="metrics_key"):
            Settings(metrics_key=wrong)


@pytest.mark.parametrize("given", [{"log_text": 1}, {"log_text": "no"}, {"shutdown_seconds": True}, {"port": False}])
def test_truth_is_no_number_and_numbers_are_no_truth(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        Settings(**given)


def test_a_request_is_one_line_without_what_was_said(tmp_path, model, lines):
    with client_of(tmp_path, model) as client:
        session = new_session(client, metadata={"about": "w33"})
        lines.clear()
        events = events_of(complete(client, "w31 w32", max_tokens=4, stream=True, session=session))
        client.post("/v1/chat/completions", json={
            "model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "w34"}], "user": "w35",
        })  # fmt: skip
        client.post(f"/v1/sessions/{session}/documents", content="w36 w37")
        client.get("/v1/sessions/..w38 w38")
        client.get("/w39?w39=w39")
        complete(client, "w5", model="w40")
        client.get("/health")
        client.get("/metrics")
    assert events
    first, chat, document, *others = lines.requests()
    assert first["route"] == "/v1/completions"
    assert (first["method"], first["status"], first["level"]) == ("POST", 200, "info")
    assert (first["tenant"], first["session"]) == ("default", session)
    assert (first["prompt_tokens"], first["completion_tokens"]) == (2, 4)
    assert 0 < first["first_token_seconds"] <= first["seconds"] < 30
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["time"])
    assert chat["completion_tokens"] == 2
    assert document["prompt_tokens"] == 2
    assert [line["error"] for line in others if "error" in line] == ["session_not_found", "model_not_found"]
    # Monitors ask every few seconds.
    assert len(others) == 3
    text = json.dumps(lines)
    assert not re.search(r"w3\d|w40", text), text


def test_the_log_keeps_text_where_it_is_told_to(tmp_path, model, lines):
    with client_of(tmp_path, model, log_text=True) as client:
        text = complete(client, "w31 w32", max_tokens=4, n=2, temperature=0).json()["choices"][0]["text"]
        asked = [{"role": "user", "content": "w34"}]
        client.post("/v1/chat/completions", json={"model": "tiny", "max_tokens": 2, "messages": asked})
    first, second = lines.requests()
    assert (first["asked"], first["answered"]) == ("w31 w32", [text, text])
    assert second["asked"] == asked


def test_a_short_plain_request_id_is_kept(tmp_path, model, lines):
    with client_of(tmp_path, model) as client:
        given = client.get("/v1/models", headers={"X-Request-Id": "abc-1.2_3"})
        assert given.headers["x-request-id"] == "abc-1.2_3"
        for bad in ('a"b', "a b", "", "a" * 200, "\u00e4", "{}"):
            response = client.get("/v1/models", headers={"X-Request-Id": bad.encode("latin-1")})
            assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
        assert refused(client.get("/nowhere", headers={"X-Request-Id": "it"}), 404)
    assert lines.requests()[0]["request"] == "abc-1.2_3"
    assert lines.requests()[-1]["request"] == "it"


def test_an_error_nobody_expected_has_a_line_and_an_id(tmp_path, model, lines):
    app = app_of(tmp_path, model)

    @app.get("/broken")
    async def broken():
        try:
            raise ValueError("the user said w31")
        except ValueError as error:
            raise RuntimeError("w32") from error

    from fastapi.testclient import TestClient

    with TestClient(app, raise_server_exceptions=False) as client:
        response = client.get("/broken", headers={"X-Request-Id": "it"})
    refused(response, 500)
    assert response.headers["x-request-id"] == "it"
    (line,) = lines.requests()
    assert (line["status"], line["route"], line["error"]) == (500, "/broken", "server_error")


def test_exceptions_are_logged_without_their_messages(lines):
    def fail():
        try:
            raise ValueError("the user said w31")
        except ValueError as error:
            raise RuntimeError("w32") from error

    log = logging.getLogger("mnemic.test")
    for text in (False, True):
        lines.setFormatter(Lines(text))
        try:
            fail()
        except RuntimeError:
            log.exception("it failed\n")
    hidden, shown = lines
    assert hidden["message"] == "it failed"
    assert [error["type"] for error in hidden["exception"]] == ["RuntimeError", "ValueError"]
    assert hidden["exception"][0]["at"][-1].endswith(" fail")
    assert "w3" not in json.dumps(hidden)
    assert [error["message"] for error in shown["exception"]] == ["w32", "the user said w31"]


def test_a_record_is_one_line_whatever_is_in_it():
    record = logging.LogRecord("x", logging.INFO, "", 0, 'a\nb"\u2028\udc80 %s', ("c\r",), None)
    written = Lines().format(record)
    assert len(written.splitlines()) == 1
    assert written.isascii()
    assert json.loads(written)["message"] == 'a\nb"\u2028\udc80 c'
