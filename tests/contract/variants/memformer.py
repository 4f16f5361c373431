"""Memformer: as it is, and as it is attached to a trained host."""

VARIANTS = {
    "memformer": {"num_slots": 5, "preset": "default"},
    "memformer_attach": {"num_slots": 5, "own_value": "raw", "preset": "attach"},
}
