"""The host of all measurements: a fresh Llama, heads of width 32 unless said otherwise."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

VOCABULARY = 2048


def plain_llama(
    width: int, layers: int, heads: int | None = None, *, vocabulary: int = VOCABULARY, positions: int = 8192
) -> Any:
    """Equal arguments give equal weights."""
    torch.manual_seed(0)
    heads = width // 32 if heads is None else heads
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)
