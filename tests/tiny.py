"""Tiny hosts: the ten architectures that the contract runs on, two layers wide enough to be real."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 61
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

HOSTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "gpt2": _GPT2,
    "gpt_neox": {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "head_dim")},
    "qwen3": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 16},
    "gemma2": {**_COMMON, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "olmo2": _COMMON,
    "phi3": _COMMON,
    "opt": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "dropout": 0.0,
    },
    "qwen3_moe": {
        **_COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
    },
}  # fmt: skip


def host_config(name: str, **changes: Any) -> Any:
    return AutoConfig.for_model(name, **{**HOSTS[name], **changes})


def tiny_host(name: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A fresh host in eval mode; weights large enough that differences show in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(host_config(name, initializer_range=0.15, **changes))
    # Dropout and special tokens would hide differences.
    model.generation_config.eos_token_id = None
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key in ("attention_dropout", "attn_pdrop", "dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if hasattr(model.config, key):
            setattr(model.config, key, 0.0)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
