"""Gated DeltaNet: in place of the attention, beside it, in one block; grouped values, no convolution."""

from typing import Any

_FRESH = {"preset": "default"}
VARIANTS: dict[str, dict[str, Any]] = {
    "gated_deltanet": _FRESH,
    "gated_deltanet_attach": {"preset": "attach", "num_heads": 2, "allow_negative_eigenvalues": True},
    "gated_deltanet_hybrid": {**_FRESH, "memory_layers": (1,), "num_heads": 2, "num_value_heads": 4},
    "gated_deltanet_no_conv": {**_FRESH, "conv_kernel": 0, "output_gate": False},
}
