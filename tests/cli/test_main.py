"""The command line as a whole: help, version, exit statuses."""

import subprocess
import sys

import pytest

import mnemic
from mnemic.cli import _shared
from tests.cli.conftest import invoke, succeed

COMMANDS = ("systems", "show", "train", "eval", "inspect", "stream", "demo")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_the_commands(option):
    shown = succeed(option).stdout
    assert all(f"\n  {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_teaches(command):
    shown = succeed(command, "-h").stdout
    assert "Examples:" in shown
    assert shown.count(f"mnemic {command}") >= 2
    assert ("Reads:" in shown and "Writes:" in shown) or "Reads and writes no files" in shown


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom mnemic.cli import main\nsys.argv[1:] = ['train', '--help']\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_version():
    assert succeed("--version").stdout == f"mnemic {mnemic.__version__}\n"


def test_a_typing_error_is_a_usage_error():
    result = invoke("sytems")
    assert result.exit_code == 2
    assert "Did you mean 'systems'" in result.stderr


def raised(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(_shared, "quiet", fail)
    return invoke("systems")


def test_ctrl_c_exits_with_130(monkeypatch):
    assert raised(monkeypatch, KeyboardInterrupt()).exit_code == 130


def test_files_that_cannot_be_used_are_one_line(monkeypatch):
    result = raised(monkeypatch, PermissionError(13, "Permission denied", "results.json"))
    assert (result.exit_code, result.stderr) == (2, "mnemic: Permission denied: results.json\n")


def test_our_errors_are_one_line(monkeypatch):
    result = raised(monkeypatch, mnemic.UnknownNameError.of("memory", "lm3", ["lm2", "rmt"]))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "mnemic: No memory is called 'lm3'. Did you mean 'lm2'?\n"


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    result = raised(monkeypatch, ZeroDivisionError("a bug"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_names_of_the_package_are_found_when_they_are_used():
    assert all(hasattr(mnemic, name) for name in mnemic.__all__)
    assert set(mnemic.__all__) <= set(dir(mnemic))
    with pytest.raises(AttributeError, match="no attribute 'attache'"):
        mnemic.attache  # noqa: B018
