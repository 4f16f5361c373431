"""Held-out text: the loss of a language model on documents it was not trained on, with what it remembers and without.

Both losses are over the same tokens: all but the first of every segment, which has nothing before it in its segment.
Carried, a document is read as one stream; without, every segment begins with a new state.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import InputError
from ..hosts import base_model

KINDS = ("carried", "anew")


def evaluate_text(
    model: Any, documents: Sequence[Sequence[int]], *, batch_size: int = 8, progress: bool = False
) -> list[dict[str, Any]]:
    """Losses of documents of token ids.

    Returns: one record a document, in order: tokens predicted, the sums of their losses (nats) "carried" and "anew".

    Raises:
        InputError: no document has two tokens.
    """
    base = base_model(model)
    base.eval()
    order = sorted((i for i, d in enumerate(documents) if len(d) > 1), key=lambda i: -len(documents[i]))
    if not order:
        raise InputError("No held-out document has two tokens, so there is nothing to predict.")
    found: dict[int, dict[str, Any]] = {}
    starts = range(0, len(order), batch_size)
    for start in track(starts, description="held-out text", disable=not progress):
        group = order[start : start + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor([int(t) for t in documents[i]]) for i in group], batch_first=True
        )
        lengths = torch.tensor([len(documents[i]) for i in group])
        sums = {kind: _sums(base, ids, lengths, carried=kind == "carried") for kind in KINDS}
        for row, i in enumerate(group):
            found[i] = {"tokens": int(sums["carried"][1][row])} | {k: float(sums[k][0][row]) for k in KINDS}
    return [found[i] for i in sorted(found)]


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Loss and perplexity a token of both kinds, and the gain of carrying (nats) with the half-width of its 95%
    interval over documents (ratio estimator); None for one document."""
    tokens = sum(r["tokens"] for r in records)
    if not tokens:
        raise InputError("No held-out document has two tokens in one segment, so there is nothing to predict.")
    loss = {kind: sum(r[kind] for r in records) / tokens for kind in KINDS}
    gain, count = loss["anew"] - loss["carried"], len(records)
    spread = sum((r["anew"] - r["carried"] - gain * r["tokens"]) ** 2 for r in records)
    interval = 1.96 * math.sqrt(spread * count / (count - 1)) / tokens if count > 1 else None
    scores = [{"state": kind, "loss": loss[kind], "perplexity": math.exp(min(loss[kind], 700))} for kind in KINDS]
    return {"documents": count, "tokens": tokens, "scores": scores, "gain": gain, "interval": interval}


@torch.no_grad()
def _sums(base: Any, ids: Tensor, lengths: Tensor, *, carried: bool) -> tuple[Tensor, Tensor]:
    """Sums of losses (B,) float64 and numbers of tokens (B,) over right-padded ids (B, n)."""
    segment, cache = base.mnemic.layout.segment, None
    total, count = torch.zeros(len(ids), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.long)
    for start in range(0, ids.shape[1], segment):
        part = ids[:, start : start + segment].to(base.device)
        mask = (start + torch.arange(part.shape[1]) < lengths[:, None]).to(base.device)
        output = base(part, attention_mask=mask.long(), past_key_values=cache, use_cache=True)
        cache = output.past_key_values if carried else None
        losses = F.cross_entropy(output.logits[:, :-1].float().transpose(1, 2), part[:, 1:], reduction="none")
        total += (losses.double() * mask[:, 1:]).sum(1).cpu()
        count += mask[:, 1:].sum(1).cpu()
    return total, count
