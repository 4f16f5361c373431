"""Ring attention: exact attention over a sequence that is cut over processes.

Every process keeps its queries; keys and values go round. Process r meets those of process (r - t) mod N at step t and
merges (out, lse) of each with the log-sum-exp rule. Backward, keys, values and their gradients go round together:
p = exp(scale q.k - lse), dv += p' do, ds = p (do.v - sum(do o) + dlse), dq += scale ds k, dk += scale ds' q; after N
steps they are home.

This is the reference, and what runs on CPU processes over gloo; on GPUs, torch's own context parallelism does the same
with fused kernels, and it does not run on gloo. Masks other than causal over the whole sequence are refused, because to
drop one trains another model.

Source: Ring Attention (2023, arXiv 2310.01889). Decisions: partial results are float32 or wider until all are merged,
and the log-sum-exp is a differentiable result, so that a memory's keys and values join by `ops.attention.merge`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ConfigError, InputError, UnsupportedError
from ..ops.attention import attend, merge, repeat_heads

IGNORED = -100


@dataclass(frozen=True)
class Sharding:
    """Which tokens of a sequence each of `world` processes has.

    layout: "contiguous", or "zigzag": 2 N chunks, of which process r has r and 2 N - 1 - r, so that causal attention is
    the same work for all.

    Raises:
        ConfigError: an unknown layout, or a rank outside of the world.
    """

    rank: int
    world: int
    layout: str = "zigzag"

    def __post_init__(self) -> None:
        if self.layout not in ("contiguous", "zigzag") or not 0 <= self.rank < self.world:
            raise ConfigError(
                f"layout = {self.layout!r}, rank {self.rank} of {self.world}; expected 'contiguous' or 'zigzag' and a "
                "rank below the number of processes."
            )

    def places(self, length: int, rank: int | None = None) -> Tensor:
        """Places in the sequence of the tokens of `rank` (this one's by default), (length / N,) int64.

        Raises:
            InputError: a length that does not divide evenly.
        """
        rank, chunks = self.rank if rank is None else rank, self.world * (2 if self.layout == "zigzag" else 1)
        if length % chunks:
            raise InputError(f"A sequence of {length} tokens does not cut into {chunks} equal parts; pad it.")
        parts = torch.arange(length).chunk(chunks)
        return parts[rank] if self.layout == "contiguous" else torch.cat([parts[rank], parts[chunks - 1 - rank]])

    def shard(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """This process's part of a batch that every process has.

        Args:
            input_ids, labels: (B, T); labels as for the whole, -100 to ignore. attention_mask: (B, T), all 1.

        Returns: input_ids, labels and shift_labels (the labels shifted over the whole sequence first, both), and
            position_ids, (B, T / N); num_items_in_batch, the labels of all processes. A model's loss from it, summed
            over processes, is the loss of the whole.

        Raises:
            UnsupportedError: padding. InputError: a length that does not divide evenly.
        """
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise UnsupportedError("Ring attention is causal over the whole sequence: rows with padding are refused.")
        shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        places = self.places(input_ids.shape[1]).to(input_ids.device)
        mine = shifted[:, places]
        return {
            "input_ids": input_ids[:, places],
            "labels": mine,
            "shift_labels": mine,
            "position_ids": places.expand(input_ids.shape[0], -1),
            "num_items_in_batch": (shifted != IGNORED).sum(),
        }


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, sharding: Sharding, causal: bool = True, scale: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of this process's queries over the keys of all.

    Args:
        q: (B, H, T / N, e). k, v: (B, Hkv, T / N, e). Every process calls with the same shapes.
        scale: multiplies q.k; None: 1 / sqrt(e). group: the processes; None for all.

    Returns: out (B, H, T / N, e) in q's dtype; lse (B, H, T / N), float32 or wider. Both carry gradients.
    """
    if q.shape[2] != k.shape[2]:
        raise InputError(f"{q.shape[2]} queries, {k.shape[2]} keys: every process has both of the same tokens.")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = _Ring.apply(q, k, v, sharding, causal, scale, group)
    return out, lse


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sharding: Sharding, causal: bool, scale: float, group: Any
    ) -> tuple[Tensor, Tensor]:
        parts, moving = [], [_wide(k), _wide(v)]
        for step in range(sharding.world):
            visible = _visible(q, sharding, step, causal)
            parts.append(attend(_wide(q), *moving, mask=visible, scale=scale))
            if len(parts) > 1:
                parts = [merge(parts)]
            if step + 1 < sharding.world:
                moving = _pass_on(moving, sharding, group)
        out, lse = parts[0]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = sharding, causal, scale, group
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        sharding, causal, scale, group = ctx.settings
        wide, heads, d_out = _wide(q), k.shape[1], _wide(d_out)
        delta = (d_out * out).sum(-1) - d_lse
        d_q = torch.zeros_like(wide)
        moving = [_wide(k), _wide(v), torch.zeros_like(_wide(k)), torch.zeros_like(_wide(v))]
        for step in range(sharding.world):
            keys, values, d_keys, d_values = moving
            keys, values = repeat_heads(keys, q.shape[1]), repeat_heads(values, q.shape[1])
            scores = scale * (wide @ keys.transpose(-1, -2))
            visible = _visible(q, sharding, step, causal)
            if visible is not None:
                scores = scores.masked_fill(~visible, float("-inf"))
            weights = (scores - lse[..., None]).exp()
            d_scores = scale * weights * (d_out @ values.transpose(-1, -2) - delta[..., None])
            d_q += d_scores @ keys
            moving[2] = d_keys + _of_groups(d_scores.transpose(-1, -2) @ wide, heads)
            moving[3] = d_values + _of_groups(weights.transpose(-1, -2) @ d_out, heads)
            # The last step brings the gradients home.
            moving = _pass_on(moving, sharding, group)
        return d_q.to(q.dtype), moving[2].to(k.dtype), moving[3].to(v.dtype), None, None, None, None


def _visible(q: Tensor, sharding: Sharding, step: int, causal: bool) -> Tensor | None:
    """(T / N, T / N) bool: which keys of the process that is `step` behind this one's queries see; None for all."""
    if not causal:
        return None
    length, behind = q.shape[2] * sharding.world, (sharding.rank - step) % sharding.world
    visible = sharding.places(length)[:, None] >= sharding.places(length, behind)
    return None if bool(visible.all()) else visible.to(q.device)


def _pass_on(tensors: list[Tensor], sharding: Sharding, group: Any) -> list[Tensor]:
    """Send to the next process of the ring and receive from the one before."""
    if sharding.world == 1:
        return tensors
    sent, received = [t.contiguous() for t in tensors], [torch.empty_like(t).contiguous() for t in tensors]
    after, before = (sharding.rank + 1) % sharding.world, (sharding.rank - 1) % sharding.world
    if group is not None:
        after, before = dist.get_global_rank(group, after), dist.get_global_rank(group, before)
    operations = [dist.P2POp(dist.isend, t, after, group, tag=i) for i, t in enumerate(sent)]
    operations += [dist.P2POp(dist.irecv, t, before, group, tag=i) for i, t in enumerate(received)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


def _of_groups(x: Tensor, heads: int) -> Tensor:
    """(B, H, K, e) summed over the query heads of each key head -> (B, heads, K, e)."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
