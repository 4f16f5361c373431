"""LM2 as its authors' released code computes it (convergence-ai/lm2, read for facts; arXiv 2502.06049).

The code's module differs from the paper's equations and from `lm2.py`. It is here to compare with checkpoints and
numbers of that code; prefer `lm2`. One slot per token position: N = T = d, the bank starts as the identity matrix, and
it is threaded through the blocks of one forward pass (x attention output, M the bank the block below left):

    attend   A = dropout(softmax(Q K^T / sqrt(d / h)) over slots j <= token i), then top-k without renormalisation
    slots    M' = LayerNorm(M + A V);  C = LayerNorm(M' + relu(relu(M' W + b) W' + b'))
    gates    [g_in, g_forget] = sigmoid(pooled(relu(w * x)) U + tanh(M) U' + [b_in, b_forget]), b_in 0, b_forget +1
    write    M_next = g_in * tanh(C) + g_forget * M
    residual x + M_next: the updated bank is added, row by row

Decisions:
- `gate_pooling`: the code takes the mean over all tokens ("mean"), so later tokens change earlier outputs. It stays
  for parity; the default "cumulative" takes the mean over tokens <= i at slot i and is causal.
- `share_mlp`: the code's two MLP layers are one object. Both layers end in a ReLU. All linear maps have biases; this
  gives the 8 d^2 + 13 d + 2 parameters a block (33,581,058 for d = 2048) of the released module.
- Dropout on A is 0.9 in the code, probably by mistake; 0 here.
- The bank left by the last block is the next segment's. The code keeps it on the module, detached, for whatever comes
  next; here it is a state like any other: per row, reset per stream, with its graph inside a sample.
- A call has to bring whole segments for every row; there is no token-by-token decoding.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError, InputError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import Host, Step
from ...ops.slot_bank import merge_heads, split_heads


@dataclass(frozen=True, kw_only=True)
class LM2ReferenceConfig(MemoryConfig):
    name = "lm2-reference"

    num_heads: int = option(8, "heads of the cross-attention; must divide the host's width", minimum=1)
    dropout: float = option(0.0, "dropout on attention weights while training (0.9 in the code)", minimum=0, maximum=1)
    top_k: int | None = option(None, "weights kept per token after the softmax, or None for all", minimum=1)
    share_mlp: bool = option(True, "one weight matrix for both layers of the MLP")
    gate_pooling: Literal["cumulative", "mean"] = option(
        "cumulative", "tokens behind a slot's gates: those up to its position, or all (as the code; not causal)"
    )


class Block(nn.Module):
    """The module of one decoder block; d is the width, h the heads."""

    def __init__(self, config: LM2ReferenceConfig, width: int, **factory):
        super().__init__()
        self.config = config
        linear = lambda out=width: nn.Linear(width, out, **factory)  # noqa: E731 - seven of a kind
        self.query, self.key, self.value = linear(), linear(), linear()
        self.mlp = nn.ModuleList(linear() for _ in range(1 if config.share_mlp else 2))
        self.norm_attended = nn.LayerNorm(width, **factory)
        self.norm_mlp = nn.LayerNorm(width, **factory)
        self.gate_weight = nn.Parameter(torch.randn(width, **factory))
        self.gate_tokens, self.gate_bank = linear(2 * width), linear(2 * width)
        self.bias_in = nn.Parameter(torch.zeros((), **factory))
        self.bias_forget = nn.Parameter(torch.ones((), **factory))

    def forward(self, x: Tensor, bank: Tensor) -> Tensor:
        """x (B, T, d), bank (B, N, d) with N = T -> the next bank."""
        attended = self.norm_attended(bank + self._attend(x, bank))
        hidden = attended
        for layer in (self.mlp[0], self.mlp[-1]):
            hidden = torch.relu(layer(hidden))
        content = self.norm_mlp(attended + hidden)
        gate_in, gate_forget = self._gates(x, bank)
        return gate_in * torch.tanh(content) + gate_forget * bank

    def _attend(self, x: Tensor, bank: Tensor) -> Tensor:
        heads = self.config.num_heads
        q, k, v = (split_heads(t, heads) for t in (self.query(x), self.key(bank), self.value(bank)))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        weights = F.dropout(weights, self.config.dropout, self.training)
        if self.config.top_k is not None and self.config.top_k < weights.shape[-1]:
            kept = weights.topk(self.config.top_k, dim=-1)
            weights = torch.zeros_like(weights).scatter(-1, kept.indices, kept.values)
        return merge_heads(weights @ v)

    def _gates(self, x: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        active = torch.relu(self.gate_weight * x)
        if self.config.gate_pooling == "mean":
            pooled = active.mean(dim=1, keepdim=True)
        else:
            counts = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
            pooled = active.cumsum(dim=1) / counts[:, None]
        gate_in, gate_forget = (self.gate_tokens(pooled) + self.gate_bank(torch.tanh(bank))).chunk(2, dim=-1)
        return torch.sigmoid(gate_in + self.bias_in), torch.sigmoid(gate_forget + self.bias_forget)


class LM2Reference(Memory):
    name = "lm2-reference"
    config_class = LM2ReferenceConfig
    paper = "LM2: Large Memory Models (2025, arXiv 2502.06049), the released code's variant"
    state_size = "d * d"
    slot_dims = {"bank": 1}
    whole_segments = True
    config: LM2ReferenceConfig
    first_slots: Tensor

    def __init__(self, config: LM2ReferenceConfig, host: HostSpec):
        super().__init__(config, host)
        width = host.hidden_size
        if width % config.num_heads:
            raise ConfigError(
                f"lm2-reference: num_heads = {config.num_heads} does not divide the host's width {width}."
            )
        factory = {"dtype": host.dtype, "device": host.device}
        self.blocks = nn.ModuleList(Block(config, width, **factory) for _ in range(host.num_layers))
        self.register_buffer("first_slots", torch.eye(width, **factory))

    def commit_every(self, segment: int) -> int:
        width = self.host.hidden_size
        if segment != width:
            raise ConfigError(
                f"lm2-reference has one slot per token and as many as the host is wide, so segment must be {width}; "
                f"got {segment}. The memory 'lm2' takes any segment."
            )
        return segment

    def initial_state(self, batch_size: int) -> State:
        return State({"bank": self.first_slots.expand(batch_size, -1, -1)})

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        return {"bank": state["bank"]}

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        """x + the bank as this block leaves it; the block above reads that bank."""
        below = step.below("bank")
        bank = step.read("bank") if below is None else below
        if x.shape[1] != bank.shape[1]:
            raise InputError(
                f"lm2-reference reads whole segments of {bank.shape[1]} tokens; got {x.shape[1]}. The memory 'lm2' "
                "takes any number."
            )
        bank = self.blocks[step.layer](x, bank)
        step.add_note(bank=bank)
        if step.layer == self.layers[-1]:
            step.keep(bank=bank)
        return x + bank

    def commit(self, state: State, segment: Segment) -> State:
        return State({"bank": segment.trace[self.layers[-1]]["bank"]})
