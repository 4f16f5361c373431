"""CCM: appended slots, of which the oldest are dropped; the mean; compression without a memory in sight."""

from typing import Any

_SMALL: dict[str, Any] = {"num_tokens": 2, "capacity": 3, "rank": 2, "alpha": 2.0, "dropout": 0.0}
VARIANTS = {
    "ccm": _SMALL,
    "ccm_merge": {**_SMALL, "update": "merge"},
    "ccm_apart": {**_SMALL, "recurrent": False},
}
