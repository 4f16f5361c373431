"""LM2: what changes how it runs."""

from typing import Any

_LM2 = {"num_slots": 6, "preset": "default"}
VARIANTS: dict[str, dict[str, Any]] = {
    "lm2": _LM2,
    "lm2_per_layer": {**_LM2, "memory_scope": "per_layer"},
    "lm2_top_k": {**_LM2, "top_k": 2},
    "lm2_top_k_per_layer": {**_LM2, "top_k": 2, "memory_scope": "per_layer"},
    "lm2_attach": {**_LM2, "preset": "attach"},
    "lm2_paper": {**_LM2, "preset": "paper"},
    "lm2_update_every": {**_LM2, "update_every": 4},
    "lm2_competitive": {**_LM2, "route": "competitive", "top_k": 3, "query_source": "residual", "rank": 8},
    "lm2_one_layer": {**_LM2, "memory_layers": (1,), "init": "learned", "write_scores": "read"},
    "lm2_identity_route": {**_LM2, "num_slots": 8, "route": "identity"},
}
