"""DeltaNet: Parallelizing Linear Transformers with the Delta Rule over Sequence Length (2024, arXiv 2406.06484).

Linear attention whose matrix is corrected, not only added to: what a key was bound to is erased before the new value
is written. Per head, with S (d_k, d_v) from keys to values, zero at the start of a stream, at every token:

    beta = sigmoid(x W_beta)
    S <- S + beta k (v - S^T k)^T            one step of size beta down 1/2 |S^T k - v|^2
    o  = S^T q                               after the write

Projections, short convolutions, norms and output are those of `_linear_attention`; the paper prints S transposed.
S and the convolutions run through the stream, over the borders of segments: nothing is left to write at a commit.

Hybrids: `memory_layers` says which blocks have it; others keep the host's attention, within the segment. The paper's
stacks keep it in every second block, or in two. Beside the attention (preset "attach") W_o starts at zero and the
host is unchanged at first.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ...core.memory import HostSpec
from ...core.step import Step
from ...ops.delta_rule import delta_rule
from ._linear_attention import LinearAttention, LinearAttentionConfig, Mixing


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(LinearAttentionConfig):
    name = "deltanet"


class DeltaNet(LinearAttention):
    name = "deltanet"
    config_class = DeltaNetConfig
    paper = "DeltaNet: Parallelizing Linear Transformers with the Delta Rule (2024, arXiv 2406.06484)"

    def __init__(self, config: DeltaNetConfig, host: HostSpec):
        super().__init__(config, host)
        self.blocks = nn.ModuleDict({str(layer): Mixing(host, config, config.num_heads) for layer in self.layers})

    def mix(self, x: Tensor, step: Step) -> Tensor:
        block = self.block(step.layer)
        q, k, v, beta = block.project(x, step)
        o, matrix = delta_rule(q, k, v, beta, None, step.running("matrix"), real=step.real)
        step.leave(matrix=matrix)
        return block.merge(o, x)
