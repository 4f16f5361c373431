"""Cross-entropy over a vocabulary, a chunk of tokens at a time: the logits of all tokens never exist together.

Each chunk's logits are made, reduced to a sum, and made again in the backward pass. The mean is the sum of all chunks
over the number of labels, so that chunks with few labels do not count for more. (Blockwise Parallel Transformer, 2023,
arXiv 2305.19370, section 3; its published code averages the means of chunks.)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100


def chunked_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    chunk: int,
    count: Tensor | int | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    """Mean of -log softmax(head(hidden))[label] over the labels that count, in float32 or wider.

    Args:
        hidden: (..., d). head: (n, d) -> logits (n, V); its parameters get their gradients, and it runs twice.
        labels: (...) int64, already shifted. chunk: tokens whose logits exist at a time.
        count: what the sum is divided by; None for the number of labels that are not `ignore_index`.

    Returns: a scalar; nan where no label counts and no `count` is given, as torch's own.

    Raises:
        ValueError: labels of another shape than the hidden states, or a chunk below 1.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}: one a token.")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}, expected a number of tokens of at least 1.")
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    parts = [
        checkpoint(_summed, head, part, target, ignore_index, use_reentrant=False)
        for part, target in zip(rows.split(chunk), targets.split(chunk), strict=True)
    ]
    total = torch.stack(parts).sum()
    return total / ((targets != ignore_index).sum() if count is None else count)


def cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, ignore_index: int = IGNORED
) -> Tensor:
    """The reference: all logits at once."""
    logits = _wide(head(hidden.reshape(-1, hidden.shape[-1])))
    return F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore_index)


def _summed(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(_wide(head(hidden)), labels, ignore_index=ignore_index, reduction="sum")


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
