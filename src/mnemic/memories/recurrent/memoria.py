"""Memoria: Resolving Fateful Forgetting Problem through Human-Inspired Memory Architecture (2023, arXiv 2310.03052).

Engrams, vectors of the host's width, live in working, short-term and long-term memory. Those that fire together are
wired together, and along these links long-term engrams are found again; what is used lives longer, what is not is
deleted. For each segment, with H the last hidden states of the segment before and Q learned queries (`ops.engrams` is
the store M):

    abstract   W = ((softmax(Q (H W_k)^T) H W_v) W_1 + b_1) W_2 + b_2       new working engrams, into M with `lifespan`
    recall     R = short-term engrams nearest to W, and long-term ones found from them along the links
    fire       count_ij += 1 for all i, j in W and R
    read       h <- h + Attn(LN_1 h; W, W),   h <- h + Attn(LN_2 h; R, R)   in every block, behind its attention
    adjust     life_j += scale |R| a_j for j in R, a_j the mean of j's weight over blocks, heads and tokens;
               then all lives -= 1; W becomes short-term, the oldest beyond `short_capacity` long-term; life <= 0 goes

Decisions:
- A segment reads what the end of the one before put into R, so nothing reaches back. The first segment reads nothing.
- M carries no gradient, nor does H. The state keeps H, and W is made from it again when it is read: the abstractor
  learns through the working memory of the one segment behind, however the state is truncated.
- `max_engrams` slots make the state a tensor; a full store drops the shortest lives. The default is about what the
  paper's WikiText-103 settings need in the long run, num_working * lifespan + scale * (recall_short + recall_long).
- Slots are numbers of the whole store throughout. The released code mixes up numbers within long-term memory with those
  of the store, takes "none" for the last engram when it looks for starts and for a vector of zeros when it selects, and
  fires engram 0 while there is nothing in long-term memory; here none stays none.
- Ties between links are broken by a hash of what is tied and of how many engrams were made, the same in any batch.
- Attn is one for both reads, without biases, its queries from the block's input plus the attention's output: the
  residual stream of hosts with one norm before the attention, which is where the paper reads.
- Gains are rounded to 2^-16, so that a life ends at the same step however the text was cut into calls.
- Forgetting everything every 500 steps, as in the paper's training on WikiText-103, is the trainer's choice.
- `identity_start` scales each block's reads by a number that starts at 0.
Counts are dense: max_engrams^2 numbers a row.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import Host, Step
from ...ops import engrams, slot_bank
from ...ops.block_linear import BlockLinear

_GRAIN = 2.0**16


@dataclass(frozen=True, kw_only=True)
class MemoriaConfig(MemoryConfig):
    name = "memoria"
    presets = {"attach": {"identity_start": True}}

    num_working: int = option(50, "engrams that each segment makes", minimum=1)
    short_capacity: int = option(400, "engrams of short-term memory", minimum=1)
    recall_short: int = option(50, "short-term engrams that are recalled", minimum=1)
    recall_long: int = option(50, "long-term engrams that are recalled", minimum=0)
    lifespan: int = option(9, "segments that an engram lives without being used", minimum=1)
    scale: float = option(8.0, "segments that an engram of mean use lives longer", minimum=0)
    depth: int = option(10, "steps along the links of long-term memory", minimum=0)
    num_heads: int = option(4, "heads of the cross-attention; must divide the host's width", minimum=1)
    max_engrams: int = option(1280, "slots of the store; beyond, the shortest lives are dropped", minimum=1)
    identity_start: bool = option(False, "learned scale of the reads, from 0: the host is unchanged at first")

    def validate(self) -> None:
        needed = self.num_working + self.recalled
        if self.max_engrams < needed:
            raise ConfigError(
                f"memoria: max_engrams = {self.max_engrams} has no room for what one segment reads, num_working + "
                f"recall_short + recall_long = {needed}."
            )
        if not self.scale < float("inf"):
            raise ConfigError(f"memoria: scale = {self.scale}, expected a finite number.")

    @property
    def recalled(self) -> int:
        """The largest number of engrams that a segment recalls."""
        return self.recall_short + self.recall_long


class Abstractor(nn.Module):
    """(B, T, d) to (B, N, d)."""

    def __init__(self, count: int, width: int, **factory):
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(count, width, **factory))
        self.key, self.value = (nn.Linear(width, width, bias=False, **factory) for _ in range(2))
        self.widen, self.narrow = nn.Linear(width, 4 * width, **factory), nn.Linear(4 * width, width, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        weights = (self.query @ self.key(hidden).mT).softmax(-1)
        return self.narrow(self.widen(weights @ self.value(hidden)))


class Memoria(Memory):
    name = "memoria"
    config_class = MemoriaConfig
    paper = "Memoria: Resolving Fateful Forgetting through Human-Inspired Memory (2023, arXiv 2310.03052)"
    state_size = "max_engrams * (max_engrams + d + 1) + T * d"
    keeps_hidden = True
    limits: ClassVar = {"gradients through the state": "the store and what engrams are made of carry none, by design"}
    config: MemoriaConfig

    def __init__(self, config: MemoriaConfig, host: HostSpec):
        super().__init__(config, host)
        width, blocks = host.hidden_size, host.num_layers
        if width % config.num_heads:
            raise ConfigError(f"memoria: num_heads = {config.num_heads} does not divide the host's width {width}.")
        factory = {"dtype": host.dtype, "device": host.device}
        linear = lambda: BlockLinear(blocks, width, std=width**-0.5, **factory)  # noqa: E731 - four of a kind
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.LayerNorm(width, **factory) for _ in range(2)) for _ in range(blocks)
        )
        self.abstractor = Abstractor(config.num_working, width, **factory)
        self.alpha = nn.Parameter(torch.zeros(blocks, **factory)) if config.identity_start else None
        self.segment = 0

    @property
    def identity_at_attach(self) -> bool:
        return self.config.identity_start

    def commit_every(self, segment: int) -> int:
        self.segment = segment
        return segment

    def initial_state(self, batch_size: int) -> State:
        """The fields of `ops.engrams.Engrams`; recalled (B, R) int64, slots of the recalled engrams or -1; hidden
        (B, T, d), last hidden states of the segment before."""
        like, width = self.abstractor.query, self.host.hidden_size
        wide = torch.promote_types(like.dtype, torch.float32)
        store = engrams.empty(batch_size, self.config.max_engrams, width, wide, like.device)
        recalled = torch.full((batch_size, self.config.recalled), -1, dtype=torch.int64, device=like.device)
        hidden = like.new_zeros(batch_size, self.segment, width, requires_grad=False)
        return State({**store._asdict(), "recalled": recalled, "hidden": hidden})

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        """By block "<block>/keys" and "<block>/values" (B, h, N + R, e), of the working and then the recalled engrams;
        "there" (B, N + R) bool, which of them exist."""
        recalled, begun = state["recalled"], state["made"] > 0
        working = self.abstractor(state["hidden"])
        rows = torch.arange(len(recalled), device=recalled.device)[:, None]
        found = state["data"][rows, recalled.clamp_min(0)].to(working.dtype)
        both = torch.cat([working, found], dim=1)
        there = torch.cat([begun[:, None].expand(-1, working.shape[1]), recalled >= 0], dim=1)
        reads = {"there": there}
        for name, weights in (("keys", self.key.full()), ("values", self.value.full())):
            # One product for all blocks.
            wide = (both @ weights.transpose(0, 1).flatten(1)).unflatten(-1, (len(weights), -1))
            parts = slot_bank.split_heads(wide.transpose(1, 2), self.config.num_heads).unbind(1)
            reads |= {f"{layer}/{name}": part for layer, part in enumerate(parts)}
        return reads

    def before_layer(self, x: Tensor, step: Step) -> Tensor:
        step.add_note(stream=x)
        return x

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        layer, working = step.layer, self.config.num_working
        keys, values, there = step.read(f"{layer}/keys"), step.read(f"{layer}/values"), step.read("there")
        stream = step.note("stream", layer)
        assert stream is not None
        first, second = self._norms(layer)
        stream, new, old = stream + x, slice(working), slice(working, None)
        read, _ = self._attend(first(stream), keys[:, :, new], values[:, :, new], there[:, new], layer)
        more, weights = self._attend(second(stream + read), keys[:, :, old], values[:, :, old], there[:, old], layer)
        read = read + more
        step.keep(weights=weights.detach().to(torch.promote_types(weights.dtype, torch.float32)).mean(1))
        return x + (read if self.alpha is None else self.alpha[layer] * read)

    def commit(self, state: State, segment: Segment) -> State:
        c, hidden = self.config, segment.trace[-1]["hidden"].detach()
        store = engrams.Engrams(*(state[name] for name in engrams.Engrams._fields))
        store = engrams.age(store, state["recalled"], self.gains(state, segment), c.short_capacity)
        with torch.no_grad():
            store = engrams.add(store, self.abstractor(hidden), float(c.lifespan))
        recalled = engrams.recall(store, c.recall_short, c.recall_long, c.depth)
        store = engrams.fire(store, recalled)
        # A copy: the trace of the next segment is written to the same place.
        hidden = hidden.to(state["hidden"].dtype, copy=True)
        return State({**store._asdict(), "recalled": recalled, "hidden": hidden})

    @torch.no_grad()
    def gains(self, state: State, segment: Segment) -> Tensor:
        """What the recalled engrams' lives gain from a segment, (B, R)."""
        used = torch.stack([segment.trace[layer]["weights"].mean(1) for layer in self.layers]).mean(0)
        count = (state["recalled"] >= 0).sum(1, keepdim=True)
        gain = used.to(state["lifespan"].dtype) * count * self.config.scale
        return (gain * _GRAIN).round() / _GRAIN

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Mean over rows: engrams of each kind and recalled ones; mean life of an engram, and the largest gain."""
        alive, lives = state["kind"] != engrams.EMPTY, state["lifespan"].float()
        kinds = {"working": engrams.WORKING, "short": engrams.SHORT, "long": engrams.LONG}
        found = {name: (state["kind"] == kind).sum(1).float().mean() for name, kind in kinds.items()}
        found["recalled"] = (state["recalled"] >= 0).sum(1).float().mean()
        found["lifespan"] = lives.sum() / alive.sum().clamp_min(1)
        found["largest_gain"] = self.gains(state, segment).amax(1).float().mean()
        return found

    def _norms(self, layer: int) -> nn.ModuleList:
        norms = self.norms[layer]
        assert isinstance(norms, nn.ModuleList)
        return norms

    def _attend(self, x: Tensor, keys: Tensor, values: Tensor, there: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """What tokens (B, T, d) read of engrams (B, h, n, e), zero in rows without; the weights (B, h, T, n)."""
        query = slot_bank.split_heads(self.query(x, layer), self.config.num_heads)
        scores = query @ keys.mT * keys.shape[-1] ** -0.5
        there = there[:, None, None]
        # Finite, so that a row without engrams has no NaN.
        weights = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(-1) * there
        read = (weights @ values).transpose(1, 2).flatten(2)
        return self.out(read, layer), weights
