"""DeltaNet: in place of the attention, beside it (gated, negative eigenvalues), in one block; no convolution."""

from typing import Any

_FRESH = {"preset": "default"}
VARIANTS: dict[str, dict[str, Any]] = {
    "deltanet": {**_FRESH, "num_heads": 2},
    "deltanet_attach": {"preset": "attach", "output_gate": True, "allow_negative_eigenvalues": True},
    "deltanet_hybrid": {**_FRESH, "memory_layers": (0,), "expand_k": 0.5, "expand_v": 2.0},
    "deltanet_no_conv": {**_FRESH, "conv_kernel": 0},
}
