"""tools/check_docs.py, run on small trees with a stand-in for the mnemic command."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_docs.py"
MNEMIC = """#!/bin/sh
case "$1" in
  systems) printf '| system |\\n| --- |\\n| lm2 |\\n' ;;
  save) echo saved > "$2" ;;
  load) cat "$2" ;;
  *) echo "no such command: $1" >&2; exit 2 ;;
esac
"""
TABLE = "<!-- generated: systems -->\n\n| system |\n| --- |\n| lm2 |\n\n<!-- /generated -->\n"


def fenced(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```", ""])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    command = tmp_path / "bin" / "mnemic"
    command.parent.mkdir()
    command.write_text(MNEMIC)
    command.chmod(0o755)
    (tmp_path / "docs").mkdir()
    (tmp_path / "Makefile").write_text("X ?= 1\ndemo test: .venv\n\ttrue\n")
    (tmp_path / "README.md").write_text("# Title\n")
    return tmp_path


def check(tree: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(TOOL), "--root", str(tree), "--bin", str(tree / "bin"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


GOOD = {
    "console": fenced("console", "$ mnemic save a.mnemic", "saved", "$ mnemic load \\", "> a.mnemic"),
    "bash": fenced("bash", "# a comment", "mnemic save a.mnemic", "X=1 mnemic load a.mnemic | head -n 1 > b"),
    "continued": fenced("bash", "mnemic systems \\", "  > table", "mnemic load table"),
    "make": fenced("console", "$ make demo X=2", "$ make -j2 test"),
    "shown": fenced("bash", "git clone somewhere && cd somewhere", "pip install 'mnemic[train]'"),
    "python": fenced("python", "import json", "", "json.loads('[1]')"),
    "skipped": "<!-- docs-check: skip takes an hour -->\n\n" + fenced("bash", "mnemic nonsense"),
    "other language": fenced("text", "mnemic nonsense", "[x](missing.md)"),
    "in a list": "1. Do\n\n   ```python\n   if True:\n       pass\n   ```\n",
    "table": TABLE,
    "table in an example": fenced("html", "<!-- generated: other -->"),
    "link": "[a](docs/) [b](https://x.org/y) [c](#a-title) `[d](no.md)` ![e](bin/mnemic)\n\n## A *title*\n",
}
BAD = {
    "command fails": (fenced("console", "$ mnemic nonsense"), "README.md:2: `mnemic nonsense` exits with 2"),
    "output is shown": (fenced("bash", "mnemic nonsense"), "no such command: nonsense"),
    "pipe fails": (fenced("bash", "mnemic nonsense | head"), "exits with 2"),
    "after a pipe": (fenced("bash", "mnemic systems | rm x"), "`rm` is not a command"),
    "mixed": (fenced("bash", "pip install mnemic && mnemic systems"), "without `pip`"),
    "no target": (fenced("bash", "make everything"), "no target `everything`"),
    "unknown command": (fenced("bash", "ls", "curl x"), "README.md:3: `curl` is not a command"),
    "quotes": (fenced("bash", "mnemic 'x"), "can not read"),
    "python fails": (fenced("python", "assert 1 == 2, 'sum'"), "AssertionError: sum"),
    "skip without reason": ("<!-- docs-check: skip -->\n" + fenced("bash", "mnemic x"), "gives no reason"),
    "skip without block": ("<!-- docs-check: skip slow -->\ntext\n", "stands before no block"),
    "open block": ("```bash\nmnemic systems\n", "never closed"),
    "stale table": (TABLE.replace("lm2", "rmt"), "README.md:1: table `systems` is out of date"),
    "unknown table": (TABLE.replace("systems", "things"), "no generated table `things`"),
    "open table": (TABLE.replace("<!-- /generated -->", ""), "not closed"),
    "link": ("[a](docs/missing.md)\n", "README.md:1: link to docs/missing.md"),
    "reference link": ("[a]\n\n[a]: missing.md\n", "README.md:3: link to missing.md"),
    "anchor": ("[a](#nowhere)\n", "no heading"),
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_good_page_passes(tree: Path, text: str) -> None:
    (tree / "README.md").write_text(text)
    assert check(tree) == (0, "")


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_page_is_reported(tree: Path, text: str, message: str) -> None:
    (tree / "README.md").write_text(text)
    status, errors = check(tree)
    assert status == 1
    assert message in errors


def test_docs_are_checked_and_their_python_is_not_run(tree: Path) -> None:
    (tree / "docs" / "page.md").write_text(fenced("python", "1 / 0") + fenced("bash", "mnemic nonsense"))
    status, errors = check(tree)
    assert status == 1
    assert errors.startswith("docs/page.md:5: `mnemic nonsense`")


def test_pages_do_not_share_a_folder(tree: Path) -> None:
    (tree / "README.md").write_text(fenced("bash", "mnemic save a"))
    (tree / "docs" / "page.md").write_text(fenced("bash", "mnemic load a"))
    status, errors = check(tree)
    assert status == 1
    assert "docs/page.md:2" in errors


def test_missing_readme_is_reported(tree: Path) -> None:
    (tree / "README.md").unlink()
    assert check(tree) == (1, "README.md: missing\n")


def test_write_rewrites_tables_only(tree: Path) -> None:
    page = tree / "docs" / "page.md"
    before = "# Page\n\n<!-- generated: systems -->\nold\n<!-- /generated -->\n\n```bash\nmnemic nonsense\n```\n"
    page.write_text(before)
    assert check(tree, "--write") == (0, "")
    assert page.read_text() == before.replace("old", "| system |\n| --- |\n| lm2 |")
    assert (tree / "README.md").read_text() == "# Title\n"
