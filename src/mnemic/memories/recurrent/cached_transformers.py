"""GRC, Cached Transformers: a differentiable memory cache (2023, arXiv 2312.12742, AAAI 2024).

Each layer keeps a cache C of M tokens with D = r d channels. A GRU rewrites it at the end of a segment, and the
attention of the next segment mixes what it reads there into its own result, head by head, before the output
projection. x is the input of the attention, s the segment:

    write    X' = average of x_s[.., :D] over time into M bins
             u, g = sigmoid(W_g [X' ; C]);  C~ = W_c [X' ; g * C];  C_s = (1 - u) * C_{s-1} + u * C~
    read     o_mem = attention(q = x_s[.., :D] W_q; k, v = C_{s-1} W_k, C_{s-1} W_v)
             o = o_self + w_h (o_mem - o_self),   w_h = sigmoid(lambda_h), or tanh(lambda_h)

Decisions:
- As printed, the segment is pooled over time into the cache and all its tokens read it at once: each sees its future.
  Here they read C_{s-1}, and every row has a cache of its own instead of one averaged over the batch. For encoders,
  where that is no fault, `ops.gated_cache.GatedCacheAttention` is the layer as printed.
- An empty cache is not read (the biases of W_k and W_v would speak): a first segment is the host's.
- X' is an adaptive average, not an interpolation, which would skip tokens of long segments.
- gate "tanh" starts at lambda = 0 as the host and has a gradient there; the paper's sigmoid is 0 nowhere.
- The paper detaches what is stored (preset "paper"): one update has a gradient, which reaches back one segment for each
  layer. By default gradients go through all updates, and training may cut them (`Truncation`).
- The released code gives the candidate a GELU and a LayerNorm and starts lambda at -1 (preset "released"). It pools the
  attention's output; here it is the input, as printed.
- W_q, W_k and W_v make heads of the host's width e, one for each query head, so that the two results can be mixed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import AttentionCall, Host, Step
from ...ops.gated_cache import GatedCache, channels_of, mix, resample


@dataclass(frozen=True, kw_only=True)
class CachedTransformersConfig(MemoryConfig):
    name = "cached-transformers"
    presets = {
        "attach": {"gate": "tanh"},
        "paper": {"stop_gradient": True},
        "released": {"candidate": "normed", "gate_start": -1.0, "stop_gradient": True},
    }

    cache_length: int = option(64, "tokens M of a layer's cache", minimum=1)
    ratio: float = option(0.5, "channels of a cached token as a share r of the host's width", minimum=0, maximum=1)
    candidate: Literal["linear", "normed"] = option(
        "linear", "what may enter the cache: as printed, or through GELU and LayerNorm"
    )
    gate: Literal["sigmoid", "tanh"] = option("sigmoid", "what makes the share of the cache of lambda_h")
    gate_start: float = option(0.0, "lambda_h at the start")
    stop_gradient: bool = option(False, "no gradient through the cache that an update starts from")


class CachedTransformers(Memory):
    name = "cached-transformers"
    config_class = CachedTransformersConfig
    paper = "Cached Transformers: Improving Transformers with Differentiable Memory Cache (2023, arXiv 2312.12742)"
    state_size = "L * cache_length * ratio * d"
    slot_dims = {"cache": 2}
    config: CachedTransformersConfig

    def __init__(self, config: CachedTransformersConfig, host: HostSpec):
        super().__init__(config, host)
        try:
            self.channels = channels_of(host.hidden_size, config.ratio)
        except ValueError as error:
            raise ConfigError(f"cached-transformers: {error}") from error
        factory = {"dtype": host.dtype, "device": host.device}
        shape = (self.channels, host.num_heads, host.head_dim, config.candidate)
        self.caches = nn.ModuleList(GatedCache(*shape, **factory) for _ in range(host.num_layers))
        self.gate = nn.Parameter(torch.full((host.num_layers, host.num_heads), config.gate_start, **factory))

    @property
    def identity_at_attach(self) -> bool:
        return self.config.gate == "tanh" and self.config.gate_start == 0

    @property
    def limits(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        cut = self.config.stop_gradient
        return {"gradients through the state": "an update starts from a detached cache (paper)"} if cut else {}

    def initial_state(self, batch_size: int) -> State:
        """ "cache" (B, L, M, D), zeros; "count" (B,), segments written so far."""
        shape = (batch_size, self.host.num_layers, self.config.cache_length, self.channels)
        count = torch.zeros(batch_size, dtype=torch.int64, device=self.gate.device)
        return State({"cache": self.gate.new_zeros(shape), "count": count})

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        """Per layer "<layer>/keys" and "<layer>/values", (B, H, M, e), and "<layer>/weight", w_h (B, H)."""
        written, weights = (state["count"] > 0)[:, None], self._weights()
        reads = {}
        for layer, cache in enumerate(state["cache"].unbind(1)):
            reads[f"{layer}/keys"], reads[f"{layer}/values"] = self._layer(layer).keys_values(cache)
            reads[f"{layer}/weight"] = weights[layer] * written
        return reads

    def before_attention(self, x: Tensor, step: Step) -> Tensor:
        step.keep(x=x[..., : self.channels])
        step.add_note(x=x)
        return x

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        x = step.note("x", step.layer)
        assert x is not None
        keys, values, weight = (step.read(f"{step.layer}/{name}") for name in ("keys", "values", "weight"))
        return mix(call.plain(), self._layer(step.layer).read(x, keys, values), weight)

    def commit(self, state: State, segment: Segment) -> State:
        after = []
        for layer, cache in enumerate(state["cache"].unbind(1)):
            before = cache.detach() if self.config.stop_gradient else cache
            new = resample(segment.trace[layer]["x"], self.config.cache_length)
            after.append(self._layer(layer).update(before, new.to(before.dtype)))
        return State({"cache": torch.stack(after, dim=1), "count": state["count"] + 1})

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block: the cache's mean share w_h of the attention, and the norm of a cached token that was read."""
        norms, shares = state["cache"].detach().float().norm(dim=-1).mean((0, 2)), self._weights().detach().float()
        found = {f"block{layer}/weight": shares[layer].mean() for layer in self.layers}
        return found | {f"block{layer}/cache_norm": norms[layer] for layer in self.layers}

    def _weights(self) -> Tensor:
        """w_h of all layers, (L, H)."""
        return torch.tanh(self.gate) if self.config.gate == "tanh" else torch.sigmoid(self.gate)

    def _layer(self, layer: int) -> GatedCache:
        cache = self.caches[layer]
        assert isinstance(cache, GatedCache)
        return cache
