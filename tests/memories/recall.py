"""Multi-query recall (MQAR, arXiv 2312.04927): pairs of a key and its value, then questions for all of them.

    K V K V ... K V . . . . . K V . . K V . K V ...
    0            2 * pairs    |asked: the second half, each key once, in random order and at random even places
                               label at V; the model shifts, so V is predicted from K

Vocabulary: 0 is filler, the lower half holds keys, the upper half values. A guess is right with probability
2 / vocabulary. With the default sizes the nearest pair is 17 tokens away from a question: two layers that see 8 tokens
each cannot reach it.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def multi_query_recall(
    batch: int, seed: int | torch.Generator, *, vocabulary: int = 64, pairs: int = 8, length: int = 64
) -> tuple[Tensor, Tensor]:
    """ids and labels (batch, length) int64, labels -100 but at the asked values; equal seeds give equal rows."""
    make = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    values, slots = vocabulary // 2, length // 4
    if pairs >= values or pairs > slots or length % 4 or 4 * pairs > length:
        raise ValueError(f"{pairs} pairs do not fit {length} tokens (a multiple of 4) of {vocabulary} kinds.")
    rows = torch.arange(batch)[:, None]
    keys = 1 + torch.rand(batch, values - 1, generator=make).argsort(1)[:, :pairs]
    bound = torch.randint(values, vocabulary, (batch, pairs), generator=make)
    ids = torch.zeros(batch, length, dtype=torch.long)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, bound
    # The random slots come in random order, so that the questions do too.
    asked = length // 2 + 2 * torch.rand(batch, slots, generator=make).argsort(1)[:, :pairs]
    ids[rows, asked], ids[rows, asked + 1] = keys, bound
    labels = torch.full_like(ids, -100)
    labels[rows, asked + 1] = bound
    return ids, labels


@torch.no_grad()
def recall_accuracy(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> float:
    """Share of the asked values that the model ranks first."""
    best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] >= 0
    return float((best == labels[:, 1:])[asked].float().mean())


def train_recall(model: PreTrainedModel, steps: int = 250, batch: int = 32, lr: float = 2e-3, seed: int = 0) -> float:
    """AdamW on fresh rows at every step; returns the accuracy on 256 rows that were not trained on."""
    make = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        ids, labels = multi_query_recall(batch, make)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
    model.eval()
    return recall_accuracy(model, *multi_query_recall(256, seed + 10_000))
