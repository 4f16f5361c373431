"""Linear attention with a running matrix, as a memory: where it stands, and all but the rule that writes the matrix.

    q, k, v = SiLU(conv(x W_q)), SiLU(conv(x W_k)), SiLU(conv(x W_v))      causal, one filter a channel
    q, k   <- q / |q| / sqrt(d_k),  k / |k|                                per head
    o       = what the rule reads                                          per head
    y       = (RMSNorm(o) [* SiLU(x W_g)]) W_o

DeltaNet (arXiv 2406.06484) and Gated DeltaNet (arXiv 2412.06464) share this to the letter.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, option
from ...core.state import State
from ...core.step import Step
from ...ops.delta_rule import l2_normalise
from ...ops.short_convolution import short_convolution


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(MemoryConfig):
    presets = {"attach": {"place": "side"}}

    place: Literal["replace", "side"] = option(
        "replace", "in place of the attention, or beside it with an output that starts at zero"
    )
    memory_layers: tuple | None = option(None, "blocks with this memory; None for all; the others keep their attention")
    num_heads: int = option(4, "heads of queries and keys", minimum=1)
    expand_k: float = option(1.0, "width of all keys together, in widths of the host", minimum=0)
    expand_v: float = option(1.0, "width of all values together, in widths of the host", minimum=0)
    conv_kernel: int = option(4, "tokens that a short convolution sees, 0 for no convolution", minimum=0)
    output_gate: bool = option(False, "gate the normalised output with SiLU(x W_g)")
    allow_negative_eigenvalues: bool = option(
        False, "let beta run to 2 instead of 1, which helps to track states such as parity"
    )


class Mixing(nn.Module):
    """Weights of one block. Widths: d host, h heads, g value heads (a multiple of h), d_k and d_v a head.

    qkv: (2 h d_k + g d_v, d), rows of q, k and v. conv: (2 h d_k + g d_v, kernel). beta: (g, d). norm: (d_v,).
    gate: (g d_v, d). out: (d, g d_v).
    """

    def __init__(self, host: HostSpec, config: LinearAttentionConfig, value_heads: int):
        super().__init__()
        d, factory = host.hidden_size, {"dtype": host.dtype, "device": host.device}
        self.heads, self.value_heads = config.num_heads, value_heads
        self.d_k = _head_width(config, "expand_k", d, self.heads)
        self.d_v = _head_width(config, "expand_v", d, value_heads)
        self.widths = [self.heads * self.d_k] * 2 + [value_heads * self.d_v]
        self.qkv, self.beta = linear(d, self.widths, host), linear(d, value_heads, host)
        self.conv = nn.Parameter(torch.empty(sum(self.widths), config.conv_kernel, **factory))
        if config.conv_kernel:
            bound = config.conv_kernel**-0.5
            nn.init.uniform_(self.conv, -bound, bound)
        else:
            self.register_parameter("conv", None)
        self.norm = nn.Parameter(torch.ones(self.d_v, **factory))
        self.gate = linear(d, self.widths[2], host) if config.output_gate else None
        self.out = linear(self.widths[2], d, host)
        if config.place == "side":
            nn.init.zeros_(self.out.weight)
        self.beta_range = 2.0 if config.allow_negative_eigenvalues else 1.0

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        like = self.qkv.weight
        factory = {"dtype": wide(like.dtype), "device": like.device}
        state = {"matrix": torch.zeros(batch, self.value_heads, self.d_k, self.d_v, **factory)}
        if self.conv is not None:
            state["tail"] = torch.zeros(batch, self.conv.shape[1] - 1, sum(self.widths), **factory)
        return state

    def project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (B, T, g, d_k), v (B, T, g, d_v) and beta (B, T, g) of inputs (B, T, d); moves the convolution on."""
        qkv = self.qkv(x)
        if self.conv is None:
            qkv = F.silu(qkv)
        else:
            qkv, tail = short_convolution(qkv, self.conv, step.running("tail"), step.real)
            step.leave(tail=tail)
        q, k, v = qkv.split(self.widths, -1)
        q, k = (l2_normalise(y.unflatten(-1, (self.heads, self.d_k)).to(wide(y.dtype))) for y in (q, k))
        if self.value_heads > self.heads:
            q, k = (y.repeat_interleave(self.value_heads // self.heads, 2) for y in (q, k))
        beta = self.beta(x).to(q.dtype).sigmoid() * self.beta_range
        return q * self.d_k**-0.5, k, v.unflatten(-1, (self.value_heads, self.d_v)), beta

    def merge(self, o: Tensor, x: Tensor) -> Tensor:
        """(B, T, d) of what was read, (B, T, g, d_v), by tokens (B, T, d)."""
        o = F.rms_norm(o, (self.d_v,), eps=1e-5) * self.norm
        if self.gate is not None:
            o = o * F.silu(self.gate(x)).view_as(o)
        return self.out(o.flatten(2).to(x.dtype))


class LinearAttention(Memory):
    """In place of the attention of `memory_layers`, or beside it. Subclasses fill `blocks` and say how to `mix`.

    State of a block: "<layer>/matrix" (B, g, d_k, d_v), key to value, and "<layer>/tail" (B, kernel - 1, channels), the
    inputs that the convolution still needs; float32, or float64 on a float64 host.
    """

    config: LinearAttentionConfig
    blocks: nn.ModuleDict
    state_size = "L * d * (d * expand_k * expand_v / num_heads + (conv_kernel - 1) * (2 * expand_k + expand_v))"

    @property
    def layers(self) -> tuple[int, ...]:
        chosen, total = self.config.memory_layers, self.host.num_layers
        if chosen is None:
            return tuple(range(total))
        if not chosen or any(type(i) is not int or not 0 <= i < total for i in chosen):
            raise ConfigError(f"{self.name}: memory_layers = {chosen!r}, expected blocks below {total}, or None.")
        return tuple(sorted(set(chosen)))

    def uses(self, method: str) -> bool:
        at = {"mixer": "replace", "residual": "side"}
        return self.config.place == at[method] if method in at else super().uses(method)

    @property
    def identity_at_attach(self) -> bool:
        return self.config.place == "side"

    def initial_state(self, batch_size: int) -> State:
        first = {layer: self.block(layer).initial_state(batch_size) for layer in self.layers}
        return State({f"{layer}/{name}": t for layer, tensors in first.items() for name, t in tensors.items()})

    def block(self, layer: int) -> Mixing:
        block = self.blocks[str(layer)]
        assert isinstance(block, Mixing)
        return block

    def mix(self, x: Tensor, step: Step) -> Tensor:
        """(B, T, d) from the attention's input (B, T, d); leaves the block's state."""
        raise TypeError(f"{type(self).__name__} must say how it mixes.")

    def mixer(self, x: Tensor, step: Step) -> Tensor:
        return self.mix(x, step)

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        return x + self.mix(source, step)


def linear(inputs: int, outputs: int | list[int], host: HostSpec) -> nn.Linear:
    """Without bias; one or several projections in one matrix, each from Xavier's uniform law with gain 2^-2.5.

    The released code starts so. Starting larger, gates wander before they learn: on the recall test of Gated DeltaNet,
    N(0, 1/inputs) knows 0.04 of the values after 500 steps and this start 0.98.
    """
    parts = [outputs] if isinstance(outputs, int) else outputs
    made = nn.Linear(inputs, sum(parts), bias=False, dtype=host.dtype, device=host.device)
    for weight in made.weight.detach().split(parts):
        nn.init.xavier_uniform_(weight, gain=2**-2.5)
    return made


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _head_width(config: LinearAttentionConfig, factor: str, width: int, heads: int) -> int:
    total = getattr(config, factor) * width
    if total < heads or not math.isclose(total / heads, round(total / heads), abs_tol=1e-6):
        raise ConfigError(
            f"{config.name}: {factor} = {getattr(config, factor)} of the host's width {width} is {total:g}, which "
            f"{heads} heads do not divide; change it or the number of heads."
        )
    return round(total / heads)
