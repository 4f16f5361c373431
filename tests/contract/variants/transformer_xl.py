"""Transformer-XL: what is stored, the positions, lengths and ranges by layer."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "transformer_xl": {"memory_lengths": 12},
    "transformer_xl_kv": {"memory_lengths": 12, "cache": "kv"},
    "transformer_xl_relative": {"memory_lengths": 12, "positions": "relative"},
    "transformer_xl_relative_kv": {
        "memory_lengths": (5, 20),
        "positions": "relative",
        "cache": "kv",
        "ranges": (3, 15),
    },
    "transformer_xl_top": {"memory_lengths": (0, 20), "ranges": (4, None), "stop_gradient": False},
}
