"""Importance of slots: what the loss of an answer is with a slot's part in reads suppressed, or its content gone.

Source: AtMan (arXiv 2301.08110): the scores of what is explained are multiplied by a factor in all layers, and its
relevance is the loss then less the loss before, so that what matters is positive. Here the factor is on the odds
(score + log factor): the paper's product raises negative scores, which the authors' code avoids by a shift. A factor of
0 leaves the slot out, and the others share its weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.state import State
from ..hosts import Stream
from .reports import require

FACTOR = 0.1
"""The paper's suppression of 0.9."""


@dataclass(frozen=True)
class Importance:
    """bank: the slots are of. slots: (K,) their numbers. loss: (n,) of each answer token, nats, with nothing changed.
    change: (K, n) loss with the slot changed, less that."""

    bank: str
    slots: tuple[int, ...]
    loss: Tensor
    change: Tensor

    @property
    def total(self) -> Tensor:
        """(K,) of the whole answer: AtMan's relevance."""
        return self.change.sum(1)


def suppressed(
    stream: Stream, prompt: Sequence[int], answer: Sequence[int], *, bank: str | None = None,
    slots: Sequence[int] | None = None, factor: float = FACTOR, rows: int = 32,
) -> Importance:  # fmt: skip
    """Suppresses each slot in turn in all reads of the prompt and the answer; what was fed before stays as it is.

    Args:
        stream: of one row, which has read the context; it is left as it is. prompt, answer: ids; the loss is of the
            answer. The prompt may be empty where the stream has read something.
        bank: by name (`Memory.banks`); the first by default. slots: all by default. factor: at least 0; 1 changes
            nothing. rows: slots tried side by side.

    Raises:
        UnsupportedError: the memory's tokens read no slots. InputError: no such slot, no answer, an unusable factor.
    """
    require(stream.base.memory, "importance")
    if not 0 <= factor < float("inf"):
        raise InputError(f"factor = {factor}; expected at least 0, such as {FACTOR}.")
    bank, count = _bank(stream, bank)
    if factor == 0 and count == 1:
        raise InputError("The only slot of a bank cannot be left out of reads; use a factor above 0.")

    def change(work: Stream, group: Tensor) -> None:
        factors = torch.ones(len(group), count)
        factors[torch.arange(len(group)), group] = factor
        work.cache.slot_factors = {bank: factors.to(stream.base.device)}

    return _measured(stream, prompt, answer, bank, _chosen(slots, count), rows, change)


def zeroed(
    stream: Stream, prompt: Sequence[int], answer: Sequence[int], *, bank: str | None = None,
    slots: Sequence[int] | None = None, rows: int = 32,
) -> Importance:  # fmt: skip
    """Sets each slot in turn to zeros, for any memory whose state holds slots. Arguments and errors as `suppressed`.

    Commits behind that write to the slot again.
    """
    memory = stream.base.memory
    require(memory, "zeroing")
    bank, count = _bank(stream, bank)

    def change(work: Stream, group: Tensor) -> None:
        work.cache.state, work.cache.reads = without(memory, work.state, bank, group), None

    return _measured(stream, prompt, answer, bank, _chosen(slots, count), rows, change)


def without(memory: Any, state: State, bank: str, slots: Tensor) -> State:
    """The state with slot `slots[b]` of the bank set to zeros in row b."""
    name = next(n for n in memory.slot_dims if bank == n or bank.startswith(f"{n}/"))
    tensor, dim = state[name], memory.slot_dims[name]
    changed = (tensor.flatten(1, dim - 1) if dim > 1 else tensor[:, None]).clone()
    changed[torch.arange(len(slots)), int(bank.removeprefix(f"{name}/")) if dim > 1 else 0, slots] = 0
    return State({**state, name: changed.reshape(tensor.shape)})


def _measured(
    stream: Stream, prompt: Sequence[int], answer: Sequence[int], bank: str, slots: list[int], rows: int, change: Any
) -> Importance:
    if stream.batch_size != 1:
        raise InputError(f"Slots are explained in one row; this stream has {stream.batch_size}.")
    if not len(answer) or (not len(prompt) and stream.cache.last_logits is None):
        raise InputError("Give an answer of at least one token, and a prompt where the stream has read nothing.")
    plain = _losses(stream.fork(), prompt, answer)
    found = []
    for start in range(0, len(slots), rows):
        group = slots[start : start + rows]
        work = stream.select([0] * len(group))
        change(work, torch.tensor(group))
        found.append(_losses(work, prompt, answer) - plain)
    return Importance(bank, tuple(slots), plain[0], torch.cat(found))


def _losses(stream: Stream, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Loss of each answer token by row, (B, n) float32."""

    def row(ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(ids)).expand(stream.batch_size, -1)

    if len(prompt):
        stream.feed(row(prompt))
    assert stream.cache.last_logits is not None
    first, ids = stream.cache.last_logits[:, None].cpu(), row(answer)
    logits = torch.cat([first, stream.feed(ids, return_logits=True)[:, :-1]], dim=1)
    return -logits.float().log_softmax(-1).gather(2, ids[:, :, None]).squeeze(2)


def _bank(stream: Stream, name: str | None) -> tuple[str, int]:
    """The bank's name and its number of slots."""
    banks = stream.base.memory.banks(stream.state)
    name = next(iter(banks)) if name is None else name
    if name not in banks:
        raise InputError(f"No bank of slots is called {name!r}; there are {', '.join(banks)}.")
    return name, banks[name].shape[1]


def _chosen(slots: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if slots is None else list(slots)
    if not chosen or any(not 0 <= slot < count for slot in chosen):
        raise InputError(f"slots = {chosen}; expected some numbers from 0 to {count - 1}.")
    return chosen
