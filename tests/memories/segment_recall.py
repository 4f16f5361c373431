"""The toy of RMT's card: a key and its value in the first segment, asked in the last; trained and measured."""

from typing import Any

import torch
from transformers import LlamaConfig

import mnemic
from mnemic.benchmarks.recall import RecallTask


def trained(
    memory: str, *, segment: int = 8, width: int = 32, steps: int = 250, law: tuple[int, int] = (2, 4),
    lr: float = 1e-3, batch: int = 64, truncation: Any = None, seed: int = 0, **options: Any,
) -> Any:  # fmt: skip
    """A model of 2 layers after `steps` of AdamW on rows of `law[0]` to `law[1]` segments, at random."""
    task = RecallTask(segment_length=segment)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=task.vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4, max_position_embeddings=128,
        tie_word_embeddings=False, initializer_range=0.04,
    )  # fmt: skip
    model = mnemic.attach(config, memory, segment=segment, **options)
    make = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20)
        segments = int(torch.randint(law[0], law[1] + 1, (), generator=make))
        rows = task.batch(batch, make, segments=segments)
        optimizer.zero_grad()
        model(
            rows.input_ids, labels=rows.labels, use_cache=False, logits_to_keep=2, truncation=truncation
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, segments: int, count: int = 512, seed: int = 99) -> float:
    """Share of values named over rows that were not trained on."""
    task = RecallTask(segment_length=model.mnemic.layout.segment)
    rows = task.batch(count, torch.Generator().manual_seed(seed), segments=segments)
    logits = model(rows.input_ids, use_cache=False, logits_to_keep=2).logits
    return float((logits[:, 0].argmax(-1) == rows.input_ids[:, -1]).float().mean())
