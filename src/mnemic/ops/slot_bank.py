"""A bank of memory slots: tokens read it by cross-attention, and are routed to its slots when it is written.

Shapes: B batch, T tokens, N slots, h heads, d width, e = d / h. Scores are S = Q K^T / sqrt(e), (B, h, T, N).
`naive_read` and `naive_route` say the same with loops; they are the reference of the tests.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Route = Literal["softmax", "competitive", "identity"]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., n, d) -> (..., h, n, e)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """(..., h, n, e) -> (..., n, d)."""
    return x.transpose(-2, -3).flatten(-2)


def read(
    query: Tensor, keys: Tensor, values: Tensor, top_k: int | None = None, factors: Tensor | None = None
) -> Tensor:
    """softmax(S) V over the slots, heads concatenated.

    Args:
        query: (B, T, d). keys, values: (B, h, N, e).
        top_k: keep the k largest scores of each token, the others get no weight.
        factors: (B, N), at least 0, on the odds of each slot: S + log F. 0 leaves the slot out; every row needs one
            above it.

    Returns: (B, T, d).
    """
    q = split_heads(query, keys.shape[1])
    if top_k is None or top_k >= keys.shape[-2]:
        bias = None if factors is None else factors.log().to(q.dtype)[:, None, None]
        return merge_heads(F.scaled_dot_product_attention(q, keys, values, attn_mask=bias))
    return merge_heads(attention_weights(q, keys, top_k, factors) @ values)


def attention_weights(q: Tensor, keys: Tensor, top_k: int | None = None, factors: Tensor | None = None) -> Tensor:
    """Softmax over slots of the scores, (B, h, T, N); q (B, h, T, e), keys (B, h, N, e), factors as in `read`."""
    scores = q @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if factors is not None:
        scores = scores + factors.log().to(q.dtype)[:, None, None]
    if top_k is not None and top_k < scores.shape[-1]:
        kept = scores.topk(top_k, dim=-1)
        scores = torch.full_like(scores, float("-inf")).scatter(-1, kept.indices, kept.values)
    return scores.softmax(dim=-1)


def route(
    query: Tensor,
    keys: Tensor,
    contents: tuple[Tensor, ...],
    how: Route = "softmax",
    mask: Tensor | None = None,
    top_k: int | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Bring token contents to slots, heads mixed like values.

    softmax: each slot spreads its weight over the tokens by its scores. competitive: each token spreads its weight
    over the slots (after top-k), and a slot averages by what it received. identity: token i goes to slot i.

    Args:
        query: (B, T, d). keys: (B, h, N, e). contents: tensors (B, T, d).
        mask: (B, T) bool, False for tokens to leave out; every row needs a True. None: all count.

    Returns: for each content its (B, N, d), and for competitive routing the attention mass that each slot received,
    (B, N), mean over heads; otherwise None.
    """
    num_heads, num_slots = keys.shape[1], keys.shape[-2]
    if how == "identity":
        if num_slots != query.shape[1] or mask is not None:
            raise ValueError(
                f"Identity routing needs one slot per token and no padding: {query.shape[1]} tokens, {num_slots} slots."
            )
        return contents, None
    q = split_heads(query, num_heads)
    # One product moves all contents: the routing weights are the same for each of them.
    stacked = torch.cat([split_heads(c, num_heads) for c in contents], dim=-1)
    mass = None
    if how == "softmax":
        allowed = None if mask is None else mask[:, None, None, :]
        moved = F.scaled_dot_product_attention(keys, q, stacked, attn_mask=allowed)
    else:
        weights = attention_weights(q, keys, top_k).transpose(-1, -2)
        if mask is not None:
            weights = weights * mask[:, None, None, :]
        received = weights.sum(-1, keepdim=True)
        # Dividing by (nearly) nothing overflows in the backward pass; a slot that nothing addresses gets nothing.
        empty = received <= torch.finfo(weights.dtype).tiny ** 0.5
        moved = (weights @ stacked) / received.masked_fill(empty, 1.0)
        mass = received.squeeze(-1).mean(1)
    return tuple(merge_heads(part) for part in moved.chunk(len(contents), dim=-1)), mass


