"""UIO-LLMs: a few memories a segment, of which the oldest are dropped."""

VARIANTS = {"uio_llms": {"num_tokens": 2, "capacity": 3, "rank": 2, "alpha": 2.0}}
