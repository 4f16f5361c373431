"""RMT: with and without memory tokens that see each other."""

VARIANTS = {"rmt": {"num_tokens": 3}, "rmt_causal": {"num_tokens": 3, "memory_causal": True}}
