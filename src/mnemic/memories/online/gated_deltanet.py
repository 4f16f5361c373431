"""Gated DeltaNet: Gated Delta Networks, Improving Mamba2 with Delta Rule (2024, arXiv 2412.06464).

The delta rule on a matrix that also fades: a gate of each head and token clears it fast, the delta rule edits it
precisely. Per head, with S (d_k, d_v) from keys to values, zero at the start of a stream, at every token:

    log alpha = -exp(A_log) softplus(x W_a + dt_bias),   beta = sigmoid(x W_b)
    S <- alpha S
    S <- S + beta k (v - S^T k)^T            the error is that of the faded S
    o  = S^T q                               after the write

Projections, short convolutions, norms and output are those of `_linear_attention`, with the output gate; the paper
prints S transposed. With `num_value_heads` above `num_heads`, neighbouring value heads share a query and a key.
S and the convolutions run through the stream, over the borders of segments: nothing is left to write at a commit.

Start: A_log = log U(0, 16), dt_bias the inverse softplus of a log-uniform sample of [1e-3, 0.1]; neither takes weight
decay. No projection has a bias, as in the paper (the released code has one on W_b). Projections start as in
`_linear_attention.linear`.

Hybrids: `memory_layers` says which blocks have it; others keep the host's attention, within the segment. H1 of the
paper alternates with sliding-window attention: memory_layers=(0, 2, 4, ...) on a host with `sliding_window`. H2 adds
Mamba2 blocks. Beside the attention (preset "attach") W_o starts at zero and the host is unchanged at first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, option
from ...core.step import Step
from ...ops.delta_rule import delta_rule
from ._linear_attention import LinearAttention, LinearAttentionConfig, Mixing, linear, wide


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(LinearAttentionConfig):
    name = "gated-deltanet"

    expand_k: float = option(0.75, "width of all keys together, in widths of the host", minimum=0)
    expand_v: float = option(1.5, "width of all values together, in widths of the host", minimum=0)
    num_value_heads: int | None = option(None, "heads of values, a multiple of num_heads; None for as many", minimum=1)
    output_gate: bool = option(True, "gate the normalised output with SiLU(x W_g)")

    def validate(self) -> None:
        if (self.num_value_heads or self.num_heads) % self.num_heads:
            raise ConfigError(
                f"gated-deltanet: num_value_heads = {self.num_value_heads}, expected a multiple of num_heads = "
                f"{self.num_heads}: each query and key serves equally many values."
            )


class GatedMixing(Mixing):
    """decay: (g, d), the paper's W_a. A_log, dt_bias: (g,)."""

    def __init__(self, host: HostSpec, config: GatedDeltaNetConfig):
        heads, factory = config.num_value_heads or config.num_heads, {"dtype": host.dtype, "device": host.device}
        super().__init__(host, config, heads)
        self.decay = linear(host.hidden_size, heads, host)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1e-4, 16).log().to(**factory))
        self.dt_bias = nn.Parameter(first_dt_bias(heads).to(**factory))

    def log_decay(self, x: Tensor) -> Tensor:
        """log alpha, (B, T, g), of tokens (B, T, d)."""
        dtype = wide(x.dtype)
        time = self.decay(x).to(dtype) + self.dt_bias.to(dtype)
        # Softplus; torch.compile mistakes the strides of the gradient of F.softplus.
        return -self.A_log.to(dtype).exp() * torch.logaddexp(time, torch.zeros_like(time))


class GatedDeltaNet(LinearAttention):
    name = "gated-deltanet"
    config_class = GatedDeltaNetConfig
    paper = "Gated Delta Networks: Improving Mamba2 with Delta Rule (2024, arXiv 2412.06464)"

    def __init__(self, config: GatedDeltaNetConfig, host: HostSpec):
        super().__init__(config, host)
        self.blocks = nn.ModuleDict({str(layer): GatedMixing(host, config) for layer in self.layers})

    def optimizer_groups(self) -> Mapping[str, Mapping[str, float]]:
        return {name: {"weight_decay": 0.0} for name in ("blocks.*.A_log", "blocks.*.dt_bias")}

    def mix(self, x: Tensor, step: Step) -> Tensor:
        block = self.block(step.layer)
        assert isinstance(block, GatedMixing)
        q, k, v, beta = block.project(x, step)
        o, matrix = delta_rule(q, k, v, beta, block.log_decay(x), step.running("matrix"), real=step.real)
        step.leave(matrix=matrix)
        return block.merge(o, x)


def first_dt_bias(heads: int) -> Tensor:
    """b (heads,) with softplus(b) log-uniform in [1e-3, 0.1]."""
    times = torch.exp(torch.empty(heads).uniform_(-6.907755, -2.302585))
    return times + torch.log(-torch.expm1(-times))
