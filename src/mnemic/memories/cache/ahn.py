"""AHN: Artificial Hippocampus Networks for Efficient Long-Context Modeling (2025, arXiv 2510.07318).

Attention sees the first tokens (sinks) and a window of the last ones; every token that leaves the window is folded
into a small matrix per block and head, with the block's own keys and values. W counts the sinks. At place t:

    attention                tokens [0, sinks) and t - (W - sinks) + 1 .. t, exactly
    matrix                   tokens sinks .. t - (W - sinks): all the others, each once

The token j = t - (W - sinks) that has just left is written before the read at t. Per query head, with S from keys to
values (d_h, d_h), zero at first, k = k_j / |k_j|, v = v_j, q = q_t / |q_t| / sqrt(d_h), both turned to their
positions, and x the attention's input:

    gated_deltanet   log a = -exp(A_log) softplus(x_j W_a + dt_bias),  b = sigmoid(x_j W_b)
                     S <- a S;  S <- S + b k (v - S^T k)^T
    deltanet         the same with a = 1
    mamba2           dt = softplus(x_j W_dt + dt_bias);  S <- exp(-exp(A_log) dt) S + dt k v^T
    read             o = GroupLinear(RMSNorm(S^T q) * silu(x_t W_g));  attention's output of the head += o

GroupLinear (a d_h x d_h matrix per head) starts at zero: attention alone at first, and the whole host while nothing
has left the window. The paper trains it by self-distillation with the host frozen: `training.self_distillation_loss`.

Gates of a token are those of its own input, so they wait beside its keys and values. The write and the read of one
place are one step of the delta rule, with the query of t and the key of j. The paper prints S transposed.
Where the host's own layers see less than the window (Gemma 2, Mistral), their limit stands, for sinks too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError, HostError
from ...core.memory import HostSpec, Memory, MemoryConfig, option
from ...core.state import State
from ...core.step import AttentionCall, Step
from ...ops.delta_rule import delta_rule, l2_normalise


@dataclass(frozen=True, kw_only=True)
class AHNConfig(MemoryConfig):
    name = "ahn"

    variant: Literal["gated_deltanet", "deltanet", "mamba2"] = option(
        "gated_deltanet", "the rule that folds a token into the matrix"
    )
    window: int | None = option(None, "tokens in sight W, the sinks included; None for as many as a segment", minimum=1)
    num_sinks: int = option(128, "first tokens of a stream that stay in sight", minimum=0)


class Compressor(nn.Module):
    """Weights of one block: rates (n H, d), rows of W_g, then W_b or W_dt, then W_a; A_log, dt_bias (H,), norm (d_h,),
    out (H, d_h, d_h)."""

    def __init__(self, host: HostSpec, variant: str):
        super().__init__()
        heads, width, factory = host.num_heads, host.head_dim, {"dtype": host.dtype, "device": host.device}
        self.variant, self.heads = variant, heads
        kinds = 3 if variant == "gated_deltanet" else 2
        self.rates = nn.Linear(host.hidden_size, kinds * heads, bias=False, **factory)
        if variant != "deltanet":
            uniform = torch.empty(heads).uniform_(1e-4, 16)
            first = uniform if variant == "gated_deltanet" else torch.arange(1.0, heads + 1)
            self.A_log = nn.Parameter(first.log().to(**factory))
            times = torch.exp(torch.empty(heads).uniform_(-6.907755, -2.302585))
            self.dt_bias = nn.Parameter((times + torch.log(-torch.expm1(-times))).to(**factory))
        self.norm = nn.Parameter(torch.ones(width, **factory))
        self.out = nn.Parameter(torch.zeros(heads, width, width, **factory))

    def write_rates(self, rates: Tensor) -> tuple[Tensor, Tensor | None]:
        """beta and log decay, (B, T, H), from a token's rates (B, T, (n - 1) H) without those of the read gate."""
        rates = rates.to(_wide(rates.dtype))
        if self.variant == "deltanet":
            return rates.sigmoid(), None
        scale, bias = -self.A_log.to(rates.dtype).exp(), self.dt_bias.to(rates.dtype)
        if self.variant == "mamba2":
            time = _softplus(rates + bias)
            return time, scale * time
        beta, decay = rates.chunk(2, -1)
        return beta.sigmoid(), scale * _softplus(decay + bias)

    def merge(self, o: Tensor, gate: Tensor) -> Tensor:
        """What is added to the attention's output, (B, T, H, e), from what was read and the gate (B, T, H)."""
        o = F.rms_norm(o, (o.shape[-1],), eps=1e-5) * self.norm * F.silu(gate).unsqueeze(-1)
        return (o.transpose(1, 2).to(self.out.dtype) @ self.out).transpose(1, 2)


