"""Memory Decoder: a small Llama and a small GPT-2 beside the host, and one whose layers see a window."""

from typing import Any

_LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3,
}  # fmt: skip
_GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
_SLIDING = {**_LLAMA, "model_type": "gemma2", "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "memory_decoder": {"model": _LLAMA},
    "memory_decoder_gpt2": {
        "model": {**_GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "alpha": 0.6
    },
    "memory_decoder_gemma2": {"model": _SLIDING},
}  # fmt: skip
