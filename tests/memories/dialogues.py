"""Dialogues in which a name of the first turn is asked for in the last."""

from typing import Any

import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

NAMES, FILLERS = 16, 12
PAD, START, NAME, ASK = 0, 1, 2, 3
_FIRST_NAME, _FIRST_FILLER = 4, 4 + NAMES
WORDS = _FIRST_FILLER + FILLERS


def dialogue(rows: int, turns: int, length: int, generator: torch.Generator) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Turns of `length` tokens: the first states a name somewhere in filler, the last asks for it and has the labels
    (rows, 1), between them is filler. Also the names (rows,)."""
    names = torch.randint(NAMES, (rows,), generator=generator) + _FIRST_NAME
    ids = torch.randint(_FIRST_FILLER, WORDS, (turns, rows, length), generator=generator)
    place = torch.randint(length - 1, (rows,), generator=generator)
    row = torch.arange(rows)
    ids[0, row, place], ids[0, row, place + 1] = torch.tensor(NAME), names
    ids[-1, row, torch.randint(length, (rows,), generator=generator)] = ASK
    found: list[dict[str, Tensor]] = [{"input_ids": turn} for turn in ids]
    found[-1]["labels"] = names[:, None]
    return found, names


def tiny_bart(width: int = 64, layers: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=WORDS, d_model=width, encoder_layers=layers, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width, max_position_embeddings=16,
        pad_token_id=PAD, bos_token_id=START, eos_token_id=None, decoder_start_token_id=START,
        forced_eos_token_id=None, dropout=0.0, init_std=width**-0.5,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


@torch.no_grad()
def accuracy(model: Any, turns: int, length: int, *, carry: bool = True, rows: int = 512) -> float:
    """Share of the names that are answered right, over dialogues that were not trained on."""
    model.eval()
    given, names = dialogue(rows, turns, length, torch.Generator().manual_seed(10_000))
    state: Any = None
    output: Any = None
    for turn in given:
        output = model.read(turn["input_ids"], memory_state=state if carry else None)
        state = output.memory_state
    start = torch.full((rows, 1), START)
    logits = model(encoder_outputs=output, decoder_input_ids=start).logits[:, -1]
    model.train()
    return float((logits.argmax(-1) == names).float().mean())