def routing_weights(
    query: Tensor, keys: Tensor, how: Route = "softmax", mask: Tensor | None = None, top_k: int | None = None
) -> Tensor:
    """The weights with which `route` brings tokens to slots, (B, h, N, T); a slot's sum to 1, or to 0 where nothing
    addresses it."""
    num_heads, num_slots = keys.shape[1], keys.shape[-2]
    if how == "identity":
        return torch.eye(num_slots, dtype=keys.dtype, device=keys.device).expand(len(keys), num_heads, -1, -1)
    q = split_heads(query, num_heads)
    if how == "softmax":
        scores = keys @ q.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return scores.softmax(dim=-1)
    weights = attention_weights(q, keys, top_k).transpose(-1, -2)
    if mask is not None:
        weights = weights * mask[:, None, None]
    received = weights.sum(-1, keepdim=True)
    empty = received <= torch.finfo(weights.dtype).tiny ** 0.5
    return weights / received.masked_fill(empty, 1.0)


def naive_scores(query: Tensor, keys: Tensor) -> Tensor:
    """S by loops, (B, h, T, N)."""
    batch, heads, slots, e = keys.shape
    tokens = query.shape[1]
    scores = torch.zeros(batch, heads, tokens, slots, dtype=query.dtype)
    for b in range(batch):
        for a in range(heads):
            for t in range(tokens):
                for n in range(slots):
                    scores[b, a, t, n] = (query[b, t, a * e : (a + 1) * e] * keys[b, a, n]).sum() / e**0.5
    return scores


def naive_read(query: Tensor, keys: Tensor, values: Tensor, top_k: int | None = None) -> Tensor:
    """Reference of `read`."""
    scores = naive_scores(query, keys)
    batch, heads, tokens, slots = scores.shape
    e = keys.shape[-1]
    out = torch.zeros_like(query)
    for b in range(batch):
        for a in range(heads):
            for t in range(tokens):
                kept = sorted(range(slots), key=lambda n: -scores[b, a, t, n].item())[: top_k or slots]
                total = sum(scores[b, a, t, n].exp() for n in kept)
                out[b, t, a * e : (a + 1) * e] = sum(scores[b, a, t, n].exp() / total * values[b, a, n] for n in kept)
    return out


def naive_route(
    query: Tensor, keys: Tensor, content: Tensor, how: Route, mask: Tensor | None = None, top_k: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Reference of `route` for one content."""
    scores = naive_scores(query, keys)
    batch, heads, tokens, slots = scores.shape
    e = keys.shape[-1]
    real = [[mask is None or bool(mask[b, t]) for t in range(tokens)] for b in range(batch)]
    out = torch.zeros(batch, slots, query.shape[-1], dtype=query.dtype)
    mass = torch.zeros(batch, slots, dtype=query.dtype)
    for b in range(batch):
        for a in range(heads):
            weights = torch.zeros(slots, tokens, dtype=query.dtype)
            for t in range(tokens):
                kept = sorted(range(slots), key=lambda n: -scores[b, a, t, n].item())[: top_k or slots]
                for n in range(slots):
                    if not real[b][t]:
                        continue
                    if how == "softmax":
                        others = [scores[b, a, u, n].exp() for u in range(tokens) if real[b][u]]
                        weights[n, t] = scores[b, a, t, n].exp() / sum(others)
                    elif n in kept:
                        weights[n, t] = scores[b, a, t, n].exp() / sum(scores[b, a, t, m].exp() for m in kept)
            for n in range(slots):
                received = weights[n].sum()
                mass[b, n] = mass[b, n] + received / heads
                scale = 1.0 if how == "softmax" else 1 / received
                parts = [weights[n, t] * scale * content[b, t, a * e : (a + 1) * e] for t in range(tokens)]
                if how == "softmax" or received > 0:
                    out[b, n, a * e : (a + 1) * e] = torch.stack(parts).sum(0)
    return out, (mass if how == "competitive" else None)
