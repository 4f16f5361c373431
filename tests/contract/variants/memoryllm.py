"""MemoryLLM: with a learned first state and adapters, as it is attached, and with one dropping for all layers."""

_SMALL = {
    "new_states": 3,
    "blocks": 3,
    "min_chunk": 8,
    "rank": 2,
    "alpha": 2.0,
    "dropout": 0.0,
    "redraw": False,
    "preset": "default",
}
VARIANTS = {
    "memoryllm": _SMALL,
    "memoryllm_attach": {**_SMALL, "preset": "attach"},
    "memoryllm_shared": {**_SMALL, "new_states": 8, "blocks": 2, "rank": 0, "drop_per_layer": False},
}
