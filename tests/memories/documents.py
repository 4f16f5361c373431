"""Keys and values of a document, asked for again: recall within a segment and across its borders."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

import mnemic


def documents(rows: int, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """64 pairs of tokens (key of 32, of which a document uses 16; value of 16, bound to the key for the document), and
    for each pair the segment of 32 tokens in which the key was last seen: -1 for none."""
    keys = torch.rand(rows, 32, generator=make).argsort(1)[:, :16]
    bound = torch.randint(16, (rows, 16), generator=make)
    drawn = torch.randint(16, (rows, 64), generator=make)
    ids = torch.stack([keys.gather(1, drawn), 32 + bound.gather(1, drawn)], dim=-1).flatten(1)
    same = drawn[:, :, None] == drawn[:, None, :]
    earlier = torch.where(same.tril(-1), torch.arange(64), -1).amax(-1)
    return ids, earlier.div(16, rounding_mode="floor")


def train_toy(memory: str, steps: int, options: dict[str, Any]) -> tuple[float, float]:
    """Accuracy on values whose key was last seen in an earlier segment, and in the same one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.06, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = mnemic.attach(config, memory, segment=32, **options)
    # With embeddings as small as the other weights, recall within a segment is not learned in 500 steps either.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    make = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        ids, seen = documents(16, make)
        labels = torch.full_like(ids, -100)
        labels[:, 1::2] = ids[:, 1::2].masked_fill(seen < 0, -100)
        model(ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return toy_accuracy(model)


@torch.no_grad()
def toy_accuracy(model: Any) -> tuple[float, float]:
    ids, seen = documents(64, torch.Generator().manual_seed(2))
    best = model.eval()(ids, use_cache=False).logits[:, ::2].argmax(-1)
    right, here = best == ids[:, 1::2], torch.arange(64) // 16
    across, within = (float(right[where].float().mean()) for where in ((seen >= 0) & (seen < here), seen == here))
    return across, within
