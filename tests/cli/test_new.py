"""`mnemic new`: what it writes is a memory, whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mnemic.cli import app

ROOT = Path(__file__).parents[2]


def _run(*arguments: str):
    return CliRunner().invoke(app, ["new", *arguments])


def test_a_new_memory_passes_its_test_and_the_contract(tmp_path):
    """In a copy of the repository: written by the command, found by the registry, checked as every other."""
    for folder in ("src", "tests/contract", "tests/memories"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "tests/tiny.py", "tests/conftest.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    result = _run("toy-mean", "--family", "recurrent", "--root", str(tmp_path))
    assert result.exit_code == 0, result.output
    chosen = "toy_mean and (test_equations or (llama and (chunk or padd or causal or reach or gives or joined)))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    done = subprocess.run(
        [*command, "tests/memories/test_toy_mean.py", "tests/contract"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= 15, done.stdout


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["Toy"], "lower-case words"),
        (["lm2"], "already"),
        (["toy"], "--family"),
        (["toy", "--family", "recurrent", "--root", "nowhere"], "no checkout"),
    ],
    ids=["capital", "taken", "no family", "no checkout"],
)
def test_what_cannot_be_written_is_refused(arguments, expected, capfd):
    result = CliRunner().invoke(app, ["new", *arguments])
    assert result.exit_code == 2
    assert expected in result.output


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "src/mnemic/memories").mkdir(parents=True)
    assert _run("toy", "--family", "recurrent", "--root", str(tmp_path)).exit_code == 0
    result = _run("toy", "--family", "recurrent", "--root", str(tmp_path))
    assert result.exit_code == 2
    assert "exists" in result.output
