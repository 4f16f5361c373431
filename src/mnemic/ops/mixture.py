"""Mixtures of two next-token distributions, and the loss that teaches one of them to imitate a nearest-neighbour one.

Shapes: N positions, V vocabulary, k neighbours. Everything is computed in float32, or float64 if the logits are.
Sources: kNN-LM (Khandelwal et al. 2020, arXiv 1911.00172), Memory Decoder (arXiv 2508.09874), MLP Memory
(arXiv 2508.01832).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def mix_logits(base: Tensor, memory: Tensor, alpha: float | Tensor) -> Tensor:
    """log(alpha p_memory + (1 - alpha) p_base) over the vocabulary that both share.

    Where one vocabulary is padded further than the other, both are cut to the smaller size and normalised again.

    Args:
        base: logits (..., V1). memory: logits (..., V2), same leading shape.
        alpha: weight of the memory in [0, 1]; or a tensor of weights that broadcasts to (..., 1), whose gradient is
            exact also at 0 and 1. Weights outside of [0, 1] in a tensor give NaN.

    Returns: log-probabilities (..., min(V1, V2)). With the number 0 or 1 for alpha and V1 = V2, `base` or `memory`
    itself, untouched: a distribution up to normalisation.

    Raises:
        ValueError: leading shapes differ, or the number alpha is outside of [0, 1].
    """
    if base.shape[:-1] != memory.shape[:-1]:
        raise ValueError(
            f"Logits of the base {tuple(base.shape)} and of the memory {tuple(memory.shape)} differ before the last "
            "dimension; run both on the same tokens."
        )
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a weight in [0, 1].")
    size = min(base.shape[-1], memory.shape[-1])
    if not isinstance(alpha, Tensor) and alpha in (0, 1):
        chosen = memory if alpha else base
        return chosen if base.shape[-1] == memory.shape[-1] else _log_probabilities(chosen, size)
    log_base, log_memory = _log_probabilities(base, size), _log_probabilities(memory, size)
    dtype = torch.promote_types(log_base.dtype, log_memory.dtype)
    weight = torch.as_tensor(alpha, dtype=dtype, device=base.device)
    mixed = _LogMixture.apply(log_base.to(dtype), log_memory.to(dtype), weight)
    assert isinstance(mixed, Tensor)
    return mixed


class _LogMixture(torch.autograd.Function):
    """logaddexp of weighted log-probabilities; autograd's own gradient for alpha is 0 * inf at 0 and 1."""

    @staticmethod
    def forward(ctx: Any, log_base: Tensor, log_memory: Tensor, alpha: Tensor) -> Tensor:
        mixed = torch.logaddexp(torch.log1p(-alpha) + log_base, alpha.log() + log_memory)
        ctx.save_for_backward(log_base, log_memory, alpha, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        log_base, log_memory, alpha, mixed = ctx.saved_tensors
        # Tokens that neither distribution allows have no gradient.
        impossible = mixed == float("-inf")
        ratio_base = (log_base - mixed).masked_fill(impossible, float("-inf")).exp()
        ratio_memory = (log_memory - mixed).masked_fill(impossible, float("-inf")).exp()
        grad_alpha = None
        if ctx.needs_input_grad[2]:
            grad_alpha = (grads[0] * (ratio_memory - ratio_base)).sum_to_size(alpha.shape)
        return grads[0] * (1 - alpha) * ratio_base, grads[0] * alpha * ratio_memory, grad_alpha


def knn_loss(memory_logits: Tensor, tokens: Tensor, weights: Tensor, labels: Tensor, beta: float) -> Tensor:
    """beta KL(p_kNN || p_memory) + (1 - beta) CE(labels, p_memory), mean over the positions.

    p_kNN is never made dense. Both terms together are the cross-entropy of beta p_kNN + (1 - beta) onehot(label),
    less beta times the entropy of p_kNN, so the logits are read once at k + 1 places and once for their logsumexp.

    Args:
        memory_logits: (N, V). labels: (N,) int64, the true next tokens.
        tokens: (N, k) integers, tokens of p_kNN in any order; weights of a token that appears twice are summed.
        weights: (N, k), not negative, positive somewhere in every row (otherwise NaN); rows are normalised here.

    Raises:
        ValueError: shapes that do not fit, no positions, or beta outside of [0, 1].
    """
    n = memory_logits.shape[0]
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; expected a weight in [0, 1].")
    if memory_logits.ndim != 2 or n == 0 or tokens.shape != weights.shape or tokens.ndim != 2:
        raise ValueError(
            f"Logits {tuple(memory_logits.shape)}, tokens {tuple(tokens.shape)}, weights {tuple(weights.shape)}: "
            "expected (N, V), (N, k) and (N, k) with N at least 1."
        )
    if tokens.shape[0] != n or labels.shape != (n,):
        raise ValueError(f"{n} rows of logits, {tokens.shape[0]} of tokens, labels {tuple(labels.shape)}: all need N.")
    logits = memory_logits.to(_computing(memory_logits))
    weights = weights.to(logits.dtype)
    weights = weights / weights.sum(-1, keepdim=True)
    places = torch.cat([tokens.long(), labels[:, None]], dim=-1)
    shares = torch.cat([beta * weights, weights.new_full((n, 1), 1 - beta)], dim=-1)
    # Without `where`, a forbidden token (-inf) of no weight would turn the loss into NaN.
    expected = torch.where(shares > 0, shares * logits.gather(-1, places), 0).sum(-1)
    totals = sum_by_token(tokens, weights)[1]
    negative_entropy = torch.xlogy(totals, totals).sum(-1)
    return (logits.logsumexp(-1) - expected + beta * negative_entropy).mean()


def sum_by_token(tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the weights of equal tokens within each row; both (N, k).

    Returns: (tokens, weights), both (N, k): the distinct tokens of a row in rising order with their sums, then token 0
    with weight 0.
    """
    ordered, order = tokens.sort(dim=-1)
    new = torch.zeros_like(ordered)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = new.long().cumsum(-1)
    distinct = torch.zeros_like(ordered).scatter(-1, group, ordered)
    return distinct, torch.zeros_like(weights).scatter_add(-1, group, weights.gather(-1, order))


def _computing(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _log_probabilities(logits: Tensor, size: int) -> Tensor:
    return F.log_softmax(logits[..., :size], dim=-1, dtype=_computing(logits))
