"""PMI on generated stories of bAbI's first task: one fact a segment, then a question that stands in the last alone."""

from itertools import islice

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import mnemic
from mnemic.benchmarks.babi.generator import stream
from mnemic.memories.recurrent.pmi import PMI

FACTS, SEGMENT = 3, 8


def stories(seed: int, split: str, count: int) -> list[list[str]]:
    """Rows of (FACTS + 1) * SEGMENT words; the answer is the last. Who is asked about was named in the last FACTS
    facts."""
    words = lambda text: text.replace(".", " .").replace("?", " ?").split()  # noqa: E731
    rows = []
    told = (s for s in stream("qa1", seed, split) if 0 <= len(s.facts) - FACTS <= s.supporting[0])
    for sample in islice(told, count):
        parts = [*map(words, sample.facts[-FACTS:]), [*words(sample.question), sample.answer]]
        rows.append([word for part in parts for word in ["."] * (SEGMENT - len(part)) + part])
    return rows


def accuracy(steps: int = 150) -> float:
    """After training, on 512 stories that were not trained on."""
    texts = stories(0, "train", 4096), stories(1, "test", 512)
    numbers = {word: i for i, word in enumerate(sorted({word for rows in texts for row in rows for word in row}))}
    train, test = (torch.tensor([[numbers[word] for word in row] for row in rows]) for rows in texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(numbers), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.04,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = mnemic.attach(config, "pmi", segment=SEGMENT, num_heads=4).train()
    make, rate = torch.Generator().manual_seed(1), 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def answers(ids: Tensor, **given: Tensor):
        return model(ids, use_cache=False, logits_to_keep=2, **given)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50)
        ids = train[torch.randint(len(train), (32,), generator=make)]
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        optimizer.zero_grad()
        answers(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((answers(test).logits[:, 0].argmax(-1) == test[:, -1]).float().mean())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_it_answers_from_facts_that_only_its_memory_holds(monkeypatch):
    """Six places: a guess is right with probability 0.17. Measured: 0.469 and 0.172."""
    written = accuracy()
    monkeypatch.setattr(PMI, "commit", lambda self, state, segment: state)
    frozen = accuracy()
    assert frozen < 0.25
    assert written > frozen + 0.2
