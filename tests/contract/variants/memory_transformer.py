"""Memory Transformer: groups among the text, as the only thing that text attends to, and with weights of their own."""

VARIANTS = {
    "memory_transformer": {"num_tokens": 3, "every": 3},
    "memory_transformer_bottleneck": {"num_tokens": 3, "every": 3, "variant": "bottleneck"},
    "memory_transformer_controller": {"num_tokens": 2, "variant": "controller", "every": 4},
}
