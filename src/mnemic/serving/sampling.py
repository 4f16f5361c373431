"""Choosing tokens for many rows at once, each with its own parameters and its own random numbers.

A row takes one number u, uniform in [0, 1), per token, and the token is where the cumulative distribution passes u. So
what a row draws depends on its seed and its logits alone, not on who else is in the batch.
"""

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .requests import SamplingParams

Logs = tuple[float, tuple[tuple[int, float], ...]]


class Sampler:
    """One answer on its way: its parameters, its random numbers, and how often it made which token."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self.random = random.Random(params.seed)
        self.made: Counter[int] = Counter()

    def uniform(self) -> float:
        """This token's random number."""
        return self.random.random() if self.params.temperature else 0.0

    def shifts(self) -> list[tuple[int, float]]:
        """(token, added to its logit)."""
        params = self.params
        found = list(params.logit_bias.items())
        if params.presence_penalty or params.frequency_penalty:
            found += [(t, -params.presence_penalty - n * params.frequency_penalty) for t, n in self.made.items()]
        return found


def choose(logits: Tensor, samplers: Sequence[Sampler], uniform: Sequence[float]) -> list[int]:
    """The next token of each row, from logits (B, V) and a random number each."""
    logits = _shifted(logits.float(), samplers)
    tokens = logits.argmax(-1).tolist()
    drawing = [i for i, s in enumerate(samplers) if s.params.temperature > 0]
    narrow = {i for i in drawing if samplers[i].params.top_k or samplers[i].params.top_p < 1}
    for rows, draw in (([i for i in drawing if i not in narrow], _draw), (sorted(narrow), _draw_narrow)):
        if rows:
            given = [samplers[i].params for i in rows]
            scale = logits.new_tensor([p.temperature for p in given])[:, None]
            shares = logits.new_tensor([uniform[i] for i in rows])[:, None]
            # Shifted first: small temperatures would overflow.
            scores = logits[rows]
            scores = (scores - scores.amax(-1, keepdim=True)) / scale
            for i, token in zip(rows, draw(scores, shares, given).tolist(), strict=True):
                tokens[i] = token
    return tokens


def log_probabilities(logits: Tensor, tokens: Sequence[int], tops: Sequence[int | None]) -> list[Logs | None]:
    """For rows with `tops` not None: the token's log-probability, and the likeliest ids with theirs."""
    rows = [i for i, top in enumerate(tops) if top is not None]
    found: list[Logs | None] = [None] * len(tops)
    if not rows:
        return found
    logs = logits[rows].float().log_softmax(-1)
    chosen = logs.gather(1, torch.tensor([[tokens[i]] for i in rows], device=logs.device))[:, 0].tolist()
    values, ids = logs.topk(min(max(tops[i] or 0 for i in rows), logs.shape[1]))
    for i, own, row_values, row_ids in zip(rows, chosen, values.tolist(), ids.tolist(), strict=True):
        best = list(zip(row_ids, row_values, strict=True))[: tops[i]]
        found[i] = own, tuple(best)
    return found


def _shifted(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    shifts = [(i, token, by) for i, s in enumerate(samplers) for token, by in s.shifts()]
    if not shifts:
        return logits
    rows, tokens, by = zip(*shifts, strict=True)
    index = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
    return logits.index_put(index, logits.new_tensor(by), accumulate=True)


def _draw(scores: Tensor, uniform: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    return _inverse(scores.softmax(-1), uniform)


def _draw_narrow(scores: Tensor, uniform: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    size = scores.shape[1]
    kept = [p.top_k or size for p in params]
    ordered, order = (
        scores.topk(min(max(kept), size)) if max(kept) < size else scores.sort(descending=True, stable=True)
    )
    count = torch.tensor(kept, device=scores.device)[:, None]
    ordered = ordered.masked_fill(torch.arange(ordered.shape[1], device=scores.device) >= count, -torch.inf)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = before >= scores.new_tensor([p.top_p for p in params])[:, None]
    # The likeliest token stays, however small top_p is.
    outside[:, 0] = False
    return order.gather(1, _inverse(probabilities.masked_fill(outside, 0), uniform)[:, None])[:, 0]


def _inverse(weights: Tensor, uniform: Tensor) -> Tensor:
    """Where the running sum of weights (B, n) passes a share `uniform` (B, 1) of the whole; never at a weight of 0."""
    sums = weights.cumsum(-1)
    whole = sums[:, -1:]
    # A share close to 1 may round to 1.
    point = torch.minimum(uniform * whole, whole.nextafter(torch.zeros_like(whole)))
    return torch.searchsorted(sums, point, right=True)[:, 0]