class AHN(Memory):
    name = "ahn"
    config_class = AHNConfig
    paper = "AHN: Artificial Hippocampus Networks for Efficient Long-Context Modeling (2025, arXiv 2510.07318)"
    state_size = "L * (H * e * e + 2 * Hkv * e * T)"
    continuous = True
    config: AHNConfig

    def __init__(self, config: AHNConfig, host: HostSpec):
        super().__init__(config, host)
        if not host.head_dim:
            raise HostError("ahn folds the host's own keys and values; the width of this host's heads is unknown.")
        self.num_sinks = config.num_sinks
        self.blocks = nn.ModuleDict({str(layer): Compressor(host, config.variant) for layer in self.layers})

    @property
    def identity_at_attach(self) -> bool:
        return self.config.window is None

    def window(self, segment: int) -> int:
        total = self.config.window or segment
        if total <= self.config.num_sinks:
            raise ConfigError(
                f"ahn: {total} tokens in sight hold {self.config.num_sinks} sinks and no window; raise window (or the "
                "segment, where window is None), or lower num_sinks."
            )
        return total - self.config.num_sinks

    def optimizer_groups(self) -> Mapping[str, Mapping[str, float]]:
        if self.config.variant == "deltanet":
            return {}
        return {name: {"weight_decay": 0.0} for name in ("blocks.*.A_log", "blocks.*.dt_bias")}

    def initial_state(self, batch_size: int) -> State:
        shape = (batch_size, self.host.num_heads, self.host.head_dim, self.host.head_dim)
        like = next(self.parameters())
        zeros = {"dtype": _wide(like.dtype), "device": like.device}
        return State({f"{layer}/matrix": torch.zeros(shape, **zeros) for layer in self.layers})

    def before_attention(self, x: Tensor, step: Step) -> Tensor:
        step.add_note(rates=self._block(step).rates(x))
        return x

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        out, block = call.plain(), self._block(step)
        rates = step.note("rates", step.layer)
        assert rates is not None
        gate, kept = rates[..., : block.heads], step.features("rates", rates[..., block.heads :])
        if kept.shape[1] <= step.window:
            return out
        key, value, kept, left = self._leaving(call, step, kept)
        beta, log_decay = block.write_rates(kept)
        query = l2_normalise(call.query.transpose(1, 2).to(beta.dtype)) * call.query.shape[-1] ** -0.5
        o, matrix = delta_rule(
            query, l2_normalise(key.to(beta.dtype)), value, beta, log_decay, step.running("matrix"),
            erase=block.variant != "mamba2", real=left,
        )  # fmt: skip
        step.leave(matrix=matrix)
        return out + block.merge(o, gate).to(out.dtype)

    def _leaving(self, call: AttentionCall, step: Step, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the token that leaves the window at each place: key and value (B, T, H, e), rates (B, T, n H), and whether
        there is one to fold in, (B, T) bool."""
        gone = step.places - step.window
        left = gone >= self.config.num_sinks
        if step.real is not None:
            left = left & step.real
        left = left.expand(len(kept), -1)
        # Behind the sinks each column is one place after the one before it; the last column always holds text.
        columns = call.keys.shape[2] - 1 - (call.key_places[:, -1:] - gone)
        columns = columns.clamp(0, call.keys.shape[2] - 1).expand(len(kept), -1)
        rows = torch.arange(len(kept), device=kept.device)[:, None]
        key, value = (t.transpose(1, 2)[rows, columns] for t in (call.keys, call.values))
        if (groups := self.host.num_heads // key.shape[2]) > 1:
            key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
        return key, value, kept[rows, columns], left

    def _block(self, step: Step) -> Compressor:
        block = self.blocks[str(step.layer)]
        assert isinstance(block, Compressor)
        return block


def _softplus(x: Tensor) -> Tensor:
    # torch.compile mistakes the strides of the gradient of F.softplus.
    return torch.logaddexp(x, torch.zeros_like(x))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
