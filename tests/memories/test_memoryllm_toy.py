"""MemoryLLM learns to answer from its pool, and forgets as the retention law says."""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

import mnemic

PAIRS, SEGMENT, BLOCKS = 8, 16, 4
FILLER, KEYS, VALUES = 1, 9, 17
CHANCE = 1 / 8


def batch(
    rows: int, generator: torch.Generator, distractors: int, inject: bool = True, fill: bool = True
) -> tuple[Tensor, Tensor]:
    """Ids of [filler | 8 pairs | distractors | the pairs in another order] and labels of the last values.

    With `fill` the first segment fills the pool, so that every state of the pairs stands there once.
    """
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    keys = KEYS + torch.rand(rows, PAIRS, generator=generator).argsort(1)
    values = VALUES + draw(8, rows, PAIRS)
    order = torch.rand(rows, PAIRS, generator=generator).argsort(1)
    facts = torch.stack([keys, values], 2).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
    told = [facts] if inject else []
    fillers = FILLER + draw(8, rows, SEGMENT * (1 + distractors))
    ahead = [fillers[:, :SEGMENT]] if fill else []
    ids = torch.cat([*ahead, *told, fillers[:, SEGMENT:], asked], 1)
    labels = torch.full_like(ids, -100)
    labels[:, 1 - SEGMENT :: 2] = ids[:, 1 - SEGMENT :: 2]
    return ids, labels


def accuracy(model, distractors: int, inject: bool = True, rows: int = 256) -> float:
    ids, labels = batch(rows, torch.Generator().manual_seed(99), distractors, inject)
    model.eval()
    # Every row drops in its own way: the law is about the mean.
    state = mnemic.State({**model.memory.initial_state(rows), "seed": torch.arange(rows)})
    with torch.no_grad():
        guess = model(ids, memory_state=state, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] != -100
    return float((guess == labels[:, 1:])[asked].double().mean())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pairs_are_recalled_and_forgotten_by_the_law():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=VALUES + 8, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=False, initializer_range=0.04,
    )  # fmt: skip
    options = {"new_states": SEGMENT, "blocks": BLOCKS, "dropout": 0.0}
    model = mnemic.attach(config, "memoryllm", segment=SEGMENT, **options).train()
    steps, loss, generator = 200, torch.zeros(()), torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min(1, (s + 1) / 30) * (1 - 0.9 * s / steps))
    for step in range(steps):
        fill = step >= steps // 2
        distractors = int(torch.randint(3, (), generator=generator)) if fill else 0
        ids, labels = batch(48, generator, distractors, fill=fill)
        loss = model(ids, labels=labels, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    found = {d: accuracy(model, d) for d in (0, 1, 2, 4, 8, 16)}
    without = accuracy(model, 0, inject=False)
    print(f"loss {float(loss.detach()):.3f}, accuracy after distractors {found}, without the pairs {without:.3f}")
    assert found[0] > 0.9
    assert abs(without - CHANCE) < 0.05
    for distractors, got in found.items():
        # A pair is read from either of two layers, which drop on their own: it is lost when both states are.
        alive = (1 - 1 / BLOCKS) ** distractors
        law = CHANCE + (1 - CHANCE) * (1 - (1 - alive) ** 2)
        assert abs(got - law) < 0.1, (distractors, got, law)
