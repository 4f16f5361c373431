"""Memory+: Memory Layers at Scale (2024, arXiv 2412.09764).

One table of n^2 learned rows that a few blocks share, each with its own product keys and queries, gated by the token
that reads. Written out (x input of the feed-forward part, h heads, i, j = 1..n):

    select   [q1; q2] = W_q x;  s_ij = q1 . c1_i + q2 . c2_j;  I = the k best of all n^2;  w = softmax(s_I)
    read     y = sum over heads and I of w V[i n + j]
    gate     m = (y * silu(x W_1)) W_2
    replace  ffn(x) <- m            beside   ffn(x) <- ffn(x) + m, with W_2 = 0 at first

Nothing is remembered of a stream; the optimiser alone writes, with a constant rate of its own for V
(`optimizer_groups`). `access_counts` and `select_rows` choose the rows to train when little is to be learned and the
rest kept (sparse memory finetuning, arXiv 2510.15103).

Decisions:
- The table is a parameter of the memory, held, counted and saved once; the released code keeps it on the class.
- `place`: the paper replaces feed-forward parts, and finds that six are worse than three: more than a quarter of them
  warns. A pretrained host keeps its own ("beside", the preset "attach") and is unchanged at first.
- `memory_layers`: three blocks, centred, with equal stride (4, 12, 20 of 24); fewer where the host has less than 12.
- `reader` "peer" (He 2024, arXiv 2407.04153): each row is an expert of rank 1, y = sum of w gelu(u . x) V, with a
  second table of u, read by the same keys.
- `qk_norm` (in the paper where training is unstable, not in the released code): half-queries and half-keys through
  LayerNorm, scores times (k_dim / 2)^-1/2.
- The tables are at least float32 whatever the host's dtype: in bfloat16 small updates are lost.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError, InputError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, Site, option
from ...core.state import State
from ...core.step import Step
from ...ops import product_keys


@dataclass(frozen=True, kw_only=True)
class MemoryLayersConfig(MemoryConfig):
    name = "memory-layers-at-scale"
    presets = {"attach": {"place": "beside"}}

    num_keys: int = option(1024, "half-keys n of a set; the table has n^2 rows", minimum=1)
    num_heads: int = option(4, "heads h, each with its own queries and keys", minimum=1)
    top_k: int = option(32, "rows k that a head reads; at most num_keys", minimum=1)
    key_dim: int | None = option(None, "width of a query; even; None for half the host's width", minimum=2)
    value_dim: int | None = option(None, "width of a row; None for the host's", minimum=1)
    memory_layers: tuple | None = option(None, "blocks that read the table, or None for up to three, evenly spread")
    place: Literal["replace", "beside"] = option(
        "replace", "in place of the feed-forward part, or added to it, 0 at first"
    )
    reader: Literal["softmax", "peer"] = option("softmax", "what a row is: a value, or an expert of rank 1")
    qk_norm: bool = option(False, "normalise half-queries and half-keys, where training is unstable")
    values_lr: float = option(1e-3, "constant learning rate of the table", minimum=0)
    sparse_gradients: bool = option(False, "sparse gradients of the table, for optimisers such as SparseAdam")

    def validate(self) -> None:
        if self.top_k > self.num_keys:
            raise ConfigError(
                f"{self.name}: top_k = {self.top_k} rows of num_keys = {self.num_keys}; expected at most so many."
            )
        if self.key_dim is not None and self.key_dim % 2:
            raise ConfigError(
                f"{self.name}: key_dim = {self.key_dim}, expected an even number: a query has two halves."
            )


class Reader(nn.Module):
    """What one block has of its own. `forward` addresses the table: x (..., d) -> weights and rows (..., h, k)."""

    def __init__(self, config: MemoryLayersConfig, host: HostSpec):
        super().__init__()
        factory: Any = {"dtype": host.dtype, "device": host.device}
        width, heads = host.hidden_size, config.num_heads
        key_dim = config.key_dim or width // 4 * 2
        self.shape, self.top_k = (heads, 2, key_dim // 2), config.top_k
        self.query = nn.Linear(width, heads * key_dim, bias=False, **factory)
        nn.init.xavier_uniform_(self.query.weight)
        subkeys = torch.empty(heads, 2, config.num_keys, key_dim // 2, **factory)
        self.subkeys = nn.Parameter(product_keys.init_subkeys_(subkeys, key_dim))
        self.query_norm = nn.LayerNorm(key_dim // 2, **factory) if config.qk_norm else None
        self.key_norm = nn.LayerNorm(key_dim // 2, **factory) if config.qk_norm else None
        inner = config.value_dim or width
        self.gate = nn.Linear(width, inner, bias=False, **factory)
        self.out = nn.Linear(inner, width, bias=False, **factory)
        for linear in (self.gate, self.out):
            nn.init.normal_(linear.weight, std=width**-0.5)
        if config.place == "beside":
            nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, keys = self.query(x).unflatten(-1, self.shape), self.subkeys
        if self.query_norm is not None and self.key_norm is not None:
            query, keys = self.query_norm(query) * self.shape[-1] ** -0.5, self.key_norm(keys)
        return product_keys.address(query, keys, self.top_k)


class MemoryLayers(Memory):
    name = "memory-layers-at-scale"
    config_class = MemoryLayersConfig
    paper = "Memory Layers at Scale (2024, arXiv 2412.09764)"
    state_size = "0"
    config: MemoryLayersConfig

    def __init__(self, config: MemoryLayersConfig, host: HostSpec):
        super().__init__(config, host)
        layers, wide = self.layers, torch.promote_types(host.dtype, torch.float32)
        if config.place == "replace" and len(layers) > max(1, host.num_layers // 4):
            warnings.warn(
                f"{self.name} replaces {len(layers)} of {host.num_layers} feed-forward parts; beyond a quarter of them "
                "the paper finds losses. Choose fewer memory_layers, or place='beside'.",
                stacklevel=2,
            )
        self._index = {layer: i for i, layer in enumerate(layers)}
        self.readers = nn.ModuleList(Reader(config, host) for _ in layers)

        def table(width: int) -> nn.Parameter:
            size = (config.num_keys**2, width)
            return nn.Parameter(product_keys.init_values_(torch.empty(size, dtype=wide, device=host.device)))

        self.values = table(config.value_dim or host.hidden_size)
        self.experts = table(host.hidden_size) if config.reader == "peer" else None

    @property
    def layers(self) -> tuple[int, ...]:
        chosen, total = self.config.memory_layers, self.host.num_layers
        if chosen is None:
            count = min(3, max(1, total // 4))
            return tuple((2 * i + 1) * total // (2 * count) for i in range(count))
        if not chosen or any(not isinstance(i, int) or not 0 <= i < total for i in chosen):
            raise ConfigError(f"{self.name}: memory_layers = {chosen!r}, expected block numbers below {total}.")
        if sorted(set(chosen)) != list(chosen):
            raise ConfigError(f"{self.name}: memory_layers = {chosen!r}, expected increasing block numbers.")
        return chosen

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        return frozenset(("feed_forward", i) for i in self.layers) if self.config.place == "replace" else frozenset()

    @property
    def identity_at_attach(self) -> bool:
        return self.config.place == "beside"

    def optimizer_groups(self) -> Mapping[str, Mapping[str, float]]:
        table = {"lr": self.config.values_lr, "weight_decay": 0.0}
        experts = {} if self.experts is None else {"experts": table}
        return {"values": table, **experts, "*.subkeys": {"weight_decay": 0.0}}

    def feed_forward(self, x: Tensor, mlp: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        reader: Any = self.readers[self._index[step.layer]]
        weights, rows = reader(x)
        if step.diagnosing:
            step.keep(rows=rows, weights=weights.detach())
        sparse = self.config.sparse_gradients
        if self.experts is None:
            read = product_keys.gather(rows, weights, self.values, sparse)
        else:
            read = product_keys.expert_gather(rows, weights, x, self.experts, self.values, sparse)
        out = reader.out(read * F.silu(reader.gate(x)))
        return out if self.config.place == "replace" else mlp(x) + out

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block: share of rows hit, divergence of the mass from uniform, entropy of reads, mean largest weight."""
        found: dict[str, Tensor] = {}
        for layer, trace in segment.trace.items():
            # Tokens that were read before anybody asked have no weights.
            asked = trace["weights"].sum((-2, -1)) > 0
            usage = product_keys.usage(trace["rows"][asked], trace["weights"][asked], self.config.num_keys**2)
            found.update({f"block{layer}/{name}": value for name, value in usage.items()})
        return found


