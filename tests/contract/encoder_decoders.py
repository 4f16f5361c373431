"""Tiny encoder-decoders, and the memories that stand on them."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import mnemic
from tests.tiny import VOCABULARY

SEGMENT, SLOTS = 8, 4
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "init_std": 0.15, "scale_embedding": True,
}  # fmt: skip
HOSTS: dict[str, dict[str, Any]] = {
    "bart": _COMMON,
    "t5": {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
        "initializer_factor": 1.0,
    },
    "marian": {**_COMMON, "decoder_vocab_size": VOCABULARY},
    "mbart": _COMMON,
    "pegasus": _COMMON,
}  # fmt: skip
"""Marian and Pegasus scale embeddings outside of their table; mBART and Pegasus normalise first."""
MEMORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "membart": ("membart", {"num_slots": SLOTS}),
    "memformer": ("memformer", {"num_slots": SLOTS, "preset": "default"}),
}
PAIRS = [("membart", h) for h in HOSTS if h != "t5"] + [("memformer", h) for h in ("bart", "t5", "pegasus")]
pairs = pytest.mark.parametrize("memory, host", PAIRS, ids=["-".join(p) for p in PAIRS])


def tiny_encoder_decoder(name: str = "bart", **changes: Any) -> Any:
    """A fresh encoder-decoder in eval mode, without dropout, that ends no text by itself."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **{**HOSTS[name], **changes}))
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # Norms and biases that are not ones and zeros, so that none can be left out.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def build(memory: str = "membart", host: str = "bart", noise: float = 0.2, **changes: Any) -> Any:
    """An attached encoder-decoder; noise on the memory's weights, so that no part of it is hidden by a zero."""
    name, options = MEMORIES[memory]
    model = tiny_encoder_decoder(host, **changes)
    torch.manual_seed(2)
    model = mnemic.attach(model, name, segment=SEGMENT, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * noise)
    return model
