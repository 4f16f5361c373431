"""Memorize, and Detect & memorize: one fact in a long text, asked for at its end (as in arXiv 2304.11062, in toy form).

A text is filler tokens; somewhere stand a mark and one of 8 values behind it, the last token asks. `memorize` has the
fact at the very start, `detect` at a random place outside of the last segment (in texts of one segment, inside it). The
answer is the value, a class of the text: without memory, texts of several segments are at chance, 12.5%.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import mnemic
from mnemic.core.state import State

SEGMENT, VALUES = 16, 8
CLS, SEP, MARK, ASK = 1, 2, 3, 4
FIRST_VALUE, FIRST_FILLER, VOCABULARY = 5, 13, 45


def texts(rows: int, segments: int, place: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (rows, segments * SEGMENT), the value of each (rows,), and the column of its fact."""
    length = segments * SEGMENT
    ids = torch.randint(FIRST_FILLER, VOCABULARY, (rows, length), generator=generator)
    values = torch.randint(VALUES, (rows,), generator=generator)
    last = SEGMENT - 3 if segments == 1 else (segments - 1) * SEGMENT - 1
    columns = torch.zeros(rows, dtype=torch.long)
    if place == "detect":
        columns = torch.randint(last, (rows,), generator=generator)
    row = torch.arange(rows)
    ids[row, columns], ids[row, columns + 1], ids[:, -1] = MARK, FIRST_VALUE + values, ASK
    return ids, values, columns


def encoder(seed: int = 0, dropout: float = 0.25) -> Any:
    """A fresh BERT of 2 layers and width 64 with a head of 8 classes."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": VALUES,
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
    }  # fmt: skip
    return BertForSequenceClassification(BertConfig(**settings))


def set_dropout(model: Any, rate: float) -> None:
    """Of the whole host."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate


def with_memory(host: Any, tokens: int = 4) -> Any:
    return mnemic.attach(host, "rmt-1m", segment=SEGMENT, num_tokens=tokens, cls_id=CLS, sep_id=SEP)


class Training:
    """AdamW, warm-up of 100 steps, gradients clipped by value at 5; draws and weights follow the seed."""

    def __init__(self, model: Any, place: str, *, rate: float = 1e-3, rows: int = 32, seed: int = 1):
        self.model, self.place, self.rate, self.rows = model, place, rate, rows
        self.draw = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
        self.steps = 0

    def stage(self, least: int, most: int, steps: int, *, last_rate: float = 1.0) -> None:
        """Texts of `least` to `most` segments, each from a new state; the rate falls linearly to `last_rate` of it."""
        for step in range(steps):
            ids, values, _ = texts(self.rows, self._segments(least, most), self.place, self.draw)
            self._learn(1 - (1 - last_rate) * step / steps, input_ids=ids, labels=values)

    def carried(self, most: int, steps: int, *, anew: float = 0.1, noise: float = 0.3, last_rate: float = 1.0) -> None:
        """As `stage`, but a row goes on from the state of the call before, without gradient to it and without another
        fact; the share `anew` of the rows, and those that answered wrongly, begin again.

        noise: Gaussian noise is added to the states, its standard deviation drawn from 0 to this for each row: what is
        stored must be where the network comes back to, or it fades over thousands of segments.
        """
        state, known, wrong = None, torch.zeros(self.rows, dtype=torch.long), torch.ones(self.rows, dtype=torch.bool)
        for step in range(steps):
            ids, values, columns = texts(self.rows, self._segments(1, most), self.place, self.draw)
            first = wrong | (torch.rand(self.rows, generator=self.draw) < anew)
            row = (~first).nonzero().squeeze(1)
            for column in (columns[row], columns[row] + 1):
                ids[row, column] = torch.randint(FIRST_FILLER, VOCABULARY, (len(row),), generator=self.draw)
            known = torch.where(first, values, known)
            given: dict[str, Any] = {"input_ids": ids, "labels": known}
            if state is not None:
                size = noise * torch.rand(self.rows, 1, 1, generator=self.draw)
                noisy = {name: t + size * torch.randn(t.shape, generator=self.draw) for name, t in state.items()}
                given |= {"memory_state": State(noisy), "memory_reset": first}
            output = self._learn(1 - (1 - last_rate) * step / steps, **given)
            state, wrong = output.memory_state.detach(), output.logits.argmax(-1) != known

    def _segments(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=self.draw))

    def _learn(self, rate: float, **inputs: Any) -> Any:
        self.model.train()
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate * min(1.0, self.steps / 100)
        output = self.model(**inputs)
        self.optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_value_(self.model.parameters(), 5.0)
        self.optimizer.step()
        return output


@torch.no_grad()
def accuracy(model: Any, segments: int, place: str, rows: int = 512, seed: int = 99, **options: Any) -> float:
    """Share of right answers over texts of so many segments; options: of the model's call."""
    model.eval()
    ids, values, _ = texts(rows, segments, place, torch.Generator().manual_seed(seed))
    return float((model(ids, **options).logits.argmax(-1) == values).float().mean())
