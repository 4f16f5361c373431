"""Memorizing Transformers (2022, arXiv 2203.08913, ICLR 2022).

One upper block also looks up the keys of its own past that are nearest to each query, in a first-in-first-out store of
N keys and values, and mixes what it finds into its attention. For query head h with query q, and n(x) = x / |x|:

    store    k, v of every token, k without its rotation; with `normalise`, n(k) for k. No gradient enters the store.
    select   I = the top_k stored j with the largest q . k_j, of the key head that h reads; no gradient
    read     o_mem = sum_{j in I} p_j v_j,   p = softmax_I(|s_h| n(q) . n(k_j))
    merge    gate:  o = (1 - g_h) o_local + g_h o_mem,   g_h = sigmoid(b_h)
             joint: one softmax over I and the local keys, by the log-sum-exps of the two parts

A segment reads the store that earlier segments wrote and is appended when it is complete. While a row's store is empty,
o = o_local exactly. Options that differ in equations:

normalise "both": the paper; the local scores are |s_h| n(q) . n(k) too, s_h from 1. "memory": the host's own local
    attention; s_h from sqrt(e), the scale of raw scores of unit variance. "none": |s_h| times the host's scale (and
    cap) on raw products, s_h from 1: what the host would have computed in context.
position_policy: where stored keys stand, counted from the start of the open segment, whose token i stands at i.
    "none": the paper; neither query nor stored keys are turned.
    "zero": all keys at 0 (Extended Mind, arXiv 2406.02332); the search too takes the turned query.
    "original": the key stored a tokens before the newest at -1 - a, its true place.
    "slots": the chosen keys in their order, the r-th newest at -1 - r, one further if it is not among the newest
        top_k (Landmark Attention, arXiv 2305.16300, with blocks of one token).
    "parallel": token i of any stored segment of T tokens at i - T (Memory3, arXiv 2407.01178).
    Except for "zero" keys are chosen free of position: a search over turned keys would turn the whole store. Equal keys
    (equal tokens in the first block, or repeated at the start of a segment) are a tie: which is placed, rounding says.
gate: b_h at the start (paper 0: half and half). "identity": g_h = tanh(b_h) from b_h = 0 instead, so that an attached
    memory changes nothing at first and still has a gradient.

Decisions:
- top_k is the paper's 32; the released configuration has 128. The released approximate search gives empty buckets a
  zero key with logit 0; here missing entries are masked.
- Grouped-query hosts: the store holds key-value heads; each query head searches its own.
- A slot's number and the count of tokens give the place of its token, so places are not stored, but for "parallel".
- A full store evicts its oldest tokens or refuses to read on. It does not spill to slower memory: every token searches
  the whole store, so what had spilled would cross the bus for every token read.
- Pages: a commit copies the pages it writes to, so they hold an eighth of the store and 8,192 tokens at most (32,768
  for faiss, which indexes each page once it is complete: a pause of about a second for each page and key head).
- The released code's Transformer-XL cache of the previous window is a memory of its own: stack this one with
  "transformer-xl", whose length is then 0 in the blocks of this one.

Exact search reads N e numbers for each key head and token: that is its floor. Parameters: b_h and s_h of each block.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, HostError, StateError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, Site, option
from ...core.state import State
from ...core.step import AttentionCall, Step
from ...ops import paged_bank
from ...ops.attention import attend, attend_selected, merge
from ...ops.nearest import import_faiss
from ...ops.nearest_rows import nearest_rows
from ...ops.rotary import rotate

_PAGE = {"exact": 8192, "faiss": 32768}


@dataclass(frozen=True, kw_only=True)
class MemorizingTransformersConfig(MemoryConfig):
    name = "memorizing-transformers"
    presets = {"attach": {"normalise": "memory", "gate": "identity"}}

    memory_layers: tuple | None = option(
        None, "blocks with a store, negative numbers counted from the last; None: one, three quarters up (9th of 12)"
    )
    capacity: int = option(8192, "tokens N that a store keeps", minimum=1)
    full: Literal["evict", "refuse"] = option("evict", "a full store forgets its oldest tokens, or raises an error")
    top_k: int = option(32, "stored tokens that a query reads", minimum=1)
    merge: Literal["gate", "joint"] = option(
        "gate", "mix the memory's part in by a gate, or take one softmax over the chosen and the local tokens"
    )
    position_policy: Literal["none", "zero", "original", "slots", "parallel"] = option(
        "none", "where stored keys stand; all but 'none' need a host with rotary positions"
    )
    normalise: Literal["both", "memory", "none"] = option(
        "both", "where scores are of unit vectors with a learned scale: in both parts, in the memory's, or nowhere"
    )
    scale: float | None = option(None, "start of the learned scale s_h; None: sqrt(head width) for 'memory', else 1")
    gate: float | Literal["identity"] = option(
        0.0, "start of the gate's bias b_h, for merge='gate'; 'identity': a gate that starts closed"
    )
    search: Literal["exact", "faiss"] = option("exact", "compare with every key, or use indexes (mnemic[knn])")

    def validate(self) -> None:
        if self.memory_layers == ():
            raise ConfigError("memorizing-transformers: memory_layers is empty; name one block or leave it out.")
        if 4 * self.page < self._page_limit:
            unit = 2 ** int(math.log2(self._page_limit))
            raise ConfigError(
                f"memorizing-transformers: capacity = {self.capacity} cannot be cut into pages of {self._page_limit} "
                f"tokens or a little less; use {-(-self.capacity // unit) * unit}."
            )

    @property
    def page(self) -> int:
        """Tokens of a page: the largest divisor of the capacity within an eighth of it and the limit of the search."""
        return next(n for n in range(self._page_limit, 0, -1) if self.capacity % n == 0)

    @property
    def _page_limit(self) -> int:
        return max(1, min(self.capacity // 8, _PAGE[self.search]))


class MemorizingTransformers(Memory):
    name = "memorizing-transformers"
    config_class = MemorizingTransformersConfig
    paper = "Memorizing Transformers (2022, arXiv 2203.08913)"
    state_size = "2 * Hkv * e * capacity"
    masked_commits = True
    limits: ClassVar = {"gradients through the state": "the store is detached, as in the paper: that makes it cheap"}
    config: MemorizingTransformersConfig

    def __init__(self, config: MemorizingTransformersConfig, host: HostSpec):
        super().__init__(config, host)
        if config.position_policy != "none" and not host.rotary:
            raise HostError(
                f"memorizing-transformers: position_policy={config.position_policy!r} turns stored keys to a place, "
                "and this host has no rotary positions; use position_policy='none'."
            )
        if config.search == "faiss":
            import_faiss()
        start = config.scale
        if start is None:
            start = math.sqrt(host.head_dim) if config.normalise == "memory" else 1.0
        shape, factory = (len(self.layers), host.num_heads), {"dtype": host.dtype, "device": host.device}
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        self.scale = nn.Parameter(torch.full(shape, float(start), **factory))
        self.gate_bias = None
        if config.merge == "gate":
            bias = 0.0 if config.gate == "identity" else float(config.gate)
            self.gate_bias = nn.Parameter(torch.full(shape, bias, **factory))
        self._banks = {layer: self._names(layer) for layer in self.layers}

    @property
    def layers(self) -> tuple[int, ...]:
        chosen, total = self.config.memory_layers, self.host.num_layers
        if chosen is None:
            return (math.ceil(0.75 * total) - 1,)
        if any(not isinstance(i, int) or not -total <= i < total for i in chosen):
            raise ConfigError(f"memorizing-transformers: memory_layers = {chosen!r}, expected blocks of {total}.")
        return tuple(sorted({i % total for i in chosen}))

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        if self.config.merge == "gate" and self.config.normalise != "both":
            return frozenset()
        return frozenset(("attention", layer) for layer in self.layers)

    @property
    def identity_at_attach(self) -> bool:
        c = self.config
        return c.merge == "gate" and c.gate == "identity" and c.normalise != "both"

    def initial_state(self, batch_size: int) -> State:
        row = ((self.host.num_key_value_heads, self.host.head_dim), self.host.dtype)
        fields: dict = {f"{layer}/{name}": row for layer in self.layers for name in ("keys", "values")}
        if self.config.position_policy == "parallel":
            fields["places"] = ((), torch.int64)
        return State(paged_bank.empty(fields, self.config.capacity, self.config.page, batch_size, self.host.device))

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        c, i = self.config, self._index[step.layer]
        scale = self.scale[i].abs()[:, None, None]
        stored, free = call.free_keys().detach(), call.free_query()
        if c.normalise != "none":
            stored, free = _unit(stored), _unit(free)
        step.keep(keys=stored.transpose(1, 2), values=call.new_values.detach().transpose(1, 2))

        bank = {name: step.state(name) for name in self._banks[step.layer]}
        query = free
        if c.position_policy != "none":
            query = call.query if c.normalise == "none" else _unit(call.query)
        sought = (query if c.position_policy == "zero" else free).detach()
        fields = (f"{step.layer}/keys", f"{step.layer}/values")
        keys, values, slots = nearest_rows(sought, bank, c.top_k, *fields, index=c.search)
        keys, values = self._placed(keys, slots, bank, step).to(query.dtype), values.to(query.dtype)
        raw = c.normalise == "none"
        read = attend_selected(
            query, keys, values, slots >= 0, scale * call.scale if raw else scale, call.softcap if raw else None
        )

        if self.gate_bias is None:
            return merge([self._local(call, scale), read])[0].transpose(1, 2)
        local = self._plain(call, scale)
        gate = torch.tanh(self.gate_bias[i]) if c.gate == "identity" else torch.sigmoid(self.gate_bias[i])
        empty = (bank["count"] == 0)[:, None, None, None]
        gate = gate[:, None].to(local.dtype).expand(*local.shape[:3], 1).masked_fill(empty, 0)
        return torch.lerp(local, read[0].transpose(1, 2).to(local.dtype), gate)

    def commit(self, state: State, segment: Segment) -> State:
        new = {
            f"{layer}/{name}": segment.trace[layer][name].transpose(1, 2)
            for layer in self.layers
            for name in ("keys", "values")
        }
        batch, _, tokens, _ = new[f"{self.layers[0]}/keys"].shape
        if self.config.position_policy == "parallel":
            new["places"] = torch.arange(-tokens, 0, device=state["count"].device).expand(batch, -1)
        if self.config.full == "refuse":
            added = tokens if segment.mask is None else segment.mask.sum(1)
            if int((state["count"] + added).max()) > self.config.capacity:
                raise StateError(
                    f"memorizing-transformers: the store of {self.config.capacity} tokens has no room for {tokens} "
                    "more; give it a larger capacity, let it forget with full='evict', or start a new stream."
                )
        return State(paged_bank.append(dict(state), new, segment.mask))

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block: mean gate and mean scale; the share of the store that is filled."""
        found = {"filled": (state["count"] / self.config.capacity).clamp_max(1).mean()}
        for layer, i in self._index.items():
            found[f"block{layer}/scale"] = self.scale[i].detach().abs().float().mean()
            if self.gate_bias is not None:
                squash = torch.tanh if self.config.gate == "identity" else torch.sigmoid
                found[f"block{layer}/gate"] = squash(self.gate_bias[i].detach().float()).mean()
        return found

    def _names(self, layer: int) -> list[str]:
        """The tensors of the state that a block reads."""
        mine = [n for n in self.initial_state(1) if n.startswith((f"{layer}/", "places/"))]
        return ["count", *mine]

    def _plain(self, call: AttentionCall, scale: Tensor) -> Tensor:
        """The local part, (B, T, H, e), by the host's own attention."""
        if self.config.normalise != "both":
            return call.plain()
        return call.plain(query=_unit(call.query) * (scale / call.scale), keys=_unit(call.keys))

    def _local(self, call: AttentionCall, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The local part, (B, H, T, e), and its log-sum-exp."""
        mask = call.bool_mask() if call.mask is None else call.mask
        if self.config.normalise == "both":
            return attend(_unit(call.query), _unit(call.keys), call.values, mask, scale, call.softcap)
        return attend(call.query, call.keys, call.values, mask, call.scale, call.softcap)

    def _placed(self, keys: Tensor, slots: Tensor, bank: paged_bank.Bank, step: Step) -> Tensor:
        """The chosen keys (B, H, T, k, e), from slots (B, H, T, k), turned to where the policy puts them."""
        policy = self.config.position_policy
        if policy == "none":
            return keys
        if policy == "zero":
            places = slots.new_zeros(1, 1)
        elif policy == "parallel":
            places = paged_bank.take(bank, "places", slots).flatten(1)
        else:
            age = (bank["count"][:, None, None, None] - 1 - slots) % self.config.capacity
            if policy == "slots":
                newer = age.masked_fill(slots < 0, self.config.capacity).argsort(-1).argsort(-1)
                age = newer + (age >= self.config.top_k)
            places = (-1 - age).flatten(1)
        turned = step.host.rotary(places + step.first, step.layer)
        assert turned is not None
        return rotate(keys.flatten(1, 3)[:, None], *turned).view_as(keys)


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension."""
    square = (x if x.dtype == torch.float64 else x.float()).square().sum(-1, keepdim=True)
    return x * torch.rsqrt(square + 1e-6).to(x.dtype)
