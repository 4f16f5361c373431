"""Synaptic Resonance: Exploring Synaptic Resonance in Large Language Models (2025, arXiv 2502.10699).

LOW EVIDENCE. Only the abstract of this paper is known: no equation, table or code. It speaks of synaptic weight
matrices that are adjusted by contextual relevance, in training and inference, so that relevant pathways are reinforced,
inside existing Transformers and at small cost. All below is a reading of that, and no number here is the paper's.

A matrix S per head maps keys to values. A token first reads it, then writes its own pair, the more the better the pair
resonates. Per head, with q, k free of position and of length 1, v as the host has it, S = 0 at the start of a stream:

    read     o = S_{t-1} q_t;   attention's output of the head += tanh(g) RMSNorm(o)
    resonate rho = sigmoid(c cos(S_{t-1} k_t, v_t) + b)                   "state": what is known already is reinforced
             rho = sigmoid(c cos(q_t, k_t) + b)                           "content": knows nothing of S
    write    S_t = (1 - l) S_{t-1} + eta rho (v_t - beta S_{t-1} k_t) k_t^T
    guard    S <- S min(1, s_max / |S|_F)

l = sigmoid(.), eta = min(softplus(.), 1), c, b and g of each head are learned; g starts at 0, so the host is unchanged
at first. beta = 1 corrects what S says already, 0 is Hebb's rule alone.

Decisions:
- "state" needs every S before the next: a loop over tokens, about twenty small operations each, and in training
  autograd keeps each S several times over, T H e^2 numbers a row and block each time. "content" is the delta rule and
  runs in chunks: `ops.delta_rule` takes the error of the faded matrix and reads after the write, so its rate is
  eta rho / (1 - l), its value (1 - l) v, and its query that of the next token.
- The guard: after every token with "state"; with "content", where tokens are not taken one by one, after every segment.
  Within a segment the norm then grows by at most the sum of eta rho |v|, for l up to 1/2.
- Left out: a running norm of relevance, which no equation reads, and a bias on the attention's scores, of which nothing
  says what it would be.
- The middle third of the blocks has it. Grouped-query hosts: each query head has a matrix of its own.
- S runs through the stream, over the borders of segments.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError, HostError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import AttentionCall, Step
from ...ops.delta_rule import delta_rule, l2_normalise

_RATE = 0.1
"""eta at the start."""


@dataclass(frozen=True, kw_only=True)
class SynapticResonanceConfig(MemoryConfig):
    name = "synaptic-resonance"
    presets = {"attach": {}}

    rho: Literal["state", "content"] = option(
        "state", "what resonates: a pair with what is stored, token by token, or query and key, in chunks"
    )
    correct: bool = option(True, "subtract what is stored under a key before writing (beta = 1), or Hebb's rule alone")
    memory_layers: tuple | None = option(None, "blocks with this memory; None for the middle third")
    max_norm: float | None = option(None, "largest norm s_max of a matrix; None for 10 sqrt(head width)")

    def validate(self) -> None:
        if self.max_norm is not None and not 0 < self.max_norm < math.inf:
            raise ConfigError(f"synaptic-resonance: max_norm = {self.max_norm}, expected a finite number above 0.")


class Pathways(nn.Module):
    """Scalars of each head, (H,): gate g, decay logit of l, rate before softplus, slope c, bias b; norm (e,)."""

    def __init__(self, host: HostSpec):
        super().__init__()
        factory = {"dtype": host.dtype, "device": host.device}
        full = lambda value: nn.Parameter(torch.full((host.num_heads,), value, **factory))  # noqa: E731 - five of a kind
        self.gate, self.decay, self.rate = full(0.0), full(-6.0), full(math.log(math.expm1(_RATE)))
        self.slope, self.bias = full(4.0), full(0.0)
        self.norm = nn.Parameter(torch.ones(host.head_dim, **factory))

    def kept(self, dtype: torch.dtype) -> Tensor:
        """log(1 - l), (H,)."""
        decay = self.decay.to(dtype)
        # Softplus; torch.compile mistakes the strides of the gradient of F.softplus.
        return -torch.logaddexp(decay, torch.zeros_like(decay))

    def eta(self, dtype: torch.dtype) -> Tensor:
        rate = self.rate.to(dtype)
        return torch.logaddexp(rate, torch.zeros_like(rate)).clamp_max(1)

    def resonance(self, agreement: Tensor) -> Tensor:
        """rho (..., H) from cosines."""
        return torch.sigmoid(self.slope.to(agreement.dtype) * agreement + self.bias.to(agreement.dtype))


class SynapticResonance(Memory):
    name = "synaptic-resonance"
    config_class = SynapticResonanceConfig
    paper = "Exploring Synaptic Resonance in Large Language Models (2025, arXiv 2502.10699; from its abstract alone)"
    state_size = "(L - 2 * (L // 3)) * H * e * e"
    config: SynapticResonanceConfig

    def __init__(self, config: SynapticResonanceConfig, host: HostSpec):
        super().__init__(config, host)
        if not host.head_dim:
            raise HostError("synaptic-resonance needs the host's own heads; their width is unknown in this host.")
        self.blocks = nn.ModuleDict({str(layer): Pathways(host) for layer in self.layers})
        self.max_norm = config.max_norm or 10 * host.head_dim**0.5

    @property
    def layers(self) -> tuple[int, ...]:
        chosen, total = self.config.memory_layers, self.host.num_layers
        if chosen is None:
            return tuple(range(total // 3, total - total // 3))
        if not chosen or any(type(i) is not int or not 0 <= i < total for i in chosen):
            raise ConfigError(
                f"synaptic-resonance: memory_layers = {chosen!r}, expected blocks below {total}, or None."
            )
        return tuple(sorted(set(chosen)))

    @property
    def identity_at_attach(self) -> bool:
        return True

    def uses(self, method: str) -> bool:
        return self.config.rho == "content" if method == "commit" else super().uses(method)

    def optimizer_groups(self) -> Mapping[str, Mapping[str, float]]:
        return {f"blocks.*.{name}": {"weight_decay": 0.0} for name in ("gate", "decay", "rate", "slope", "bias")}

    def initial_state(self, batch_size: int) -> State:
        """Of each block "<layer>/matrix" (B, H, e, e), from key to value (the equations' S transposed)."""
        like, width = self.blocks[str(self.layers[0])].get_parameter("gate"), self.host.head_dim
        shape = (batch_size, self.host.num_heads, width, width)
        factory = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        return State({f"{layer}/matrix": torch.zeros(shape, **factory) for layer in self.layers})

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        out, block = call.plain(), self._block(step.layer)
        matrix = step.running("matrix")
        query, key, value = (
            t.transpose(1, 2).to(matrix.dtype) for t in (call.free_query(), call.free_keys(), call.new_values)
        )
        if (groups := self.host.num_heads // key.shape[2]) > 1:
            key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
        query, key = l2_normalise(query), l2_normalise(key)
        run = self.by_token if self.config.rho == "state" else self.by_chunk
        read, matrix = run(block, query, key, value, matrix, step.real)
        step.leave(matrix=matrix)
        read = F.rms_norm(read, (read.shape[-1],), eps=1e-5) * block.norm.to(read.dtype)
        return out + (torch.tanh(block.gate.to(read.dtype))[:, None] * read).to(out.dtype)

    def by_token(
        self, block: Pathways, query: Tensor, key: Tensor, value: Tensor, matrix: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One token after another, with either resonance. query, key, value (B, T, H, e), matrix (B, H, e, e), real
        (B, T) or None: what was read (B, T, H, e), zero where not real, and the matrix after the last token."""
        dtype, erase = matrix.dtype, float(self.config.correct)
        kept, eta = block.kept(dtype).exp()[:, None, None], block.eta(dtype)
        told = l2_normalise(value) if self.config.rho == "state" else query
        # Both reads of a token in one product.
        readers = torch.stack((query, key), -2).unbind(1)
        steps = zip(readers, key.unbind(1), value.unbind(1), told.unbind(1), strict=True)
        here = [None] * key.shape[1] if real is None else real[:, :, None, None].unbind(1)
        outputs = []
        for (both, k, v, toward), there in zip(steps, here, strict=True):
            found, known = (both @ matrix).unbind(-2)
            against = l2_normalise(known) if self.config.rho == "state" else k
            rate = eta * block.resonance((against * toward).sum(-1))
            change = rate[..., None] * (v - erase * known)
            after = self.guarded(kept * matrix + k[..., :, None] * change[..., None, :])
            matrix = after if there is None else torch.where(there[..., None], after, matrix)
            outputs.append(found if there is None else found * there)
        return torch.stack(outputs, 1) if outputs else torch.zeros_like(value), matrix

    def by_chunk(
        self, block: Pathways, query: Tensor, key: Tensor, value: Tensor, matrix: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same with "content" and without the guard, in chunks."""
        log_kept = block.kept(matrix.dtype)
        rate = block.eta(matrix.dtype) * block.resonance((query * key).sum(-1))
        if self.config.correct:
            rate, value = rate * (-log_kept).exp(), value * log_kept.exp()[:, None]
        before, after = _neighbours(real, query)
        rows = torch.arange(len(query), device=query.device)[:, None]
        following = F.pad(query, (0, 0, 0, 0, 0, 1))[rows, after]
        read, last = delta_rule(
            following, key, value, rate, log_kept.expand_as(rate), matrix, erase=self.config.correct, real=real
        )
        first = (query.unsqueeze(-2) @ matrix[:, None]).squeeze(-2)
        read = torch.where((before < 0)[..., None, None], first, read[rows, before.clamp_min(0)])
        return read if real is None else read.masked_fill(~real[..., None, None], 0), last

    def guarded(self, matrix: Tensor) -> Tensor:
        """The matrix (..., e, e), no longer than s_max."""
        excess = matrix.square().sum((-2, -1), keepdim=True) / self.max_norm**2
        return matrix * excess.clamp_min(1).rsqrt()

    def commit(self, state: State, segment: Segment) -> State:
        return state.map(self.guarded)

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block: mean size of the gates, mean norm of the matrices in parts of s_max."""
        found = {}
        for layer in self.layers:
            norm = state[f"{layer}/matrix"].detach().float().flatten(2).norm(dim=-1)
            found[f"block{layer}/filled"] = norm.mean() / self.max_norm
            found[f"block{layer}/gate"] = torch.tanh(self._block(layer).gate.detach().float()).abs().mean()
        return found

    def _block(self, layer: int) -> Pathways:
        block = self.blocks[str(layer)]
        assert isinstance(block, Pathways)
        return block


def _neighbours(real: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the tokens of `like` (B, T, ...) the last real one before it, -1 for none, and the first after it, T
    for none: (B or 1, T) each."""
    tokens = like.shape[1]
    places = torch.arange(tokens, device=like.device)[None]
    if real is None:
        return places - 1, places + 1
    last = places.where(real, -1).cummax(1).values
    first = places.where(real, tokens).flip(1).cummin(1).values.flip(1)
    return F.pad(last[:, :-1], (1, 0), value=-1), F.pad(first[:, 1:], (0, 1), value=tokens)
