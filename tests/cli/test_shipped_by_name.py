"""The model that comes with the package, taken by its name: read, inspected, measured; nothing is written beside it."""

from mnemic.benchmarks.demo_asked import NAME
from mnemic.benchmarks.shipped import MODELS
from tests.cli.conftest import invoke, succeed

STORY = "Mary went to the kitchen. John moved to the garden. Sandra went back to the office. John moved to the hallway."


def test_it_reads_and_is_asked(tmp_path):
    story = tmp_path / "story.txt"
    story.write_text(STORY + "\n")
    for name, place in (("Mary", "kitchen"), ("John", "hallway"), ("Sandra", "office")):
        shown = succeed("stream", NAME, "--feed", story, "--ask", f"Where is {name}?", text="")
        assert shown.stdout.strip() == place


def test_it_is_inspected_and_measured_elsewhere(tmp_path):
    before = {path: path.read_bytes() for path in (MODELS / NAME).iterdir()}
    for command in (("inspect", NAME), ("eval", NAME)):
        refused = invoke(*command)
        assert refused.exit_code == 2
        assert f"{NAME} comes with the package" in refused.output
    assert "slots" in succeed("inspect", NAME, "--list").output
    page = tmp_path / "lm2.html"
    succeed("inspect", NAME, "--reports", "slots,gates", "--output", page)
    assert f"Inside {NAME}" in page.read_text()
    succeed("eval", NAME, "--lengths", "0k", "--samples", 8, "--output", tmp_path / "scores")
    assert (tmp_path / "scores" / f"{NAME}.jsonl").is_file()
    assert {path: path.read_bytes() for path in (MODELS / NAME).iterdir()} == before


def test_a_folder_of_that_name_goes_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    refused = invoke("stream", NAME, text="")
    assert refused.exit_code == 2
    assert f"{NAME} holds no model with memory" in refused.output
