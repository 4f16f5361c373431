"""Commands run in this process, on models of a few thousand parameters."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import rich
from transformers.utils import logging
from typer.testing import CliRunner

from mnemic.cli import app

TINY = ("--set", "host.hidden_size=32", "--set", "host.intermediate_size=48", "--batch-size", "4", "--threads", "1")
RECALL = ("--task", "recall", "--memory", "lm2", "--set", "memory.num_slots=8", "--segment", "8", "--segments", "2,3")


def invoke(*arguments, text=None):
    """The result of a command: exit_code, stdout, stderr."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text, prog_name="mnemic")


def succeed(*arguments, text=None):
    result = invoke(*arguments, text=text)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@contextmanager
def restored():
    """Commands change how loud other libraries are; undone at the end."""
    verbosity, console = logging.get_verbosity(), dict(rich.get_console().__dict__)
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    rich.get_console().__dict__.update(console)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("MNEMIC_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    with restored():
        yield


@pytest.fixture(scope="session")
def recall_run(tmp_path_factory) -> Path:
    """A run folder: recall, three steps."""
    folder = tmp_path_factory.mktemp("runs") / "recall"
    with restored():
        succeed("train", *RECALL, *TINY, "--steps", 3, "--set", "log_every=1", "--output", folder)
    return folder
