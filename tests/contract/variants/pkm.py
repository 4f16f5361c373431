"""PKM: in place of a feed-forward part and beside it, with each norm of the queries."""

_PKM = {"preset": "default", "num_keys": 6, "num_heads": 2, "top_k": 3, "key_dim": 8}
VARIANTS = {
    "pkm": _PKM,
    "pkm_attach": {**_PKM, "preset": "attach"},
    "pkm_two_tables": {**_PKM, "memory_layers": (0, 1), "query_norm": "none"},
    "pkm_beside_batch": {**_PKM, "place": "beside"},
}
HOSTS = ("llama", "gpt2", "gpt_neox", "qwen3", "mistral", "gemma2", "olmo2", "phi3", "qwen3_moe")
