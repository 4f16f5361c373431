"""mnemic systems and mnemic show: all memories, as they were found to be."""

import dataclasses
import json

import pytest

import mnemic
from mnemic.cli import systems
from mnemic.core.registry import memory_class
from tests.cli.conftest import invoke, succeed
from tests.tiny import tiny_host


@pytest.fixture(scope="module")
def found():
    return systems.all_systems()


def test_every_memory_was_probed(found):
    assert sorted(entry["name"] for entry in found) == mnemic.memory_names()
    # RETRO reads a database that it is given.
    assert {entry["name"] for entry in found if "default" in entry["problem"]} == {"retro"}
    assert "database" in next(entry for entry in found if entry["name"] == "retro")["problem"]["default"]


def test_what_was_probed_is_what_memories_declare(found):
    for entry in found:
        kind = memory_class(entry["name"])
        if "default" not in entry["problem"]:
            assert entry["constant_state"] == kind.constant_size, entry["name"]
            assert entry["parameters"] is not None
        assert entry["paper"] == kind.paper
    by_name = {entry["name"]: entry for entry in found}
    assert by_name["membart"]["probed_on"]["architecture"] == "bart"
    assert by_name["membart"]["sites"] == ["attention"]
    assert by_name["lm2"]["identity_at_attach"] == {"default": False, "attach": True, "paper": False}
    assert by_name["lm2"]["sites"] == ["residual"]
    assert by_name["rmt"]["sites"] == ["tokens"]
    assert by_name["rmt"]["identity_at_attach"] == {"default": False}
    assert by_name["none"]["identity_at_attach"] == by_name["window"]["identity_at_attach"] == {"default": True}


def test_three_formats(found, monkeypatch):
    monkeypatch.setattr(systems, "all_systems", lambda: found)
    assert json.loads(succeed("systems", "--json").stdout) == found
    lines = succeed("systems", "--markdown").stdout.splitlines()
    assert len(lines) == 2 + len(found)
    assert all(line.startswith("| ") and line.count(" | ") == 7 for line in lines)
    table = succeed("systems").stdout
    assert all(entry["name"] in table for entry in found)
    assert invoke("systems", "--json", "--markdown").exit_code == 2


def test_a_memory_that_does_not_fit_is_unknown_and_not_no(monkeypatch):
    monkeypatch.setitem(systems.PROBE_HOST, "hidden_size", 32)
    entry = systems.describe("lm2")
    assert entry["identity_at_attach"]["default"] is None
    assert "64 slots" in entry["problem"]["default"]
    assert systems._row(entry)[3:7] == ["?", "?", "num_slots * d; ?", "?"]


@pytest.mark.parametrize("name", mnemic.memory_names())
def test_show_explains_every_memory(name):
    shown = succeed("show", name).stdout
    kind = memory_class(name)
    assert kind.paper in shown
    assert all(option.name in shown for option in dataclasses.fields(kind.config_class))
    assert all(preset in shown for preset in kind.config_class.presets)
    assert "On llama" in shown


def test_show_counts_what_attaching_makes(tmp_path):
    host = tiny_host()
    host.save_pretrained(tmp_path)
    # No weights are needed.
    (tmp_path / "model.safetensors").unlink()
    shown = succeed("show", "lm2:paper", "--host", tmp_path, "--set", "num_slots=8", "--segment", 16).stdout
    report = mnemic.parameter_report(mnemic.attach(host, "lm2:paper", num_slots=8, segment=16))
    assert f"{report['host']['total']:,}" in shown
    assert f"{report['memory']['total']:,} (" in shown
    assert f"{8 * 32 * 4:,} bytes (float32)" in shown
    assert "16 tokens; a write every 16" in shown


def test_show_says_what_differs_and_what_is_allowed():
    shown = succeed("show", "lm2", "--set", "memory.num_slots=16", "--set", "host.hidden_size=64").stdout
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert lines["num_slots"].split()[1:3] == ["64", "16"]
    assert "whole number >= 1" in lines["num_slots"]
    assert "number 0 to 1, paper, code" in lines["retention"]
    assert "true, false" in lines["norm"]
    assert "width 64" in shown


def test_show_other_hosts_and_windows():
    assert "10 in front of a segment, 10 behind it" in succeed("show", "rmt", "--host", "gpt2").stdout
    assert "window" in succeed("show", "window", "--segment", 64).stdout
    assert "--segment" in succeed("show", "lm2-reference").stdout
    assert "128 tokens" in succeed("show", "lm2-reference", "--segment", 128).stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("lm3",), "Did you mean 'lm2'"),
        (("lm2:papre",), "Did you mean 'paper'"),
        (("lm2", "--set", "num_slot=3"), "Did you mean 'num_slots'"),
        (("lm2", "--set", "num_slots=0"), "at least 1"),
        (("lm2", "--set", "task.values=3"), "mnemic train"),
        (("lm2", "--host", "lama"), "Did you mean 'llama'"),
        (("lm2", "--host", "./missing"), "Cannot find the host"),
        (("lm2-reference", "--segment", "64"), "segment must be 128"),
        (("rmt", "--segment", "2000"), "use segment="),
    ],
)
def test_show_errors(arguments, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = invoke("show", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("mnemic: ")
    assert message in result.stderr
