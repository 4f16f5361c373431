"""Attention in parts: over disjoint sets of keys, put together exactly by their log-sum-exp.

Shapes: B batch, H query heads, Hkv key heads (H a multiple; query head a reads key head a // (H / Hkv)), T queries,
K keys, e width. For a set of keys, lse = log sum_j e^(scale q.k_j) and out = sum_j e^(scale q.k_j - lse) v_j; then
for disjoint sets L = log sum_s e^(lse_s), out = sum_s e^(lse_s - L) out_s is the softmax over all of them.

A mask is bool (True: visible) or additive, broadcastable to (B, H, T, K). Softmax runs in float32 or wider. A query
that sees no key gets out = 0, lse = -inf, and zero gradients.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# From so many queries on, copying the keys for one fused kernel costs less than writing the scores down.
_MANY_QUERIES = 32


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, Hkv, K, e) -> (B, num_heads, K, e), each key head repeated for the query heads that read it.

    Costs a copy where Hkv < num_heads and Hkv > 1; `attend` and `with_columns` do without.
    """
    groups = _groups(num_heads, x.shape[1])
    if groups == 1:
        return x
    return x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp.

    Args:
        q: (B, H, T, e). k, v: (B or 1, Hkv, K, e); v may have another width.
        mask: as in the module's docstring; None: every key is visible.
        scale: multiplies q.k; a tensor broadcastable to (B, H, T, e) for a learned one.
        softcap: bounds the scores s before the mask, as softcap tanh(s / softcap).

    Returns: out (B, H, T, width of v) in q's dtype, lse (B, H, T) float32 or wider.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[-2]
    if keys == 0:
        return q.new_zeros(batch, heads, queries, v.shape[-1]), _wide(q).new_full(q.shape[:3], float("-inf"))
    # Heads of one group become more queries of their key head: no copy of the keys.
    grouped = _to_groups(q * scale, k.shape[1])
    scores = _capped(_wide(grouped @ k.transpose(-1, -2)).view(batch, heads, queries, keys), softcap)
    weights, total, lse = _softmax_parts(scores, mask)
    out = _to_groups(weights.to(v.dtype), k.shape[1]) @ v
    return (out.view(batch, heads, queries, -1) / total).to(q.dtype), lse


def attend_selected(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    scale: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` where each query has keys of its own, as a search returns them.

    Args:
        q: (B, H, T, e). keys, values: (B, H, T, k, e). valid: (B, H, T, k) bool, False for missing entries.
        scale, softcap: as in `attend`.

    Returns: out (B, H, T, e), lse (B, H, T).
    """
    if keys.shape[-2] == 0:
        return q.new_zeros(*q.shape[:3], values.shape[-1]), _wide(q).new_full(q.shape[:3], float("-inf"))
    scores = _capped(_wide((keys @ (q * scale)[..., None]).squeeze(-1)), softcap)
    weights, total, lse = _softmax_parts(scores, valid)
    out = (weights.to(values.dtype)[..., None, :] @ values).squeeze(-2)
    return (out / total).to(q.dtype), lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The joint softmax over disjoint sets of keys from the (out, lse) of each set.

    out: (B, H, T, e), lse: (B, H, T); returns the same of the union.
    """
    if not parts:
        raise ValueError("Nothing to merge: give at least one (out, lse).")
    if len(parts) == 1:
        return parts[0]
    weights, total, lse = _softmax_parts(torch.stack([lse for _, lse in parts], dim=-1), None)
    weights = (weights / total).unsqueeze(-2)
    out = sum(out * weights[..., i] for i, (out, _) in enumerate(parts))
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), lse


def with_columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    extra_k: Tensor,
    extra_v: Tensor,
    extra_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over [extra ; context] with one softmax.

    With many queries the columns are put before the context and the fused kernel runs on both; with few, as in
    decoding, the two parts are attended and merged, so that a long cache is not copied.

    Args:
        q: (B, H, T, e). k, v: (B, Hkv, K, e), the context.
        mask: of the context; None: causal, aligned to the end (query i sees key j if j <= i + K - T).
        extra_k, extra_v: (B or 1, Hkv, N, e). extra_mask: broadcastable to (B, H, T, N); None: always visible.
        scale: multiplies q.k; None: 1 / sqrt(e).

    Returns: (B, H, T, e).

    Raises:
        ValueError: no mask and more queries than keys of context.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if mask is None and queries > keys:
        raise ValueError(f"A causal mask needs a key for each query: {queries} queries, {keys} keys. Pass a mask.")
    grouped = q.shape[1] != k.shape[1]
    if extra_k.shape[-2] == 0 and mask is None and queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    # One query sees all that comes before it: nothing to mask.
    if mask is None and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)[None, None]
    if extra_k.shape[-2] == 0:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    if queries < _MANY_QUERIES:
        parts = [attend(q, extra_k, extra_v, extra_mask, scale), attend(q, k, v, mask, scale)]
        return merge(parts)[0]
    k = torch.cat([extra_k.expand(k.shape[0], -1, -1, -1), k], dim=-2)
    v = torch.cat([extra_v.expand(v.shape[0], -1, -1, -1), v], dim=-2)
    joined = _join_masks(extra_mask, mask, extra_k.shape[-2], keys, q)
    return F.scaled_dot_product_attention(q, k, v, joined, scale=scale, enable_gqa=grouped)


def _join_masks(first: Tensor | None, second: Tensor | None, columns: int, keys: int, q: Tensor) -> Tensor | None:
    """One mask over [first ; second]: bool if both are, else additive in q's dtype."""
    if first is None and second is None:
        return None
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    pair = [visible if m is None else m for m in (first, second)]
    if not all(m.dtype == torch.bool for m in pair):
        pair = [_additive(m, q.dtype) for m in pair]
    shape = torch.broadcast_shapes(pair[0].shape[:-1], pair[1].shape[:-1], (1, 1, q.shape[-2]))
    return torch.cat([m.expand(*shape, n) for m, n in zip(pair, (columns, keys), strict=True)], dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _softmax_parts(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights before normalisation, their sum (..., 1) with 1 in place of 0, and the log-sum-exp (...)."""
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    # The largest score cancels in every result, and -inf - (-inf) must not happen.
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)
    return weights, total, lse


def _to_groups(x: Tensor, key_heads: int) -> Tensor:
    """(B, H, T, e) -> (B, Hkv, H / Hkv * T, e)."""
    groups = _groups(x.shape[1], key_heads)
    return x if groups == 1 else x.unflatten(1, (key_heads, groups)).flatten(2, 3)


def _groups(num_heads: int, key_heads: int) -> int:
    if num_heads % key_heads:
        raise ValueError(f"The number of query heads must be a multiple of the key heads: {num_heads}, {key_heads}.")
    return num_heads // key_heads


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
