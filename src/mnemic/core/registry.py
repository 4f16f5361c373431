"""Registry: memories are found by where they stand, and imported only when asked for.

A memory called "some-name" is the module `some_name` in any family folder of `mnemic.memories`; other packages
offer theirs through the entry-point group "mnemic.memories". Nothing is edited to add one.
"""

import importlib
import pkgutil
from functools import lru_cache
from importlib.metadata import entry_points

from .errors import ConfigError, UnknownNameError
from .memory import Memory, MemoryConfig


@lru_cache(maxsize=1)
def _modules() -> dict[str, str]:
    """Name of every memory -> the module that holds it, without importing those modules."""
    root = importlib.import_module("mnemic.memories")

    found = {}
    for family in pkgutil.iter_modules(root.__path__):
        if not family.ispkg or family.name.startswith("_"):
            continue
        package = importlib.import_module(f"{root.__name__}.{family.name}")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                found[module.name.replace("_", "-")] = f"{package.__name__}.{module.name}"
    found.update({point.name: point.value for point in entry_points(group="mnemic.memories")})
    return found


def memory_names() -> list[str]:
    """Names of all memories, sorted."""
    return sorted(_modules())


def memory_family(name: str) -> str:
    """The family folder a memory stands in."""
    memory_class(name)
    return _modules()[name].split(".")[-2].replace("_", " ")


def memory_class(name: str) -> type[Memory]:
    """The class of the memory called `name`.

    Raises:
        UnknownNameError: no memory has that name; close names are suggested.
    """
    if name == "stack":
        from .stack import Stack

        return Stack
    if name not in _modules():
        raise UnknownNameError.of("memory", name, _modules())
    module = importlib.import_module(_modules()[name].partition(":")[0])
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Memory) and getattr(c, "name", None) == name
    ]
    if len(found) != 1:
        raise ConfigError(f"{module.__name__} must define exactly one Memory with name = {name!r}; found {found}.")
    return found[0]


def memory_config(memory: str | MemoryConfig, preset: str | None = None, **overrides) -> MemoryConfig:
    """The configuration meant by a name ("lm2"), a name with preset ("lm2:paper") or a config, with overrides.

    Raises:
        UnknownNameError: unknown memory or preset.
        ConfigError: unknown key or unusable value.
    """
    if isinstance(memory, MemoryConfig):
        return memory.replace(**overrides)
    if not isinstance(memory, str):
        raise ConfigError(f"A memory is a name such as 'lm2' or a MemoryConfig; got {memory!r}.")
    name, _, named = memory.partition(":")
    return memory_class(name).config_class.from_preset(preset or named or "default", **overrides)


def config_from_dict(values: dict) -> MemoryConfig:
    """The inverse of `MemoryConfig.to_dict`."""
    values = dict(values)
    name = values.pop("memory", None)
    if not isinstance(name, str):
        raise ConfigError(f"A memory configuration names its memory under 'memory'; got {name!r}.")
    return memory_class(name).config_class.from_dict(values)
