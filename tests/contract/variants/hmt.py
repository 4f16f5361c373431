"""HMT: with recall, and with the last vector of a segment alone."""

VARIANTS = {
    "hmt": {"cache_size": 2, "sensory": 3, "key_width": 16},
    "hmt_last": {"recall": False, "sensory": 2},
}
