"""Facts in short segments, asked at the end of the text: one fact in each, of different keys.

    . . K V | . . K V | ... | K V K V K V K V
                               labels at each V; the model shifts

Vocabulary: 0 to 7 are filler, then 8 keys, then 8 values. A guess is right with probability 1 / 8.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

KEYS, VALUES, FILLERS = 8, 8, 8
FACTS, ASKED, SEGMENT = 6, 4, 4
HISTORY = FACTS * SEGMENT


def facts(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids and labels (batch, 6 * 4 + 8) int64; equal generator states give equal rows. Six keys with a value each,
    of which four are asked."""
    rows = torch.arange(batch)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    shuffled = lambda n: torch.rand(batch, n, generator=generator).argsort(1)  # noqa: E731
    keys = shuffled(KEYS)[:, :FACTS]
    values = draw(VALUES, batch, FACTS)
    ids = draw(FILLERS, batch, HISTORY)
    ids[:, SEGMENT - 2 :: SEGMENT], ids[:, SEGMENT - 1 :: SEGMENT] = FILLERS + keys, FILLERS + KEYS + values
    latest = torch.full((batch, KEYS), -1)
    for i in range(FACTS):
        latest[rows, keys[:, i]] = values[:, i]
    # Keys that occurred, in random order.
    asked = (torch.rand(batch, KEYS, generator=generator) + (latest < 0) * 2).argsort(1)[:, :ASKED]
    questions = torch.stack([FILLERS + asked, FILLERS + KEYS + latest.gather(1, asked)], dim=-1).flatten(1)
    labels = torch.full((batch, HISTORY + 2 * ASKED), -100)
    labels[:, HISTORY + 1 :: 2] = questions[:, 1::2]
    return torch.cat([ids, questions], dim=1), labels


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=FILLERS + KEYS + VALUES, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.1, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train_facts(model: torch.nn.Module, forward: Callable, steps: int, lr: float, batch: int = 64) -> None:
    """AdamW on what is to be trained, on fresh rows at every step."""
    make = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        ids, labels = facts(batch, make)
        optimizer.zero_grad()
        forward(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def fact_accuracy(model: torch.nn.Module, history: bool = True) -> float:
    """Share of 4,096 answers, of rows that were not trained on, that the model ranks first."""
    ids, labels = facts(1024, torch.Generator().manual_seed(10_000))
    start = 0 if history else HISTORY
    best = model(input_ids=ids[:, start:], use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, start + 1 :] >= 0
    return float((best == labels[:, start + 1 :])[asked].float().mean())
