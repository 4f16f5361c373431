"""Memformer: A Memory-Augmented Transformer for Sequence Modeling (2020, arXiv 2010.06891, AACL-IJCNLP Findings 2022).

k slots m_i of length 1, one set for all blocks. Beside the attention of every block tokens read them; at the end of a
segment each slot attends to itself and to the tokens, never to other slots, and a learned bias v_i pulls it back to
where it began. Written out (x input of a block's attention, y what the last block made of the segment, after RMSNorm):

    read     x <- x + alpha * (softmax(x W_Q (M W_K)^T / sqrt(e)) M W_V) W_O        in heads of width e
    write    s_i = [m_i W_q . m_i W_k ; m_i W_q . y W_k] / tau,   a_i = softmax(s_i)
             m_i <- a_i [m_i W_v ; y W_v]
    forget   m_i <- (m_i + v_i) / |m_i + v_i|,      first m_i = v_i / |v_i|

Decisions:
- The paper's encoder is the host here. On a causal decoder M is written from complete segments and read by later ones,
  so nothing reaches back, and the host predicts its own tokens. On an encoder-decoder a segment is a turn: the encoder
  reads M and writes it, the decoder answers the turn from what the encoder made.
- Reads take the attention's input (the normalised residual stream) as query and join its output, as in lm2: the sum
  after attention, where the paper reads, is out of reach in hosts with two norms around it.
- alpha is 1, or with `identity_start` learned from 0 for each block: the host is unchanged at first.
- y is normalised: residual streams of pre-norm hosts grow with depth, and scores with them. Scores of the writer are
  divided by tau alone: slots have length 1, so they begin with a standard deviation of 1.
- A slot's own value is projected as tokens' are; `own_value = "raw"` keeps m_i itself, so that a slot which attends to
  itself only changes by the bias.
- v_i starts with length `forgetting`: with 1, an untouched slot would lose half of itself in every segment.
- W_K and W_V of the readers start sqrt(d) times as large as other weights, for slots have length 1, not sqrt(d).

Back-propagation that keeps states only and runs each segment again (the paper's MRBP) is `replay=True` of every host.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostKind, HostSpec, Memory, MemoryConfig, Segment, SlotUse, option
from ...core.state import State
from ...core.step import Host, Step
from ...ops import slot_bank
from ...ops.block_linear import BlockLinear


@dataclass(frozen=True, kw_only=True)
class MemformerConfig(MemoryConfig):
    name = "memformer"
    presets = {"attach": {"identity_start": True}}

    num_slots: int = option(32, "slots k", minimum=1)
    num_heads: int = option(4, "heads of the readers; must divide the host's width", minimum=1)
    temperature: float = option(0.25, "tau of the writer: below 1 a slot attends to fewer tokens")
    own_value: Literal["projected", "raw"] = option(
        "projected", "what a slot gives itself: its projection, as tokens do, or itself"
    )
    forgetting: float = option(0.03, "length of the learned biases at the start: how fast untouched slots fade")
    identity_start: bool = option(False, "learned scale of the reads, from 0: the host is unchanged at first")

    def validate(self) -> None:
        for name in ("temperature", "forgetting"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"memformer: {name} = {getattr(self, name)}, expected a finite number above 0.")


class Memformer(Memory):
    name = "memformer"
    config_class = MemformerConfig
    paper = "Memformer: A Memory-Augmented Transformer for Sequence Modeling (2020, arXiv 2010.06891)"
    state_size = "num_slots * d"
    slot_dims = {"slots": 1}
    hosts: ClassVar[frozenset[HostKind]] = frozenset({"decoder", "encoder", "encoder-decoder"})
    config: MemformerConfig

    def __init__(self, config: MemformerConfig, host: HostSpec):
        super().__init__(config, host)
        width, blocks = host.hidden_size, host.num_layers
        if width % config.num_heads:
            raise ConfigError(f"memformer: num_heads = {config.num_heads} does not divide the host's width {width}.")
        factory = {"dtype": host.dtype, "device": host.device}

        std = width**-0.5
        self.query, self.out = (BlockLinear(blocks, width, std=std, **factory) for _ in range(2))
        self.key, self.value = (BlockLinear(blocks, width, std=1.0, **factory) for _ in range(2))
        self.write_query, self.write_key, self.write_value = (
            nn.Parameter(torch.randn(width, width, **factory) * std) for _ in range(3)
        )
        bias = F.normalize(torch.randn(config.num_slots, width, **factory), dim=-1)
        self.bias = nn.Parameter(config.forgetting * bias)
        self.alpha = nn.Parameter(torch.zeros(blocks, **factory)) if config.identity_start else None

    @property
    def identity_at_attach(self) -> bool:
        return self.config.identity_start

    def initial_state(self, batch_size: int) -> State:
        """ "slots" (B, k, d)."""
        return State({"slots": F.normalize(self.bias, dim=-1).expand(batch_size, -1, -1)})

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        """Keys and values of the slots by block: "<block>/keys" and "<block>/values", (B, h, k, e)."""
        reads = {}
        for name, weights in (("keys", self.key.full()), ("values", self.value.full())):
            # One product for all blocks.
            wide = (state["slots"] @ weights.transpose(0, 1).flatten(1)).unflatten(-1, (len(weights), -1))
            parts = slot_bank.split_heads(wide.transpose(1, 2), self.config.num_heads).unbind(1)
            reads |= {f"{layer}/{name}": part for layer, part in enumerate(parts)}
        return reads

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        layer = step.layer
        keys, values = step.read(f"{layer}/keys"), step.read(f"{layer}/values")
        query = self.query(source, layer)
        if step.diagnosing:
            step.keep(query=query)
        part = self.out(slot_bank.read(query, keys, values, factors=step.slot_factors("slots")), layer)
        return x + (part if self.alpha is None else self.alpha[layer] * part)

    def after_layer(self, x: Tensor, step: Step) -> Tensor:
        if step.layer == self.layers[-1]:
            step.keep(tokens=x)
        return x

    def commit(self, state: State, segment: Segment) -> State:
        return State({"slots": self._committed(state, segment)[0]})

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """How much of a slot's attention stays with itself, and how far slots turn (1 - cosine)."""
        slots, kept = self._committed(state, segment)
        turned = 1 - (slots * state["slots"]).sum(-1)
        last = f"block{self.layers[-1]}"
        return {f"{last}/kept": kept.detach().float().mean(), f"{last}/turned": turned.detach().float().mean()}

    def slot_use(self, state: State, segment: Segment) -> dict[int, SlotUse]:
        reads, found = self.prepare(state), {}
        for layer in self.layers:
            query = slot_bank.split_heads(segment.trace[layer]["query"], self.config.num_heads)
            found[layer] = SlotUse("slots", slot_bank.attention_weights(query, reads[f"{layer}/keys"]).mean(1))
        return found

    def _committed(self, state: State, segment: Segment) -> tuple[Tensor, Tensor]:
        return self.written(state["slots"], segment.trace[self.layers[-1]]["tokens"], segment.mask)

    def written(self, slots: Tensor, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Slots (B, k, d) after a segment of tokens (B, T, d), and their attention to themselves (B, k). mask: (B, T)
        bool, False for padding."""
        tokens = F.rms_norm(tokens, tokens.shape[-1:])
        query = slots @ self.write_query
        own = (query * (slots @ self.write_key)).sum(-1, keepdim=True)
        others = query @ (tokens @ self.write_key).mT
        if mask is not None:
            others = others.masked_fill(~mask[:, None], float("-inf"))
        scores = torch.cat([own, others], dim=-1)
        weights = (scores / self.config.temperature).softmax(-1)
        mine = slots @ self.write_value if self.config.own_value == "projected" else slots
        new = weights[..., :1] * mine + weights[..., 1:] @ (tokens @ self.write_value)
        return F.normalize(new + self.bias, dim=-1), weights[..., 0]
