"""Memory+: in place of a feed-forward part, beside two of them, with experts."""

_PLUS = {"preset": "default", "num_keys": 6, "num_heads": 2, "top_k": 3, "key_dim": 8}
VARIANTS = {
    "memory_layers": _PLUS,
    "memory_layers_attach": {**_PLUS, "preset": "attach", "memory_layers": (0, 1), "value_dim": 12},
    "memory_layers_peer": {**_PLUS, "reader": "peer", "qk_norm": True},
}
HOSTS = ("llama", "gpt2", "gpt_neox", "qwen3", "mistral", "gemma2", "olmo2", "phi3", "qwen3_moe")
