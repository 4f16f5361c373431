"""R3Mem: the usual case."""

VARIANTS = {"r3mem": {"num_tokens": 3, "num_blocks": 2, "bottleneck": 6}}
