"""MemoryPrompt: the usual case."""

VARIANTS = {"memoryprompt": {"num_tokens": 3, "width": 24}}
