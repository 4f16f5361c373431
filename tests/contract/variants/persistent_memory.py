"""Persistent memory: plain, with a bias on the slots, as it attaches to a trained host, and as all-attention layers."""

from typing import Any

from tests.tiny import HOSTS as ALL

_BARE = {"num_slots": 6, "preset": "default"}
VARIANTS: dict[str, dict[str, Any]] = {
    "persistent_memory": _BARE,
    "persistent_memory_bias": {**_BARE, "slot_bias": -2.0},
    "persistent_memory_attach": {"num_slots": 6, "preset": "attach"},
    "persistent_memory_drop": {**_BARE, "feed_forward": "drop"},
}
# OPT has no module for its feed-forward parts.
HOSTS = {"persistent_memory_drop": tuple(h for h in ALL if h != "opt")}
