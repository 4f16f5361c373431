"""Persistent memory: Augmenting Self-attention with Persistent Memory (2019, arXiv 1907.01470).

N learned key and value vectors per key-value head and layer stand beside the context in one softmax:

    K_P = sqrt(e) key, V_P = sqrt(N) value;  key ~ N(0, 1/e), value ~ N(0, 1/N)
    w = softmax([scale q.K_ctx + mask ; scale q'.K_P + slot_bias]);  y = w_ctx V_ctx + w_P V_P

q' is the query free of position. FFN(x) = U relu(W x) is attention over keys W and values U with relu in place of
softmax: the slots can take its part (`feed_forward` "drop", the all-attention layer; N = the inner width at equal
parameters).

Decisions:
- The multipliers stay: they raise the effective learning rate of the slots.
- Slots are never cached: the cache and positions count text only. Slots have no place, so rotary hosts turn the query
  back for them; context and slots are then attended apart and merged by their log-sum-exp, which is the same softmax.
  Elsewhere one fused kernel runs over both.
- A softcap of the host holds for slots too. Its attention dropout does not reach this attention.
- The current token sees itself, as in the host (the authors' code leaves it out). No adaptive span.
- `gate` attaches to a trained host without changing it: values start at 0 and
  y = y_ctx + tanh(g) (y - y_ctx) per head, g = 0. `slot_bias` -10 is the other way: nearly the host (less than 0.3 % of
  the softmax for 64 slots of equal scores), but small gradients at first.
- With "drop" the host's feed-forward weights are frozen, and norms right around them get no gradient. Post-norm as in
  the paper is the host's matter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.memory import HostSpec, Memory, MemoryConfig, Site, option
from ...core.step import AttentionCall, Step
from ...ops.attention import attend, merge, with_columns


@dataclass(frozen=True, kw_only=True)
class PersistentMemoryConfig(MemoryConfig):
    name = "persistent-memory"
    presets = {"attach": {"gate": True}}

    num_slots: int = option(1024, "slots N per key-value head and layer", minimum=0)
    slot_bias: float | None = option(None, "start of a learned bias per head on the slots' scores; None: no bias")
    gate: bool = option(False, "values from 0 and a learned gate from 0: the host is unchanged at first")
    feed_forward: Literal["keep", "drop"] = option("keep", "the host's feed-forward parts, or none: attention only")


class PersistentMemory(Memory):
    name = "persistent-memory"
    config_class = PersistentMemoryConfig
    paper = "Augmenting Self-attention with Persistent Memory (2019, arXiv 1907.01470)"
    state_size = "0"
    config: PersistentMemoryConfig

    def __init__(self, config: PersistentMemoryConfig, host: HostSpec):
        super().__init__(config, host)
        factory = {"dtype": host.dtype, "device": host.device}
        slots, width = config.num_slots, host.head_dim
        shape = (host.num_layers, host.num_key_value_heads, slots, width)
        self.keys = nn.Parameter(torch.randn(shape, **factory) * width**-0.5)
        values = torch.zeros(shape, **factory) if config.gate else torch.randn(shape, **factory)
        self.values = nn.Parameter(values * max(slots, 1) ** -0.5)
        heads = (host.num_layers, host.num_heads)
        self.bias = None if config.slot_bias is None else nn.Parameter(torch.full(heads, config.slot_bias, **factory))
        self.gate = nn.Parameter(torch.zeros(heads, **factory)) if config.gate else None

    def uses(self, method: str) -> bool:
        if method == "feed_forward":
            return self.config.feed_forward == "drop"
        return super().uses(method)

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        sites: tuple[Site, ...] = ("attention", "feed_forward") if self.uses("feed_forward") else ("attention",)
        return frozenset((site, layer) for site in sites for layer in self.layers)

    @property
    def identity_at_attach(self) -> bool:
        return (self.config.gate or not self.config.num_slots) and self.config.feed_forward == "keep"

    @property
    def limits(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.config.feed_forward == "keep":
            return {}
        return {"gradients to every parameter": "norms around the dropped feed-forward parts have nothing to scale"}

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """K_P and V_P, (1, key-value heads, N, e)."""
        _, _, number, width = self.keys.shape
        return self.keys[None, layer] * width**0.5, self.values[None, layer] * number**0.5

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        if not self.config.num_slots:
            return call.plain()
        keys, values = self.slots(step.layer)
        bias = None if self.bias is None else self.bias[step.layer][None, :, None, None]
        if call.rotation is None and call.softcap is None and self.gate is None:
            out = with_columns(call.query, call.keys, call.values, call.mask, keys, values, bias, call.scale)
            return out.transpose(1, 2)
        # Without a mask a single query sees all; more need their triangle.
        mask = call.bool_mask() if call.mask is None and call.query.shape[2] > 1 else call.mask
        context = attend(call.query, call.keys, call.values, mask, call.scale, call.softcap)
        slots = attend(call.free_query(), keys, values, bias, call.scale, call.softcap)
        out = merge([context, slots])[0]
        if self.gate is not None:
            gate = torch.tanh(self.gate[step.layer])[:, None, None]
            out = context[0] + gate * (out - context[0])
        return out.transpose(1, 2)

    def feed_forward(self, x: Tensor, mlp: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        return torch.zeros_like(x)
