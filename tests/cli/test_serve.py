"""`mnemic serve` and `mnemic chat`: settings that cannot be used, and a talk with a server."""

import pytest

from tests.cli.conftest import invoke, succeed

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from mnemic.core.errors import InputError
from mnemic.serving.auth import hash_of
from tests.serving.http_tests import address_of, app_of


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with address_of(app_of(tmp_path_factory.mktemp("served"))) as address:
        yield address


def failed(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


def test_a_key_is_made_with_its_hash():
    first, second = (
        dict(line.split() for line in succeed("serve", "--make-key").stdout.splitlines()) for _ in range(2)
    )
    assert first["hash"] == hash_of(first["key"])
    assert first["key"] != second["key"]


def test_other_machines_need_tenants(tmp_path):
    assert "tenants" in failed("serve", tmp_path, "--host", "0.0.0.0")
    assert "tenants" in failed("serve", tmp_path, "--host", "example.org")


def test_what_cannot_be_served(tmp_path):
    assert "MODEL is missing" in failed("serve")
    file = tmp_path / "server.toml"
    file.write_text("prt = 9\n")
    assert "port" in failed("serve", tmp_path, "--config", file)
    file.write_text("nonsense\n")
    assert "no TOML" in failed("serve", tmp_path, "--config", file)
    assert "no.toml" in failed("serve", tmp_path, "--config", tmp_path / "no.toml")
    assert not (tmp_path / "mnemic-sessions").exists()


def test_a_trained_model_is_served_under_its_name(recall_run, tmp_path, monkeypatch):
    served = {}
    monkeypatch.setattr("mnemic.serving.process.run", lambda app: served.update(app=app))
    file = tmp_path / "server.toml"
    file.write_text('name = "teacher"\nwait = 3\n')
    for options, name in (((), "recall"), (("--config", file), "teacher"), (("--config", file, "--name", "me"), "me")):
        succeed("serve", recall_run, "--store", tmp_path / "store", "--port", 0, "--threads", 1, *options)
        server = served["app"].state.server
        assert (server.settings.host, server.settings.port, server.settings.name) == ("127.0.0.1", 0, name)
        server.store.close()


def test_a_talk(address, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("w5 w6 w7\n" * 20)
    first = invoke("chat", "--server", address, "--feed", file, "--ask", "w9", "--max-tokens", 3)
    assert first.exit_code == 0, first.output
    assert len(first.stdout.split()) == 3
    assert "60 tokens, 100%" in first.stderr
    session = first.stderr.partition("session ")[2].partition(",")[0]
    lines = ["w8", "/commits", "/rollback 1", "/fork", "/stats", f"/feed {file}", "/feed nothing", "/nonsense", "/quit"]
    again = invoke("chat", "--server", address, "--session", session, "--max-tokens", 2, text="\n".join(lines))
    assert again.exit_code == 0, again.output
    assert len(again.stdout.split()) == 2
    shown = again.stderr
    for line in ("version 2", "document", "chat", "version 4", "version 1: 60", "'nothing' does not", "no /nonsense"):
        assert line in shown, shown


def test_what_a_server_refuses_is_one_line(address):
    assert "No session is called 'nobody'" in failed("chat", "--server", address, "--session", "nobody")
    assert "is it running" in failed("chat", "--server", "http://127.0.0.1:1")
    assert "expected an address" in failed("chat", "--server", "nonsense")


def test_an_answer_that_breaks_off_is_an_error():
    from mnemic.cli.remote import _events

    with pytest.raises(InputError, match="ended before"):
        list(_events([b'data: {"choices": []}\n', b"\n"]))
    with pytest.raises(InputError, match="full"):
        list(_events([b'data: {"error": {"message": "full"}}\n']))