@torch.no_grad()
def access_counts(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """How often each row is read, over all blocks and heads: (batches, n^2) int64.

    Args:
        model: with this memory, alone or in a stack of which it is the only one of its kind. batches: ids (B, T) each,
            without padding.

    Raises:
        InputError: the model has no such memory, or several; there are no batches.
    """
    memories = [m for m in model.modules() if isinstance(m, MemoryLayers)]
    if len(memories) != 1:
        raise InputError(f"Rows are counted in a model with one memory-layers-at-scale; this one has {len(memories)}.")
    size, counts = memories[0].config.num_keys ** 2, []

    def count(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        counts[-1] += output[1].flatten().bincount(minlength=size)

    training = model.training
    hooks = [reader.register_forward_hook(count) for reader in memories[0].readers]
    try:
        model.eval()
        for ids in batches:
            counts.append(torch.zeros(size, dtype=torch.int64, device=ids.device))
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not counts:
        raise InputError("Rows are counted over at least one batch of ids (B, T).")
    return torch.stack(counts)


def select_rows(new: Tensor, background: Tensor, num_rows: int) -> Tensor:
    """The rows that new data reads often and other data seldom, best first: (num_rows,) int64, or fewer.

    Ranked by c / sum(c) * log((N + 1) / (N_r + 1)), c the reads of a row on new data, N_r of N batches of background
    data reading it (arXiv 2510.15103, section 3). Rows that new data does not read, or all batches do, are not chosen.

    Args:
        new: (n^2,), or (batches, n^2), which are summed. background: (N, n^2); both from `access_counts`.

    Raises:
        InputError: shapes that do not fit, or num_rows below 1.
    """
    if background.dim() != 2 or new.shape[-1:] != background.shape[1:] or num_rows < 1:
        raise InputError(
            f"new is {tuple(new.shape)}, background {tuple(background.shape)}, num_rows {num_rows}; expected (n^2,) or "
            "(batches, n^2), (batches, n^2) and at least 1."
        )
    counts = new.reshape(-1, new.shape[-1]).sum(0).double()
    seen_in = (background > 0).sum(0)
    rarity = ((len(background) + 1) / (seen_in + 1).double()).log()
    scores = counts / counts.sum().clamp_min(1) * rarity
    best = scores.topk(min(num_rows, len(scores)))
    return best.indices[best.values > 0]
