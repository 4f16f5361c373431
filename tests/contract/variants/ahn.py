"""AHN: its three rules; without sinks; a window shorter and longer than the segment."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "ahn": {"num_sinks": 2},
    "ahn_deltanet": {"num_sinks": 0, "variant": "deltanet"},
    "ahn_mamba2": {"num_sinks": 3, "variant": "mamba2", "window": 6},
    "ahn_wide": {"num_sinks": 1, "window": 12},
}
