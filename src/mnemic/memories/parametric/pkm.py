"""PKM: Large Memory Layers with Product Keys (2019, arXiv 1907.05242).

A table of n^2 learned rows in place of, or beside, the feed-forward part of a block. A token reads k rows a head, found
exactly with two sets of n half-keys. Written out (x input of the feed-forward part, h heads, i, j = 1..n):

    query    q = norm(W_q x + b), split in halves [q1; q2]
    select   s_ij = q1 . c1_i + q2 . c2_j;  I = the k best of all n^2
    read     w = softmax(s_I);  m = sum over heads and I of w V[i n + j]
    replace  ffn(x) <- m          beside   ffn(x) <- ffn(x) + gate * m

Nothing is remembered of a stream; the optimiser alone writes, with a rate of its own for V (`optimizer_groups`).

Decisions:
- `query_norm`: the paper's batch normalisation keeps rows alive (without it many are never read) but mixes the tokens
  of a batch while training: tokens see later ones and other rows through its statistics. In eval mode it does not. It
  is the default of fresh hosts; "attach" normalises each half of a query alone ("layer"). Padding never enters; memory
  tokens of another memory do. A batch that activation checkpointing replays is counted once.
- With batch normalisation there is no b: it would be subtracted again, and the norm has a shift.
- `place`: the paper replaces feed-forward parts; "beside" adds to them through a gate that starts at 0, so that a
  pretrained host is unchanged at first.
- The table is at least float32 whatever the host's dtype: in bfloat16 small updates are lost.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, Site, option
from ...core.state import State
from ...core.step import Step
from ...ops import product_keys
from ...ops.masked_batch_norm import MaskedBatchNorm


@dataclass(frozen=True, kw_only=True)
class PKMConfig(MemoryConfig):
    name = "pkm"
    presets = {"attach": {"place": "beside", "query_norm": "layer"}}

    num_keys: int = option(512, "half-keys n of a set; the table has n^2 rows", minimum=1)
    num_heads: int = option(4, "heads h, each with its own queries and keys", minimum=1)
    top_k: int = option(32, "rows k that a head reads; at most num_keys", minimum=1)
    key_dim: int = option(256, "width of a query; even", minimum=2)
    memory_layers: tuple | None = option(None, "blocks with a table each, or None for the middle one")
    place: Literal["replace", "beside"] = option(
        "replace", "in place of the feed-forward part, or added to it through a gate that starts at 0"
    )
    query_norm: Literal["batch", "layer", "none"] = option(
        "batch", "normalise queries over the tokens of the batch, each half alone, or not at all"
    )
    values_lr: float = option(1e-3, "constant learning rate of the tables", minimum=0)
    sparse_gradients: bool = option(False, "sparse gradients of the tables, for optimisers such as SparseAdam")

    def validate(self) -> None:
        if self.top_k > self.num_keys:
            raise ConfigError(
                f"pkm: top_k = {self.top_k} rows of num_keys = {self.num_keys}; expected at most so many."
            )
        if self.key_dim % 2:
            raise ConfigError(f"pkm: key_dim = {self.key_dim}, expected an even number: a query has two halves.")


class Queries(nn.Module):
    """Queries and half-keys of one block: x (..., d) -> weights and rows (..., h, k)."""

    def __init__(self, config: PKMConfig, host: HostSpec):
        super().__init__()
        factory: Any = {"dtype": host.dtype, "device": host.device}
        heads, half = config.num_heads, config.key_dim // 2
        self.shape, self.top_k = (heads, 2, half), config.top_k
        batch = config.query_norm == "batch"
        self.project = nn.Linear(host.hidden_size, heads * config.key_dim, bias=not batch, **factory)
        self.norm = None
        if config.query_norm != "none":
            self.norm = MaskedBatchNorm(heads * config.key_dim, **factory) if batch else nn.LayerNorm(half, **factory)
        subkeys = torch.empty(heads, 2, config.num_keys, half, **factory)
        self.subkeys = nn.Parameter(product_keys.init_subkeys_(subkeys, half))

    def forward(self, x: Tensor, real: Tensor | None = None, track: bool = True) -> tuple[Tensor, Tensor]:
        query = self.project(x)
        if isinstance(self.norm, MaskedBatchNorm):
            query = self.norm(query, real, track)
        query = query.unflatten(-1, self.shape)
        if isinstance(self.norm, nn.LayerNorm):
            query = self.norm(query)
        return product_keys.address(query, self.subkeys, self.top_k)


class PKM(Memory):
    name = "pkm"
    config_class = PKMConfig
    paper = "Large Memory Layers with Product Keys (2019, arXiv 1907.05242)"
    state_size = "0"
    config: PKMConfig
    gate: nn.Parameter | None

    def __init__(self, config: PKMConfig, host: HostSpec):
        super().__init__(config, host)
        layers = self.layers
        self._index = {layer: i for i, layer in enumerate(layers)}
        self.queries = nn.ModuleList(Queries(config, host) for _ in layers)
        wide = torch.promote_types(host.dtype, torch.float32)
        size = (config.num_keys**2, host.hidden_size)
        self.values = nn.ParameterList(
            nn.Parameter(product_keys.init_values_(torch.empty(size, dtype=wide, device=host.device))) for _ in layers
        )
        beside = config.place == "beside"
        self.gate = nn.Parameter(torch.zeros(len(layers), dtype=host.dtype, device=host.device)) if beside else None

    @property
    def layers(self) -> tuple[int, ...]:
        chosen, total = self.config.memory_layers, self.host.num_layers
        layers = (total // 2,) if chosen is None else chosen
        if any(not isinstance(i, int) or not 0 <= i < total for i in layers) or sorted(set(layers)) != list(layers):
            raise ConfigError(f"pkm: memory_layers = {chosen!r}, expected increasing block numbers below {total}.")
        return layers

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        return frozenset(("feed_forward", i) for i in self.layers) if self.config.place == "replace" else frozenset()

    @property
    def identity_at_attach(self) -> bool:
        return self.config.place == "beside" or not self.layers

    def optimizer_groups(self) -> Mapping[str, Mapping[str, float]]:
        return {"values.*": {"lr": self.config.values_lr, "weight_decay": 0.0}} if self.layers else {}

    def feed_forward(self, x: Tensor, mlp: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        i = self._index[step.layer]
        real, track = None, True
        if step.training and self.config.query_norm == "batch":
            real, track = _counted(step), step.note("seen", step.layer) is None
            # Left on the first pass; a layer that is replayed finds it.
            step.add_note(seen=x.new_empty(0))
        weights, rows = self.queries[i](x, real, track)
        if step.diagnosing:
            step.keep(rows=rows, weights=weights.detach())
        read = product_keys.gather(rows, weights, self.values[i], self.config.sparse_gradients)
        return read if self.gate is None else mlp(x) + self.gate[i] * read

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block: share of rows hit, divergence of the mass from uniform, entropy of reads, mean largest weight."""
        found: dict[str, Tensor] = {}
        for layer, trace in segment.trace.items():
            # Tokens that were read before anybody asked have no weights.
            asked = trace["weights"].sum((-2, -1)) > 0
            usage = product_keys.usage(trace["rows"][asked], trace["weights"][asked], self.config.num_keys**2)
            found.update({f"block{layer}/{name}": value for name, value in usage.items()})
        return found


def _counted(step: Step) -> Tensor | None:
    """The tokens that enter batch statistics, (B, T): all but padding."""
    if step.real is None:
        return None
    counted = step.real.clone()
    counted[:, : step.num_read] = True
    counted[:, counted.shape[1] - step.num_write :] = True
    return counted
