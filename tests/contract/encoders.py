"""Tiny encoders with a head, and the memories that stand on them."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import mnemic
from tests.tiny import VOCABULARY

SEGMENT, CLASSES, CLS, SEP = 8, 5, 1, 2
HEADS = {
    "text": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "vocabulary": AutoModelForMaskedLM,
}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.15, "num_labels": CLASSES,
}  # fmt: skip
HOSTS: dict[str, dict[str, Any]] = {
    "bert": _COMMON,
    "roberta": _COMMON,
    "electra": {**_COMMON, "embedding_size": 32},
    "modernbert": {**_COMMON, "cls_token_id": CLS, "sep_token_id": SEP, "local_attention": 12},
}
MEMORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "rmt_1m": ("rmt-1m", {"num_tokens": 3, "cls_id": CLS, "sep_id": SEP}),
    "rmt_1m_bare": ("rmt-1m", {"num_tokens": 3}),
    "rmt_1m_retrieve": ("rmt-1m", {"num_tokens": 3, "cls_id": CLS, "sep_id": SEP, "retrieve": True}),
    "memformer": ("memformer", {"num_slots": 4}),
}
PAIRS = [("rmt_1m", host) for host in HOSTS] + [(memory, "bert") for memory in MEMORIES if memory != "rmt_1m"]
pairs = pytest.mark.parametrize("memory, host", PAIRS, ids=["-".join(p) for p in PAIRS])


def tiny_encoder(name: str = "bert", head: str = "text", **changes: Any) -> Any:
    """A fresh encoder in eval mode, without dropout."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**HOSTS[name], **changes})
    model = HEADS[head].from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def build(memory: str, host: str = "bert", head: str = "text", noise: float = 0.2, **changes: Any) -> Any:
    """An attached encoder; noise on the memory's weights, so that no part of it is hidden by a zero."""
    name, options = MEMORIES[memory]
    model = tiny_encoder(host, head, **changes)
    torch.manual_seed(2)
    model = mnemic.attach(model, name, segment=SEGMENT, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * noise)
    return model
