"""Memorizing Transformers: both merges, every place of stored keys, a store that forgets, several blocks."""

from typing import Any

from tests.tiny import HOSTS as ALL

_TURNED = tuple(h for h in ALL if h not in ("gpt2", "opt"))
_SMALL = {"capacity": 16, "top_k": 4, "preset": "default"}
# A token repeated at the start of a segment has equal keys: which one is chosen and placed is up to rounding. Where all
# are chosen there is no tie.
_ALL = {**_SMALL, "top_k": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "memorizing": _SMALL,
    "memorizing_attach": {**_SMALL, "preset": "attach"},
    "memorizing_joint": {**_SMALL, "merge": "joint", "normalise": "none", "memory_layers": (0, 1)},
    "memorizing_zero": {**_SMALL, "position_policy": "zero"},
    "memorizing_original": {**_ALL, "position_policy": "original", "merge": "joint", "normalise": "memory"},
    "memorizing_slots": {**_SMALL, "position_policy": "slots", "capacity": 24},
    "memorizing_parallel": {**_ALL, "position_policy": "parallel"},
}
HOSTS = {f"memorizing_{policy}": _TURNED for policy in ("zero", "original", "slots", "parallel")}
