"""DMC: Dynamic Memory Compression (2024, arXiv 2403.09636, ICML 2024).

Every layer and key head decides at each token whether its key and value open a slot of the cache or are merged into the
last one, by a weighted mean. No new parameters: the last dimension of the host's own queries and keys decides, and
leaves attention. With q, k free of position and of this dimension, a_t = k_t[-1] - 5 the logit of merging and
w_t = sigmoid(mean over the query group of q_t[-1] + 5) + eps the importance:

    reading     alpha_t = [a_t > 0];  slot <- the w-mean of its run's last 12 tokens, rotated at the last one's position
    training    alpha_t = sigmoid((a_t + g_1 - g_2) / tau), g Gumbel; slots of all tokens at once, and log(1 -
                alpha_{j+1}) added to the scores of column j, which a merge would overwrite
    loss        mean over rows of relu(1 - 1/CR - mean over layers, heads and tokens of [alpha > 1/2])

(see ops/cache_merging.py). Where retrofitting stands is kept in buffers, which `training.retrofit.Retrofit` moves:
`fade`, how much of the deciding dimension is left in attention; `merging`, 0 while nothing merges; `progress` from 0 to
1, with CR = 1 + (compression - 1) progress.

Decisions:
- `intact` (preset "attach") starts in front of stage 1: the host itself. Otherwise the dimension is gone and tokens may
  merge at once, at full compression.
- The dimension is taken where keys meet attention. On hosts that normalise queries and keys (Qwen3) that is after the
  norm: the outputs of the projections alone would miss what an adapter adds to them. With rotation of a part of the
  width only (GPT-NeoX) the last dimension is one that is not rotated.
- Slots are kept rotated: a slot is always rewritten as a whole, from the last 11 keys free of position, which are kept
  for its head. So nothing drifts, and reading rotates nothing.
- In evaluation without a stream decisions are hard too, by the same code as the stream's.
- Under autograd a stream gives gradients within a call; what earlier calls kept is constant.
- Layers with a sliding window see the slots whose position (their last token's) lies in the window. Slots behind it
  stay in the cache. Chunked attention is refused.
- Runs longer than 12 lose their oldest tokens, as in the authors' code, unless `split_long_runs`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import HostError
from ...core.memory import HostSpec, Memory, MemoryConfig, option
from ...core.step import AttentionCall, Step
from ...ops import cache_merging
from ...ops.attention import attend
from ...ops.ragged_cache import RaggedCache
from ...ops.rotary import rotate

_SLOTS = ("keys", "values", "positions", "lengths", "seen")
_RECENT = ("recent_keys", "recent_values", "recent_weights", "run")


@dataclass(frozen=True, kw_only=True)
class DMCConfig(MemoryConfig):
    name = "dmc"
    presets = {"attach": {"intact": True}}

    compression: float = option(4.0, "tokens per slot that training asks for, CR", minimum=1)
    offset: float = option(5.0, "logit of opening a slot where the deciding dimension of the key is 0")
    tau: float = option(0.1, "temperature of the relaxed decisions in training", minimum=1e-3)
    noise: bool = option(True, "Gumbel noise on the decisions in training")
    intact: bool = option(False, "start as the host itself; training (Retrofit) frees the dimension, then merges")
    split_long_runs: bool = option(False, "while reading, a slot of 12 tokens is full and the next one opens another")


class CacheReport(NamedTuple):
    """What a cache holds, over all rows, layers and key heads.

    tokens: key-value pairs read. slots: in use. ratio: tokens / slots, 1 for an empty cache. used_bytes,
    capacity_bytes: of slots in use, and allocated. recent_bytes: of the last tokens kept beside them. longest_run: most
    tokens that ever stood in one slot.
    """

    tokens: int
    slots: int
    ratio: Fraction
    used_bytes: int
    capacity_bytes: int
    recent_bytes: int
    longest_run: int


class DMC(Memory):
    name = "dmc"
    config_class = DMCConfig
    paper = "Dynamic Memory Compression: Retrofitting LLMs for Accelerated Inference (2024, arXiv 2403.09636)"
    state_size = "2 * L * Hkv * e * T / compression"
    continuous = True
    owns_cache = True
    constant_size = False
    limits: ClassVar[Mapping[str, str]] = {
        "compiled reading with a cache": "the number of slots depends on what was read, which one graph cannot follow"
    }
    config: DMCConfig

    def __init__(self, config: DMCConfig, host: HostSpec):
        super().__init__(config, host)
        started = 0.0 if config.intact else 1.0
        for name, value in (("fade", 1.0 - started), ("merging", started), ("progress", started)):
            self.register_buffer(name, torch.tensor(value, device=host.device))

    fade: Tensor
    merging: Tensor
    progress: Tensor

    @property
    def identity_at_attach(self) -> bool:
        return self.config.intact

    def schedule(self, fade: float, merging: bool, progress: float) -> None:
        """Where retrofitting stands; see the module's docstring."""
        self.fade.fill_(fade)
        self.merging.fill_(float(merging))
        self.progress.fill_(progress)

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        """Raises `HostError` in layers with chunked attention."""
        query, keys = call.free_query(), call.free_keys()
        decided = cache_merging.decisions(query, keys, offset=self.config.offset)
        # Clones, so they may be changed; outside of stage 1 fade is 0.
        for mine, theirs in ((decided.q, query), (decided.k, keys)):
            mine[..., -1] = theirs[..., -1] * self.fade.to(theirs.dtype)
        query = self._turned(decided.q, call)
        if step.training and not step.streaming:
            return self._relaxed(query, decided, call, step)
        return self._hard(query, decided, call, step)

    def _relaxed(self, query: Tensor, decided: cache_merging.Decisions, call: AttentionCall, step: Step) -> Tensor:
        """All tokens at once, with decisions that carry gradients; leaves the loss."""
        noise = None if self.config.noise else torch.zeros_like(decided.logits)
        log_odds = cache_merging.relaxed(decided.logits, noise, self.config.tau)
        log_odds = log_odds.masked_fill(self.merging == 0, float("-inf"))
        self._add_loss(log_odds, step)
        columns = cache_merging.parallel(decided.k, call.new_values, decided.weights, log_odds, real=step.real)
        bias = cache_merging.attention_bias(columns.hidden)
        if (span := _span(step)) is not None:
            bias = bias.masked_fill(~_near(step.places, step.places[:, None], span), float("-inf"))
        return call.plain(
            query=query,
            keys=self._turned(columns.keys, call),
            values=columns.values,
            mask=_for_queries(bias.to(query.dtype), query),
        )

    def _hard(self, query: Tensor, decided: cache_merging.Decisions, call: AttentionCall, step: Step) -> Tensor:
        """The next tokens of a stream, or all of a sequence."""
        held, span = self._held(decided.k, call.new_values, step), _span(step)
        merge = (decided.logits > 0) & (self.merging > 0)
        recent = {name: held[name] for name in (*_RECENT, "seen")}
        update, following = cache_merging.step(
            recent, decided.k, call.new_values, decided.weights, merge, step.real, self.config.split_long_runs
        )
        keys, cache = self._turned(update.keys, call), RaggedCache({name: held[name] for name in _SLOTS})
        one = step.streaming and query.shape[2] == 1 and not torch.is_grad_enabled()
        if one:
            self._write(cache, keys, update, held, following, step)
            keys, values, mask = cache.tensors["keys"], cache.tensors["values"], cache.visible()[:, :, None]
            places = cache.tensors["positions"]
        else:
            mask = cache_merging.step_mask(update, held["lengths"], cache.capacity)
            keys = torch.cat([held["keys"], keys], dim=2)
            values = torch.cat([held["values"], update.values], dim=2)
            new = update.positions[:, None].expand(-1, keys.shape[1], -1)
            places = torch.cat([held["positions"], new], dim=2)
            if step.streaming:
                self._write(cache, keys[:, :, -query.shape[2] :], update, held, following, step)
        if span is not None:
            mask = mask & _near(update.positions, places, span)
        mask = _for_queries(mask, query)
        if one and call.softcap is None:
            # The host's own attention would copy the cache for the heads of each group.
            return attend(query, keys, values, mask, call.scale)[0].transpose(1, 2)
        return call.plain(query=query, keys=keys, values=values, mask=mask)

    def _turned(self, x: Tensor, call: AttentionCall) -> Tensor:
        """x (B, heads, T, e) at the positions of this step's tokens. Rotation leaks into the freed dimension: it is
        taken out again."""
        if call.rotation is None:
            return x
        x = rotate(x, *call.rotation)
        x[..., -1] = x[..., -1] * self.fade.to(x.dtype)
        return x

    def _add_loss(self, log_odds: Tensor, step: Step) -> None:
        """Each layer notes its rows' share of merged tokens; the last one asks for what is missing."""
        merged = cache_merging.straight_through(log_odds).mean(1)
        merged = merged.masked_fill(step.places <= 0, 0.0)
        if step.real is None:
            share = merged.mean(-1)
        else:
            share = merged.masked_fill(~step.real, 0.0).sum(-1) / step.real.sum(-1).clamp(min=1)
        step.add_note(merged=share)
        if step.layer == self.layers[-1]:
            shares = [step.note("merged", layer) for layer in self.layers]
            mean = torch.stack([s for s in shares if s is not None]).mean(0)
            ratio = 1 + (self.config.compression - 1) * self.progress
            step.add_loss("compression", F.relu(1 - 1 / ratio - mean).mean())

    def _held(self, keys: Tensor, values: Tensor, step: Step) -> dict[str, Tensor]:
        """The stream's tensors of this layer, or those of a stream that has read nothing."""
        if step.streaming and step.buffer("lengths") is not None:
            found = {name: step.buffer(name) for name in (*_SLOTS, *_RECENT, "longest")}
            return {name: t for name, t in found.items() if t is not None}
        batch, heads, _, width = keys.shape
        make = {"dtype": keys.dtype, "device": keys.device}
        capacity = {} if step.streaming else {"capacity": 0}
        slots = RaggedCache.empty(batch, heads, width, values.shape[-1], **capacity, **make).tensors
        recent = cache_merging.initial_state(batch, heads, width, values.shape[-1], **make)
        return {**recent, **slots, "longest": torch.zeros_like(slots["lengths"])}

    def _write(
        self,
        cache: RaggedCache,
        keys: Tensor,
        update: cache_merging.Update,
        held: dict[str, Tensor],
        following: cache_merging.State,
        step: Step,
    ) -> None:
        """This step's tokens into the stream's buffers."""
        cache.write(keys, update.values, update.positions, update.opens, update.survives, step.real)
        run = update.run if step.real is None else update.run.masked_fill(~step.real[:, None], 0)
        kept = {name: following[name].detach() for name in _RECENT}
        kept["longest"] = torch.maximum(held["longest"], run.amax(-1))
        for name, tensor in {**cache.tensors, **kept}.items():
            step.set_buffer(name, tensor)

    def report(self, buffers: Mapping[str, Tensor], scope: str = "") -> CacheReport:
        """What the cache of a stream holds.

        Args:
            buffers: of the cache, `stream.cache.buffers`. scope: "dmc/" in a stack.
        """
        caches = []
        for layer in self.layers:
            if f"{scope}{layer}/lengths" in buffers:
                caches.append(RaggedCache({name: buffers[f"{scope}{layer}/{name}"] for name in _SLOTS}))
        recent = [t for name, t in buffers.items() if name.rpartition("/")[2].startswith("recent_")]
        longest = [t for name, t in buffers.items() if name.endswith("/longest")]
        slots = sum(int(c.tensors["lengths"].sum()) for c in caches)
        tokens = sum(int(c.tensors["seen"].sum()) * c.tensors["lengths"].shape[1] for c in caches)
        return CacheReport(
            tokens=tokens,
            slots=slots,
            ratio=Fraction(tokens, slots) if slots else Fraction(1),
            used_bytes=sum(c.used_bytes() for c in caches),
            capacity_bytes=sum(c.capacity_bytes() for c in caches),
            recent_bytes=sum(t.numel() * t.element_size() for t in recent),
            longest_run=max((int(t.max()) for t in longest), default=0),
        )


def _span(step: Step) -> int | None:
    """Tokens that this layer sees, its own counted; None for all.

    Raises:
        HostError: chunked attention.
    """
    span = None if step.host is None else step.host.span(step.layer)
    if span is not None and span[0] != "sliding_attention":
        raise HostError(
            f"dmc: layer {step.layer} of the host has {span[0]}, where a slot could hold tokens of two chunks; hosts "
            "with full or sliding-window attention (Llama, Gemma 2) work."
        )
    return None if span is None else span[1]


def _near(queries: Tensor, columns: Tensor, span: int) -> Tensor:
    """(B, 1 or heads, T, K) bool: which places (B, 1 or heads, K) lie within the span of queries at (B, T)."""
    return queries[:, None, :, None] - columns[:, :, None] < span


def _for_queries(mask: Tensor, query: Tensor) -> Tensor:
    """(B, key heads, T, K) -> (B, H, T, K): query head h reads key head h // (H / Hkv)."""
    groups = query.shape[1] // mask.shape[1]
    return mask if groups == 1 else mask.repeat_interleave(groups, dim=1)
