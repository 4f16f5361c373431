"""The files of the web page, without a browser."""

import re

import pytest

from mnemic.core.errors import ConfigError
from mnemic.serving.config import Settings
from tests.serving.http_tests import client_of, refused
from tests.serving.serving_models import served_model


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    with client_of(tmp_path_factory.mktemp("page"), model) as client:
        yield client


def references(text):
    """What a file of the page names of others."""
    return {f"/{name}" for name in re.findall(r'(?:href|src)="(page/[^"]+)"', text)} | {
        f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', text)
    }


def test_every_file_is_there_and_asks_nothing_of_others(client):
    found, waiting = {}, {"/"}
    while waiting:
        path = waiting.pop()
        response = client.get(path)
        assert response.status_code == 200, path
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        found[path] = response
        waiting |= references(response.text) - set(found)
    assert {"/page/app.js", "/page/style.css", "/page/heat.js"} <= set(found)
    types = {path: response.headers["content-type"].partition(";")[0] for path, response in found.items()}
    assert {types["/"], types["/page/app.js"], types["/page/style.css"]} == {"text/html", "text/javascript", "text/css"}
    for path, response in found.items():
        assert "http://" not in response.text, path
        assert "https://" not in response.text, path
        # The policy forbids them, and text would become elements.
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style="):
            assert word not in response.text, (path, word)
        assert "localStorage" not in response.text, path


def test_what_is_no_file_of_the_page_is_not_found(client):
    for name in ("app.py", "..%2Fapp.py", "../app.py", "nothing.js", "__init__.py", "%00"):
        assert client.get(f"/page/{name}").status_code == 404
    refused(client.get("/page/nothing.js"), 404, "not_found")


def test_it_can_be_left_out(tmp_path, model):
    with client_of(tmp_path, model, page=False) as client:
        assert client.get("/").status_code == 404
        assert client.get("/page/app.js").status_code == 404
        assert client.get("/health").status_code == 200
    with pytest.raises(ConfigError, match="page = 1, expected bool"):
        Settings(page=1)  # pyright: ignore[reportArgumentType]
