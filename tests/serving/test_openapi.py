"""The OpenAPI document, and calls made up from it: whatever comes, the server answers, and never with a 5xx."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from mnemic.serving.requests import Limits
from tests.serving.http_tests import address_of, app_of, client_of
from tests.serving.serving_models import served_model

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

PATHS = {
    "/health", "/ready", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions",
    "/v1/sessions", "/v1/sessions/{session_id}", "/v1/sessions/{session_id}/commits", "/v1/sessions/{session_id}/fork",
    "/v1/sessions/{session_id}/rollback", "/v1/sessions/{session_id}/documents",
    "/v1/sessions/{session_id}/export", "/v1/sessions/import", "/v1/sessions/{session_id}/memory",
}  # fmt: skip


def test_the_document_lists_everything(tmp_path):
    with client_of(tmp_path) as client:
        document = client.get("/openapi.json").json()
    assert set(document["paths"]) >= PATHS
    for path, methods in document["paths"].items():
        for operation in methods.values() if path in PATHS else ():
            assert operation["description"], path


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    app = app_of(tmp_path_factory.mktemp("openapi"), served_model(), limits=Limits(max_tokens=20))
    with address_of(app) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.mark.slow
def test_no_call_made_up_from_it_is_a_5xx(document):
    operations = [found.ok() for found in document.get_all_operations()]
    assert {operation.path for operation in operations} >= PATHS
    counts = Counter()

    def call(case):
        response, place = case.call(), (case.method, case.path)
        assert response.status_code < 500, (place, response.content)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        counts[place] += 1

    many = settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    for operation in operations:
        many(given(case=operation.as_strategy())(call))()
    assert sum(counts.values()) > 200
