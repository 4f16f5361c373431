"""mnemic gives any Transformer a memory.

import mnemic
model = mnemic.attach("path/or/name", "lm2", segment=512)
stream = model.stream()
stream.feed(text)
stream.generate("Where is Mary?", max_new_tokens=8)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core import (
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
        memory_config,
        memory_names,
    )
    from .core.state import State
    from .core.truncation import Truncation
    from .hosts import (
        Stream,
        add_lora,
        attach,
        detach,
        freeze_host,
        is_attached,
        load,
        load_state,
        parameter_report,
        save,
        save_state,
    )

__version__ = "0.1.0"

__all__ = [
    "ConfigError", "DataError", "FileFormatError", "HostError", "InputError", "MissingExtraError", "MnemicError",
    "State", "StateError", "Stream", "TrainingError", "Truncation", "UnknownNameError", "UnsupportedError", "add_lora",
    "attach", "detach", "freeze_host", "is_attached", "load", "load_state", "memory_config", "memory_names",
    "parameter_report", "save", "save_state",
]  # fmt: skip

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Names are imported when they are first used: torch takes seconds, which `mnemic --help` should not."""
        if name in ("core", "hosts"):
            return import_module(f".{name}", __name__)
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        homes = {"State": ".core.state", "Truncation": ".core.truncation"}
        for home in (homes.get(name, ".core"), ".hosts"):
            module = import_module(home, __name__)
            if hasattr(module, name):
                return globals().setdefault(name, getattr(module, name))
        raise AttributeError(name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
