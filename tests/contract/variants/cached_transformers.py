"""GRC: as printed but causal; as released, with fewer tokens in the cache than a segment has."""

VARIANTS = {
    "cached_transformers": {"cache_length": 8, "preset": "default"},
    "cached_transformers_attach": {"cache_length": 3, "ratio": 1.0, "candidate": "normed", "preset": "attach"},
    "cached_transformers_released": {"cache_length": 12, "preset": "released"},
}
