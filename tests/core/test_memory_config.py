"""Configurations: checked when made, named when wrong, the same after a trip through JSON."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pytest

from mnemic import ConfigError, UnknownNameError, memory_config, memory_names
from mnemic.core.memory import MemoryConfig, option
from mnemic.core.registry import config_from_dict, memory_class


@dataclass(frozen=True, kw_only=True)
class Example(MemoryConfig):
    name = "example"
    version = 3
    presets = {"wide": {"slots": 512, "blocks": (0, 2)}}

    slots: int = option(4, "slots of the bank", minimum=1, maximum=1024)
    scale: float = option(0.5, "how loud", minimum=0)
    flag: bool = option(False, "whether")
    label: str = option("a", "any text")
    how: Literal["soft", "hard"] = option("soft", "which way")
    blocks: int | tuple | None = option(None, "which blocks", minimum=0)
    kept: float | Literal["all"] = option("all", "what stays", minimum=0, maximum=1)

    def validate(self) -> None:
        if self.how == "hard" and self.flag:
            raise ConfigError("example: hard and flag exclude each other.")


GOOD = [
    {"slots": 1},
    {"slots": 1024},
    {"scale": 3},
    {"scale": 0.0},
    {"flag": True},
    {"label": ""},
    {"how": "hard"},
    {"blocks": 2},
    {"blocks": (1, 2)},
    {"blocks": None},
    {"kept": 1},
    {"kept": 0.25},
    {"kept": "all"},
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_good_values_survive_a_trip_through_json(values):
    config = Example(**values)
    there = json.loads(json.dumps(config.to_dict()))
    assert there["memory"] == "example"
    assert there["version"] == 3
    del there["memory"]
    assert Example.from_dict(there) == config
    assert hash(config) == hash(Example(**values))


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"slots": 0}, "between 1 and 1024"),
        ({"slots": 1025}, "between 1 and 1024"),
        ({"slots": 2.0}, "expected int"),
        ({"slots": True}, "expected int"),
        ({"slots": "4"}, "expected int"),
        ({"slots": None}, "expected int"),
        ({"scale": -0.1}, "at least 0"),
        ({"scale": float("nan")}, "at least 0"),
        ({"scale": "loud"}, "expected float"),
        ({"scale": True}, "expected float"),
        ({"flag": 1}, "expected bool"),
        ({"flag": None}, "expected bool"),
        ({"label": 3}, "expected str"),
        ({"how": "medium"}, "'soft' or 'hard'"),
        ({"how": None}, "'soft' or 'hard'"),
        ({"blocks": -1}, "at least 0"),
        ({"blocks": "1"}, "int or tuple or None"),
        ({"kept": 1.5}, "between 0 and 1"),
        ({"kept": "some"}, "float or 'all'"),
        ({"how": "hard", "flag": True}, "exclude each other"),
    ],
    ids=str,
)
def test_bad_values_are_refused_with_what_was_expected(values, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        Example(**values)
    assert "example" in str(caught.value)
    if len(values) == 1:
        (key,) = values
        assert key in str(caught.value)
        assert Example.__dataclass_fields__[key].metadata["help"] in str(caught.value)


def test_a_config_cannot_be_changed_but_replaced():
    config = Example()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.slots = 5
    changed = config.replace(slots=5, blocks=[0, 1])
    assert (changed.slots, changed.blocks, changed.scale) == (5, (0, 1), 0.5)
    assert config == Example()
    with pytest.raises(ConfigError, match="between 1 and 1024"):
        config.replace(slots=0)


def test_unknown_keys_are_named_with_suggestions():
    for build in (lambda: Example.from_dict({"slot": 3}), lambda: Example().replace(slot=3)):
        with pytest.raises(ConfigError, match=r"option of example is called 'slot'. Did you mean 'slots'"):
            build()
    with pytest.raises(ConfigError, match="Known: blocks, flag, how"):
        Example.from_preset("default", zzz=1)


def test_versions():
    assert Example.from_dict({"slots": 3}) == Example(slots=3)
    assert Example.from_dict({"version": 2, "slots": 3}) == Example(slots=3)
    with pytest.raises(ConfigError, match="has version 4; this release knows 3"):
        Example.from_dict({"version": 4})


@pytest.mark.parametrize("version", ["3", None, 2.5, [3]])
def test_a_version_that_is_no_number_is_refused(version):
    with pytest.raises(ConfigError, match="version"):
        Example.from_dict({"version": version})


def test_presets_and_overrides():
    assert Example.from_preset("default") == Example()
    assert Example.from_preset("wide") == Example(slots=512, blocks=(0, 2))
    assert Example.from_preset("wide", slots=7) == Example(slots=7, blocks=(0, 2))
    with pytest.raises(UnknownNameError, match=r"preset of example is called 'wid'. Did you mean 'wide'"):
        Example.from_preset("wid")


@pytest.mark.parametrize("name", memory_names())
def test_every_preset_of_every_memory_survives_a_trip_through_json(name):
    cls = memory_class(name).config_class
    for preset in ("default", *cls.presets):
        config = memory_config(f"{name}:{preset}")
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.to_dict()["memory"] == name


@pytest.mark.parametrize("name", memory_names())
def test_every_option_says_what_it_means(name):
    for field in dataclasses.fields(memory_class(name).config_class):
        assert field.metadata.get("help"), field.name


@pytest.mark.parametrize("values", [{}, {"memory": None}, {"memory": 3}, {"version": 1}])
def test_a_dictionary_without_a_memory_is_refused(values):
    with pytest.raises(ConfigError, match="under 'memory'"):
        config_from_dict(values)
