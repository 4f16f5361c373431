"""Host and memory as one Hugging Face model: anatomy, the segment loop, cache, attach, streams, saving."""

from .attach import add_lora, attach, base_model, detach, freeze_host, is_attached, parameter_report
from .cache import MemoryCache
from .host import MemoryHost, MemoryOutput
from .saving import load, load_state, save, save_state
from .stream import Stream

__all__ = [
    "MemoryCache", "MemoryHost", "MemoryOutput", "Stream", "add_lora", "attach", "base_model", "detach", "freeze_host",
    "is_attached", "load", "load_state", "parameter_report", "save", "save_state",
]  # fmt: skip
