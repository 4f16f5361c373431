"""Memoria: long-term memory from the third segment on; a store that is full."""

_SMALL = {"num_working": 3, "recall_short": 2, "recall_long": 2, "depth": 2}
VARIANTS = {
    "memoria": {**_SMALL, "short_capacity": 3, "lifespan": 4, "max_engrams": 24, "preset": "default"},
    "memoria_full": {**_SMALL, "short_capacity": 2, "lifespan": 9, "max_engrams": 8, "preset": "attach"},
}
