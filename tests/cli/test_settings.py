"""--set, and lists on the command line."""

import pytest

from mnemic import ConfigError
from mnemic.cli._shared import numbers, settings, words


@pytest.mark.parametrize(
    "text, value",
    [
        ("8", 8), ("1e-3", 1e-3), ("true", True), ("[1, 2]", [1, 2]), ('"a b"', "a b"), ("'x=y'", "x=y"),
        ("softmax", "softmax"), ("tail:2", "tail:2"), ("lm2:paper", "lm2:paper"), ("dir/sub-1.0", "dir/sub-1.0"),
    ],
)  # fmt: skip
def test_values_are_toml_and_words_need_no_quotes(text, value):
    assert settings([f"key={text}"]) == {"key": value}


def test_prefixes_lead_to_tables():
    found = settings(["memory.num_slots=32", "host.hidden_size=64", "task.values=8", "steps = 5", "memory.norm=false"])
    assert found == {
        "memory_options": {"num_slots": 32, "norm": False},
        "host_options": {"hidden_size": 64},
        "task_options": {"values": 8},
        "steps": 5,
    }


@pytest.mark.parametrize(
    "pair", ["steps", "=5", "steps=", "steps=[1,", "a b=1", "host.a.b=1", "hots.size=1", "x=1\ny=2", "x=a b", "x=#"]
)
def test_bad_syntax_is_refused(pair):
    with pytest.raises(ConfigError, match="--set"):
        settings([pair])


def test_a_key_is_given_once():
    with pytest.raises(ConfigError, match=r"memory\.rank is given twice"):
        settings(["memory.rank=1", "memory.rank=2"])


def test_lists():
    assert numbers("1, 2,4", "--segments") == (1, 2, 4)
    assert words("qa1,qa2,", "--tasks") == ("qa1", "qa2")


@pytest.mark.parametrize("text", ["", "1,x", "0", "-1", "1.5"])
def test_lists_of_other_things_are_refused(text):
    with pytest.raises(ConfigError, match="--segments"):
        numbers(text, "--segments")
