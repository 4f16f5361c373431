"""Registry: memories are found where they stand, imported when asked for, and suggested when misspelt."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import mnemic.memories
from mnemic import ConfigError, UnknownNameError, memory_config, memory_names
from mnemic.core import registry
from mnemic.core.memory import Memory, MemoryConfig
from mnemic.core.registry import config_from_dict, memory_class, memory_family

FOLDER = Path(mnemic.memories.__file__).parent


def test_names_are_the_files_of_the_family_folders():
    files = {p.stem.replace("_", "-") for p in FOLDER.glob("[!_]*/[!_]*.py")}
    assert set(memory_names()) >= files
    assert {"lm2", "lm2-reference", "rmt", "none", "window"} <= files
    assert memory_names() == sorted(memory_names())


@pytest.mark.parametrize("name", memory_names())
def test_every_memory_is_complete(name):
    cls = memory_class(name)
    assert issubclass(cls, Memory)
    assert issubclass(cls.config_class, MemoryConfig)
    assert cls.name == cls.config_class.name == name
    assert len(cls.paper) > 10
    assert sys.modules[cls.__module__].__doc__


def test_families():
    assert memory_family("lm2") == "recurrent"
    assert memory_family("none") == "baselines"


@pytest.mark.parametrize(
    "name, suggestion",
    [("lm", "Did you mean 'lm2'"), ("memfromer", "Did you mean 'memformer'"), ("qqqq", "Known: .*lm2.*rmt")],
)
def test_unknown_names_are_answered_with_suggestions(name, suggestion):
    for ask in (memory_class, memory_family, memory_config, lambda n: config_from_dict({"memory": n})):
        with pytest.raises(UnknownNameError, match=f"No memory is called '{name}'. {suggestion}"):
            ask(name)


def test_unknown_names_are_key_errors_and_unknown_options_value_errors():
    with pytest.raises(KeyError):
        memory_class("nothing-of-the-kind")
    with pytest.raises(ValueError, match="num_slots"):
        memory_config("lm2", num_slot=3)


def test_names_presets_configs_and_overrides():
    paper = memory_config("lm2:paper")
    assert paper == memory_config("lm2", "paper")
    assert not paper.content_write
    assert memory_config("lm2:paper", num_slots=3) == paper.replace(num_slots=3)
    assert memory_config(paper) == paper
    assert memory_config(paper, num_slots=3).num_slots == 3
    assert memory_config("rmt") == memory_config("rmt:default")
    with pytest.raises(UnknownNameError, match="Did you mean 'paper'"):
        memory_config("lm2:pape")
    with pytest.raises(ConfigError, match="at least 0"):
        memory_config("rmt", num_tokens=-1)


def test_memories_are_imported_only_when_asked_for():
    code = (
        "import sys, mnemic; mnemic.memory_names();"
        "assert 'mnemic.memories.recurrent.lm2_reference' not in sys.modules;"
        "mnemic.memory_config('lm2-reference');"
        "assert 'mnemic.memories.recurrent.lm2_reference' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=110)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A package that offers memories through the entry-point group; yields a function that installs it."""

    def install(source: str, name: str = "outside-memory") -> None:
        folder = tmp_path / "outside_family"
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "somewhere.py").write_text(source)
        point = EntryPoint(name, "outside_family.somewhere:Anything", "mnemic.memories")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])
        registry._modules.cache_clear()

    yield install
    monkeypatch.undo()
    registry._modules.cache_clear()
    for module in ("outside_family", "outside_family.somewhere"):
        sys.modules.pop(module, None)


SOURCE = """
from dataclasses import dataclass
from mnemic.core.memory import Memory, MemoryConfig, option

@dataclass(frozen=True, kw_only=True)
class OutsideConfig(MemoryConfig):
    name = "outside-memory"
    size: int = option(3, "how much")

class Outside(Memory):
    name = "outside-memory"
    config_class = OutsideConfig
    paper = "a memory of another package"
"""


def test_other_packages_offer_memories_through_entry_points(outside):
    outside(SOURCE)
    assert "outside-memory" in memory_names()
    assert memory_config("outside-memory", size=4).size == 4
    assert memory_class("outside-memory").paper == "a memory of another package"
    assert memory_family("outside-memory") == "outside family"
    assert config_from_dict(memory_config("outside-memory").to_dict()) == memory_config("outside-memory")


def test_a_module_without_its_memory_is_refused(outside):
    outside(SOURCE.replace('name = "outside-memory"', 'name = "another"'))
    with pytest.raises(ConfigError, match="exactly one Memory with name = 'outside-memory'"):
        memory_class("outside-memory")
