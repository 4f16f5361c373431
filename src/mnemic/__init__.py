"""mnemic gives any Transformer a memory.

import mnemic
model = mnemic.attach("path/or/name", "lm2", segment=512)
stream = model.stream()
stream.feed(text)
stream.generate("Where is Mary?", max_new_tokens=8)
"""

from .core import (
    ConfigError,
    DataError,
    FileFormatError,
    HostError,
    InputError,
    MissingExtraError,
    MnemicError,
    StateError,
    UnknownNameError,
    UnsupportedError,
    memory_config,
    memory_names,
)
from .core.state import State
from .core.truncation import Truncation
from .hosts import Stream, add_lora, attach, detach, freeze_host, is_attached, load, parameter_report, save

__version__ = "0.1.0"

__all__ = [
    "ConfigError", "DataError", "FileFormatError", "HostError", "InputError", "MissingExtraError", "MnemicError",
    "State", "StateError", "Stream", "Truncation", "UnknownNameError", "UnsupportedError", "add_lora", "attach",
    "detach", "freeze_host", "is_attached", "load", "memory_config", "memory_names", "parameter_report", "save",
]  # fmt: skip
