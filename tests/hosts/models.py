"""Models with memory for the tests of hosts, and the slow way to do what streams do."""

from typing import Any

import torch
from torch import Tensor

import mnemic
from tests.tiny import VOCABULARY, tiny_host

SEGMENT = 8
MEMORIES: dict[str, dict[str, Any]] = {
    "none": {},
    "window": {},
    "lm2": {"preset": "default", "num_slots": 8},
    "rmt": {"num_tokens": 3},
}


def tiny_model(memory: str = "lm2", host: Any = "llama", seed: int = 0, segment: int = SEGMENT, **options: Any) -> Any:
    """A tiny host with a memory whose weights are large enough that what it remembers shows in the logits."""
    model = mnemic.attach(
        tiny_host(host) if isinstance(host, str) else host, memory, segment=segment, **{**MEMORIES[memory], **options}
    )
    stir(model, seed)
    return model


def stir(model: Any, seed: int = 0) -> None:
    """Random weights for the memory of `model`, in place."""
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def greedy(model: Any, ids: Tensor, count: int) -> list[int]:
    """`count` greedy tokens after `ids` (1, Q), everything recomputed for each of them."""
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, start:].tolist()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def word_tokenizer(bos: bool = False) -> Any:
    """One token a word: w3 .. w60; [PAD], [BOS] and [EOS] are 0, 1 and 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[BOS]", "[EOS]", *(f"w{i}" for i in range(3, VOCABULARY))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[PAD]"
    )


def words(ids: Any) -> str:
    return " ".join(f"w{i}" for i in ids)


def close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


def last(stream):
    return stream.cache.last_logits
