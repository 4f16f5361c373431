"""mnemic inspect: a page of a trained run, of a text, of a memory without slots; what it refuses."""

import pytest

import mnemic
from mnemic.training import listed_tokenizer
from tests.cli.conftest import invoke, succeed
from tests.tiny import VOCABULARY, tiny_host

WORDS = [f"w{i}" for i in range(VOCABULARY)]


@pytest.fixture(scope="module")
def rmt_folder(tmp_path_factory):
    """Saved, not trained by a command."""
    folder = tmp_path_factory.mktemp("models") / "rmt"
    model = mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=2)
    mnemic.save(model, folder, whole=True)
    listed_tokenizer(WORDS, pad_token="w0", eos_token="w60").save_pretrained(folder)
    return folder


def test_a_run_is_inspected_on_its_task(recall_run, tmp_path, monkeypatch):
    monkeypatch.setattr("mnemic.cli.inspect.TOKENS", 90)
    place = tmp_path / "out" / "page.html"
    given = (
        "--reports",
        "slots,importance,capacity",
        "--samples",
        8,
        "--length",
        "3",
        "--figures",
        tmp_path / "figures",
    )
    shown = succeed("inspect", recall_run, *given, "--output", place)
    page = place.read_text()
    assert "recall at length 3, seed 1: the first sample, 24 tokens, and 3 more" in page
    assert "<h1>Inside recall</h1>" in page
    assert str(place) in shown.stderr
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "usage.png", "writes.png", "importance.png", "capacity.png",
    }  # fmt: skip


def test_a_text_is_read(rmt_folder, tmp_path):
    text = tmp_path / "story.txt"
    text.write_text(" ".join(WORDS[3:40]))
    shown = succeed("inspect", rmt_folder, "--text", text)
    assert "Not shown: slots: its tokens read no slots" in shown.stderr
    page = (rmt_folder / "inspect.html").read_text()
    assert "story.txt, 37 tokens, the last 8 as answer" in page
    assert page.count('role="img"') == 2


def test_list_says_which_reports_apply(recall_run, rmt_folder):
    assert succeed("inspect", recall_run, "--list").stdout.count("yes") == 8
    lines = succeed("inspect", rmt_folder, "--list").stdout.splitlines()
    assert [line.split()[0] for line in lines if line.rstrip().endswith("yes")] == ["zeroing", "rank", "capacity"]


def test_what_is_refused(recall_run, rmt_folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("w3 w4")
    other = tmp_path / "other.txt"
    other.write_text("nothing of this is known")
    for arguments, message in (
        ((rmt_folder, "--text", short, "--reports", "slots"), "These apply: zeroing, rank, capacity"),
        ((rmt_folder,), "give --text FILE or --task NAME"),
        ((rmt_folder, "--text", short), "2 tokens; expected more than 8"),
        ((rmt_folder, "--text", other), "cannot read"),
        ((rmt_folder, "--text", short, "--task", "qa1"), "not both"),
        ((recall_run, "--reports", "slot"), "Did you mean 'slots'"),
        ((tmp_path / "none",), "does not exist"),
    ):
        result = invoke("inspect", *arguments)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_facts_in_growing_numbers(recall_run):
    from mnemic.benchmarks.facts import fact_curve
    from mnemic.benchmarks.trained import open_run

    points = fact_curve(open_run(recall_run), samples=4)
    # Eight keys at most, which four and four have room in the segments before the last.
    assert [point.facts for point in points] == [1, 2, 4, 8]
    assert {point.chance for point in points} == {1 / 8}
    assert all(point.answers == 4 for point in points)
