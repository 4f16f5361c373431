"""A host of one block whose LM2 reads what was planted: token v reads slot `ORDER[v - FIRST]` and hardly any other."""

import torch

import mnemic
from tests.tiny import tiny_host

SLOTS, FIRST, SEGMENT, SHARP = 12, 3, 32, 25.0
ORDER = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(3))
"""By token, the slot that it reads."""


def planted(*, segment: int = SEGMENT, **options):
    """Tokens FIRST ... FIRST + SLOTS - 1 are unit vectors, the bank begins as unit vectors, and W_Q is ORDER."""
    model = tiny_host("llama", num_hidden_layers=1)
    model = mnemic.attach(
        model,
        "lm2",
        segment=segment,
        num_slots=SLOTS,
        num_heads=1,
        norm=False,
        query_source="residual",
        identity_start=False,
        **options,
    )
    width = model.config.hidden_size
    turned = torch.zeros(width, width)
    turned[torch.arange(SLOTS), ORDER] = SHARP
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[FIRST : FIRST + SLOTS] = torch.eye(SLOTS, width)
        model.memory.query.weight[0].copy_(turned)
        model.memory.key.weight[0].copy_(torch.eye(width))
        model.memory.value.weight[0].mul_(4)
    return model.eval()


def slots_of(ids):
    """The slots that these tokens read."""
    return [int(ORDER[i - FIRST]) for i in ids]


def some_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(FIRST, FIRST + SLOTS, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
