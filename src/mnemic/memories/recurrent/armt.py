"""ARMT: Associative Recurrent Memory Transformer (2024, arXiv 2407.04841).

M memory tokens stand behind a segment. What every layer makes of them is written into that layer's associative matrix
A with a delta rule; all tokens of later segments read it where they enter the layer, before its norm:

    read    x_j <- x_j + A phi(W_Q x_j) / (z . phi(W_Q x_j) + eps)
    write   k_i = W_K m_i,  v_i = W_V m_i,  beta_i = sigmoid(w_beta . m_i + b)
            vbar_i  = A phi(k_i) / (z . phi(k_i) + eps)
            gamma_i = clip(1 - z . phi(k_i) / (|phi(k_i)|^2 + eps), 0, 1), a constant for gradients
            A <- A + sum_i beta_i (v_i - vbar_i) phi(k_i)^T,    z <- z + sum_i gamma_i phi(k_i)

phi is DPFP, x_j any token (memory tokens too), m_i the layer's output at the i-th of them, A (d, D) and z (D) of one
layer, D = 2 nu d_mem. The tokens themselves are learned and the same in every segment: only A and z are carried.

Decisions:
- The first segment needs no flag. A = 0 and z = 0 read exactly 0 and write with vbar = 0 and gamma = 1, which is what
  the paper says of it.
- A and z stay in float32 (or the host's float64): both divisions by z lose too much below. Queries and keys are cast
  before phi, since it multiplies them.
- All layers are written in one call at the end of a segment, which needs nothing but what the layers made.
- Memory tokens take the positions behind the segment, so segment + M must fit the host's positions. The released code
  extends tables of learned positions instead.
- beta scales the change of A only, as in the released code.
- Nothing bounds A: it is divided by a z that has other weights, so a token whose features hardly overlap with z reads
  much. With random weights norms of 1e4 and more were seen; few features (key_width below 16) make it worse.
- W_V starts at zero: the host's logits are unchanged, for text does not see tokens that stand behind it.

The preset "prmt" is the paper's ablation: no matrix. What layer l makes of the memory tokens enters layer l of the next
segment instead of what the layer below made: in front of the text, where it is read, and behind it, where it is
written. The first such tokens are learned for each layer, as in the released code.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import Host, Step
from ...ops import associative_matrix


@dataclass(frozen=True, kw_only=True)
class ARMTConfig(MemoryConfig):
    name = "armt"
    presets = {"prmt": {"carry": "tokens"}}

    num_tokens: int = option(10, "memory tokens M behind a segment", minimum=1)
    key_width: int = option(64, "width d_mem of queries and keys; a matrix has d x 2 nu d_mem numbers", minimum=1)
    nu: int = option(3, "rolls of the feature map DPFP; at most 2 d_mem", minimum=1)
    carry: Literal["matrix", "tokens"] = option(
        "matrix", "what crosses segments: each layer's matrix (ARMT), or each layer's memory tokens (PRMT)"
    )

    def validate(self) -> None:
        if self.nu > 2 * self.key_width:
            raise ConfigError(f"armt: nu = {self.nu}, expected at most 2 key_width = {2 * self.key_width}.")


class ARMT(Memory):
    name = "armt"
    config_class = ARMTConfig
    paper = "Associative Recurrent Memory Transformer (2024, arXiv 2407.04841)"
    state_size = "L * 2 * nu * key_width * (d + 1)"
    config: ARMTConfig

    def __init__(self, config: ARMTConfig, host: HostSpec):
        super().__init__(config, host)
        layers, width, factory = host.num_layers, host.hidden_size, {"dtype": host.dtype, "device": host.device}
        self.num_write_tokens = config.num_tokens
        if config.carry == "tokens":
            self.num_read_tokens = config.num_tokens
            first = torch.randn(layers, config.num_tokens, width, **factory)
            self.first_tokens = nn.Parameter(first * host.embedding_std)
            return
        self.first_tokens = nn.Parameter(torch.randn(config.num_tokens, width, **factory) * host.embedding_std)
        # The start of torch's linear layers, which the released code uses.
        start = lambda *shape: nn.Parameter((torch.rand(layers, *shape, **factory) * 2 - 1) * width**-0.5)  # noqa: E731
        self.query, self.key = start(width, config.key_width), start(width, config.key_width)
        self.value = nn.Parameter(torch.zeros(layers, width, width, **factory))
        self.beta, self.beta_bias = start(width, 1), start(1, 1)

    @property
    def identity_at_attach(self) -> bool:
        return self.config.carry == "matrix"

    def initial_state(self, batch_size: int) -> State:
        """ "matrix" (B, L, d, D) and "normaliser" (B, L, D), zeros; or "tokens" (B, L, M, d), learned."""
        if self.config.carry == "tokens":
            return State({"tokens": self.first_tokens.expand(batch_size, -1, -1, -1)})
        layers, features = self.host.num_layers, 2 * self.config.nu * self.config.key_width
        factory = {"dtype": torch.promote_types(self.value.dtype, torch.float32), "device": self.value.device}
        return State(
            {
                "matrix": torch.zeros(batch_size, layers, self.host.hidden_size, features, **factory),
                "normaliser": torch.zeros(batch_size, layers, features, **factory),
            }
        )

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        """The state by layer: "<layer>/<name>"."""
        # One unbind: a slice for each layer would have a gradient as large as the whole each.
        return {f"{i}/{name}": t for name, whole in state.items() for i, t in enumerate(whole.unbind(1))}

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        if self.config.carry == "tokens":
            first = state["tokens"][:, 0]
            return first, first
        behind = self.first_tokens.expand(len(state["normaliser"]), -1, -1)
        return behind[:, :0], behind

    def before_layer(self, x: Tensor, step: Step) -> Tensor:
        i = step.layer
        if self.config.carry == "tokens":
            carried = [step.read(f"{i}/tokens").to(x.dtype)]
            return torch.cat([*carried * bool(step.num_read), step.text(x), *carried * bool(step.num_write)], dim=1)
        matrix, normaliser = step.read(f"{i}/matrix"), step.read(f"{i}/normaliser")
        features = self._features(x @ self.query[i], matrix.dtype)
        return x + associative_matrix.read(features, matrix, normaliser).to(x.dtype)

    def after_layer(self, x: Tensor, step: Step) -> Tensor:
        step.keep_written(outputs=x)
        return x

    def commit(self, state: State, segment: Segment) -> State:
        return self._written(state, segment)[0]

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block: how strongly it writes, and the norm of its matrix."""
        after, beta = self._written(state, segment)
        if beta is None:
            return {}
        found: dict[str, Tensor] = {}
        for i in self.layers:
            found[f"block{i}/beta"] = beta[:, i].detach().float().mean()
            found[f"block{i}/matrix_norm"] = after["matrix"][:, i].detach().norm(dim=(-2, -1)).mean()
        return found

    def _written(self, state: State, segment: Segment) -> tuple[State, Tensor | None]:
        """The state after a segment, and beta (B, L, M)."""
        outputs = torch.stack([segment.written_trace[i]["outputs"] for i in self.layers])
        if self.config.carry == "tokens":
            return State({"tokens": outputs.transpose(0, 1)}), None
        batch, matrix = outputs.shape[1], state["matrix"]
        # Layers first, (L, B M, d): one product a layer. Broadcast over rows, the weights would be copied for each.
        rows = outputs.flatten(1, 2)
        keys, values, beta = (
            torch.bmm(rows, weight).unflatten(1, (batch, -1)).transpose(0, 1)
            for weight in (self.key, self.value, self.beta)
        )
        beta = torch.sigmoid(beta + self.beta_bias)[..., 0]
        features = self._features(keys, matrix.dtype)
        matrix, normaliser = associative_matrix.write(features, values, beta, matrix, state["normaliser"])
        return State({"matrix": matrix, "normaliser": normaliser}), beta

    def _features(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """phi of queries or keys (..., d_mem), (..., D) in the state's dtype."""
        return associative_matrix.dpfp(x.to(dtype), self.config.nu)
