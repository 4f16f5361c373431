"""Titans: the four forms."""

from typing import Any

# At a high rate the noise on the weights makes the inner training blow rounding up.
_TITANS = {"preset": "default", "head_dim": 16, "chunk": 4, "num_persistent": 2, "theta_max": 0.2}
VARIANTS: dict[str, dict[str, Any]] = {
    "titans": {**_TITANS, "form": "mac"},
    "titans_mag": {**_TITANS, "form": "mag"},
    "titans_mal": {**_TITANS, "form": "mal"},
    "titans_lmm": {**_TITANS, "form": "lmm", "place": "side"},
    "titans_lmm_mixer": {**_TITANS, "form": "lmm", "depth": 1},
    "titans_mac_attach": {**_TITANS, "preset": "attach", "chunk": 3, "decay_to_init": True},
    "titans_mag_attach": {**_TITANS, "preset": "attach", "form": "mag", "num_persistent": 0, "momentum": False},
    "titans_mal_attach": {**_TITANS, "preset": "attach", "form": "mal", "memory_layers": (1,)},
    "titans_lmm_attach": {**_TITANS, "preset": "attach", "form": "lmm", "depth": 3},
}
