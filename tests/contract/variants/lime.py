"""LIMe: mixed from the start, and as the identity."""

VARIANTS = {"lime": {"preset": "default"}, "lime_attach": {"preset": "attach"}}
