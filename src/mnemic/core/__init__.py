"""The contract: states, memories, the registry, files and errors."""

from .errors import (
    ConfigError,
    DataError,
    FileFormatError,
    HostError,
    InputError,
    MissingExtraError,
    MnemicError,
    StateError,
    TrainingError,
    UnknownNameError,
    UnsupportedError,
)
from .memory import HostSpec, Memory, MemoryConfig, Segment, Trace, option
from .registry import config_from_dict, memory_class, memory_config, memory_family, memory_names
from .state import State

__all__ = [
    "ConfigError", "DataError", "FileFormatError", "HostError", "HostSpec", "InputError", "Memory", "MemoryConfig",
    "MissingExtraError", "MnemicError", "Segment", "State", "StateError", "Trace", "TrainingError",
    "UnknownNameError", "UnsupportedError", "config_from_dict", "memory_class", "memory_config", "memory_family",
    "memory_names", "option",
]  # fmt: skip
