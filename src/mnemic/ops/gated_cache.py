"""A gated recurrent cache (GRC): a fixed number of tokens that a GRU rewrites from each new stretch of a sequence.

Shapes: B batch, T tokens, d width, M cached tokens, D = ratio d channels of them, H heads of width e.

    X' = the first D channels of x, averaged over time into M bins
    u, r = sigmoid(W_g [X' ; C]);  C~ = W_c [X' ; r * C];  C <- (1 - u) * C + u * C~
    o_mem = attention(q = x[.., :D] W_q; k, v = C W_k, C W_v)
    o = o_self + w_h (o_mem - o_self),  w_h one number of each head

Averages are adaptive: token n of T falls into bin i if floor(i T / M) <= n < ceil((i + 1) T / M). Bins overlap where M
does not divide T, and tokens repeat where T < M.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend

Candidate = Literal["linear", "normed"]


def resample(x: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
    """x (B, T, D) averaged over time into `length` bins, (B, length, D).

    Args:
        mask: (B, T) bool, False for padding, which is left out; a row of padding only gives zeros.
    """
    if mask is None:
        return F.adaptive_avg_pool1d(x.mT, length).mT
    place, tokens = mask.cumsum(1) - 1, mask.sum(1)[:, None, None]
    bins = torch.arange(length, device=x.device)[:, None]
    first, last = bins * tokens // length, -(-(bins + 1) * tokens // length)
    inside = ((place[:, None] >= first) & (place[:, None] < last) & mask[:, None]).to(x.dtype)
    return inside @ x / inside.sum(-1, keepdim=True).clamp_min(1)


def mix(own: Tensor, read: Tensor | None, weight: Tensor) -> Tensor:
    """own + weight (read - own) for heads (B, T, H, e); weight (H,), or (B, H) for rows of their own."""
    if read is None:
        return own
    return torch.lerp(own, read.to(own.dtype), weight.to(own.dtype).view(-1, 1, own.shape[2], 1))


class GatedCache(nn.Module):
    """The parameters of one cache, with torch's own starts: 2D x 2D + 2D x D + 3 D x H e, and biases.

    Args:
        channels: D. candidate: "linear" as printed, or "normed": LayerNorm(GELU(C~)), as released.
    """

    def __init__(self, channels: int, num_heads: int, head_dim: int, candidate: Candidate = "linear", **factory):
        super().__init__()
        self.channels, self.num_heads = channels, num_heads
        self.gates = nn.Linear(2 * channels, 2 * channels, **factory)
        self.candidate = nn.Linear(2 * channels, channels, **factory)
        self.query, self.key, self.value = (nn.Linear(channels, num_heads * head_dim, **factory) for _ in range(3))
        self.norm = nn.LayerNorm(channels, **factory) if candidate == "normed" else None

    def update(self, cache: Tensor, new: Tensor) -> Tensor:
        """C (B, M, D) after `new` (B, M, D), what `resample` made of a stretch."""
        gate, reset = torch.sigmoid(self.gates(torch.cat([new, cache], dim=-1))).chunk(2, dim=-1)
        candidate = self.candidate(torch.cat([new, reset * cache], dim=-1))
        if self.norm is not None:
            candidate = self.norm(F.gelu(candidate))
        return torch.lerp(cache, candidate, gate)

    def keys_values(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, M, e) each, from C (B, M, D)."""
        return self._heads(self.key(cache)), self._heads(self.value(cache))

    def read(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """o_mem (B, T, H, e) for x (B, T, d), of which the first D channels ask."""
        query = self._heads(self.query(x[..., : self.channels]))
        return attend(query, keys, values, scale=query.shape[-1] ** -0.5)[0].transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class GatedCacheAttention(nn.Module):
    """Self-attention with a gated recurrent cache, a layer for any encoder: of text, of patches.

    As printed (`causal` False) tokens read the cache that their own stretch has just rewritten, so each sees all of
    it, later tokens too. With `causal` the attention is causal and tokens read the cache that came in.

    Args:
        cache_length: M. ratio: D / d. gate_start: lambda_h at the start; w_h = sigmoid(lambda_h).
        batch_mean: one cache for a stream of batches: what leaves is the mean over rows, detached.

    Raises:
        ValueError: a width that heads do not divide, or a ratio that leaves no whole number of channels.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        cache_length: int,
        ratio: float = 0.5,
        *,
        candidate: Candidate = "linear",
        gate_start: float = 0.0,
        causal: bool = False,
        batch_mean: bool = False,
        **factory,
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"A width of {width} cannot be cut into {num_heads} heads.")
        self.cache_length, self.causal, self.batch_mean = cache_length, causal, batch_mean
        self.cache = GatedCache(channels_of(width, ratio), num_heads, width // num_heads, candidate, **factory)
        self.inputs, self.out = nn.Linear(width, 3 * width, **factory), nn.Linear(width, width, **factory)
        self.gate = nn.Parameter(torch.full((num_heads,), gate_start, **factory))

    def forward(self, x: Tensor, cache: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (B, T, d) from x (B, T, d), and the cache (B or 1, M, D) that follows.

        To leave a stored cache as it is, as in evaluation, drop the one that is returned.

        Args:
            cache: what the last call returned; None: nothing was read yet.
            mask: (B, T) bool, False for padding.
        """
        batch, tokens, _ = x.shape
        own = self.cache
        query, key, value = (own._heads(part) for part in self.inputs(x).chunk(3, dim=-1))
        seen = None if mask is None else mask[:, None, None]
        if self.causal:
            triangle = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
            seen = triangle if seen is None else seen & triangle
        local = attend(query, key, value, seen, query.shape[-1] ** -0.5)[0].transpose(1, 2)
        before = x.new_zeros(1, self.cache_length, own.channels) if cache is None else cache
        new = resample(x[..., : own.channels], self.cache_length, mask)
        after = own.update(before.expand(batch, -1, -1), new)
        read = None
        if not self.causal or cache is not None:
            read = own.read(x, *own.keys_values(before.expand(batch, -1, -1) if self.causal else after))
        mixed = mix(local, read, torch.sigmoid(self.gate))
        return self.out(mixed.flatten(2)), after.detach().mean(0, keepdim=True) if self.batch_mean else after


def channels_of(width: int, ratio: float) -> int:
    """D = ratio * width.

    Raises:
        ValueError: not a whole number of channels from 1 to the width.
    """
    channels = round(ratio * width)
    if not 1 <= channels <= width or abs(channels - ratio * width) > 1e-6:
        raise ValueError(f"ratio = {ratio} of a width of {width} is no whole number of channels from 1 to the width.")
    return channels
