"""LM2: Large Memory Models (2025, arXiv 2502.06049).

A bank of N slots of the host's width. Beside the attention of every block, tokens read the bank by cross-attention
and an output gate decides how much reaches the residual stream; at the end of a segment the blocks rewrite the bank
through an input and a forget gate. Written out (x attention output, M bank, one head):

    read     Q = x W_Q, K = M W_K, V = M W_V;  A = softmax(Q K^T / sqrt(d));  E = A V
             x <- x + alpha * sigmoid(E W_out + b_out) * E
    route    R = softmax over tokens of K Q^T / sqrt(d);  X = R x;  C = R E  (+ X W_C: content write)
    write    M <- sigmoid(X W_in + b_in) * tanh(C) + sigmoid(R E W_forget + b_f) * M

Where this departs from the paper, and why:
- Tokens of a segment read the bank as it was when the segment began, and the bank is written once it is complete.
  The printed equations add T x d and N x d matrices and are well typed only for T = N; routing lifts that, and the
  segment makes the model strictly causal.
- `content_write`: as printed, token content never enters the bank: values are projections of old memory.
- `retention`: with one bank for all blocks, the share of it that survives a segment is the product of the blocks'
  forget gates: 0.5^16 for zero biases. The bias is set so that the product starts at `retention`.
- `norm`: RMSNorm on queries and slots; without it the routing starts as a plain mean over tokens. With a
  larger `norm_scale` slots choose tokens more sharply from the start and part sooner; at 2 reads are so sharp that they
  learn little else (docs/lm2.md).
- `write_cost` (0): of text that has nothing to keep every segment still writes a little, which in the end covers what
  the bank holds. The mean input gate joins the training loss, so that a gate opens only where that pays.
- `query_source`: what reads and is written is the normalised residual stream, the paper's E; the released code takes
  the attention's output. On cross-segment recall the first learns sooner and holds to 12 segments (0.97 against 0.53
  after 500 steps on 2 to 4 segments).
- Weights start as N(0, 1/d), which is the code's 0.02 at its width of 2048 and keeps scores alive at small widths.
The preset "paper" switches all but the last off. "attach" starts as the identity. "reference_compat" is the released
code's module (see lm2_reference.py).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, SlotUse, Trace, option
from ...core.state import State
from ...core.step import Host, Step
from ...ops import slot_bank
from ...ops.block_linear import BlockLinear


@dataclass(frozen=True, kw_only=True)
class LM2Config(MemoryConfig):
    name = "lm2"
    presets = {
        "attach": {"identity_start": True},
        "paper": {
            "content_write": False, "norm": False, "retention": "paper", "input_bias": 0.0, "query_source": "attention",
        },
    }  # fmt: skip

    num_slots: int = option(64, "slots N of a bank", minimum=1)
    num_heads: int = option(4, "heads of the cross-attention; must divide the host's width", minimum=1)
    memory_scope: Literal["shared", "per_layer"] = option("shared", "one bank for all blocks, or one for each")
    init: Literal["identity", "orthogonal", "learned"] = option(
        "identity", "first slots: unit vectors (needs slots <= width), random orthogonal directions, or parameters"
    )
    memory_layers: int | tuple | None = option(
        None, "blocks with memory: a list, the first so many, or None for all", minimum=0
    )
    top_k: int | None = option(None, "slots that a token reads, or None for all", minimum=1)
    query_source: Literal["attention", "residual"] = option(
        "residual", "what reads and is written: the attention's input (normalised residual stream), or its output"
    )
    content_write: bool = option(True, "let token content into the bank, not only what was read from it")
    norm: bool = option(True, "RMSNorm on queries and slots before scores are taken")
    norm_scale: float = option(1.0, "the weights of that norm at the start; scores grow with its square", minimum=0)
    retention: float | Literal["paper", "code"] = option(
        0.95,
        "share of a bank kept over a segment at the start; 'paper': forget bias 0, 'code': +1",
        minimum=0,
        maximum=1,
    )
    input_bias: float = option(-2.0, "bias of the input gate: how willing a new bank is to write")
    write_cost: float = option(0.0, "the mean input gate of a write joins the training loss, times this", minimum=0)
    route: Literal["softmax", "competitive", "identity"] = option(
        "softmax", "how tokens reach slots: slots choose tokens, tokens choose slots, or token i to slot i"
    )
    write_scores: Literal["recompute", "read"] = option(
        "recompute", "with a shared bank, score against the bank as the blocks before left it, or as it was read"
    )
    update_every: int | None = option(None, "write after so many tokens instead of once a segment", minimum=1)
    identity_start: bool = option(False, "learned scale of the memory's part, from 0: the host is unchanged at first")
    gates: tuple = option(
        ("out", "in", "forget"),
        "gates that there are; without, reads and writes are open (1) and a bank keeps `retention`",
    )
    rank: int | None = option(None, "rank of the weight matrices, or None for full", minimum=1)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> MemoryConfig:
        if preset == "reference_compat":
            from .lm2_reference import LM2ReferenceConfig

            return LM2ReferenceConfig.from_preset("default", **overrides)
        return super().from_preset(preset, **overrides)

    def validate(self) -> None:
        if isinstance(self.retention, int | float) and not 0 < self.retention < 1:
            raise ConfigError(f"lm2: retention = {self.retention}, expected more than 0 and less than 1.")
        unknown = [name for name in self.gates if name not in ("out", "in", "forget")]
        if unknown or len(set(self.gates)) < len(self.gates):
            raise ConfigError(f"lm2: gates = {list(self.gates)}, expected some of 'out', 'in' and 'forget', once each.")
        if self.write_cost and "in" not in self.gates:
            raise ConfigError(f"lm2: write_cost = {self.write_cost} needs the input gate; gates has none.")
        if not self.norm and self.norm_scale != 1:
            raise ConfigError(f"lm2: norm_scale = {self.norm_scale} needs the norm; norm is False.")
        if self.route == "identity" and self.update_every is not None:
            raise ConfigError("lm2: identity routing needs one slot per token of a segment; leave update_every unset.")


class LM2(Memory):
    name = "lm2"
    config_class = LM2Config
    paper = "LM2: Large Memory Models (2025, arXiv 2502.06049)"
    state_size = "num_slots * d"
    slot_dims = {"bank": 2}
    config: LM2Config

    def __init__(self, config: LM2Config, host: HostSpec):
        super().__init__(config, host)
        width, blocks = host.hidden_size, len(self.layers)
        if width % config.num_heads:
            raise ConfigError(f"lm2: num_heads = {config.num_heads} does not divide the host's width {width}.")
        if config.init == "identity" and config.num_slots > width:
            raise ConfigError(
                f"lm2: {config.num_slots} slots cannot start as unit vectors of width {width}; use at most {width} "
                "slots, or init='orthogonal' or 'learned'."
            )
        factory = {"dtype": host.dtype, "device": host.device}
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        linear = lambda: BlockLinear(blocks, width, config.rank, std=width**-0.5, **factory)  # noqa: E731 - seven of a kind
        self.query, self.key, self.value = linear(), linear(), linear()
        gates = ("out", "in", "forget")
        self.gate_out, self.gate_in, self.gate_forget = (linear() if g in config.gates else None for g in gates)
        self.content = linear() if config.content_write else None
        bias = lambda gate, value: nn.Parameter(torch.full((blocks, width), value, **factory)) if gate else None  # noqa: E731
        self.bias_out = bias(self.gate_out, 0.0)
        self.bias_in = bias(self.gate_in, config.input_bias)
        self.bias_forget = bias(self.gate_forget, self._forget_bias())
        scale = lambda: nn.Parameter(torch.full((blocks, width), config.norm_scale, **factory)) if config.norm else None  # noqa: E731
        self.query_norm, self.slot_norm = scale(), scale()
        self.alpha = nn.Parameter(torch.zeros(blocks, **factory)) if config.identity_start else None
        first = self._first_slots(self.num_banks, width).to(**factory)
        if config.init == "learned":
            self.first_slots = nn.Parameter(first)
        else:
            self.register_buffer("first_slots", first)

    @property
    def num_banks(self) -> int:
        return 1 if self.config.memory_scope == "shared" else len(self.layers)

    @property
    def layers(self) -> tuple[int, ...]:
        chosen, total = self.config.memory_layers, self.host.num_layers
        layers = tuple(range(total if chosen is None else chosen)) if not isinstance(chosen, tuple) else chosen
        if any(not isinstance(i, int) or not 0 <= i < total for i in layers) or sorted(set(layers)) != list(layers):
            raise ConfigError(f"lm2: memory_layers = {chosen!r}, expected increasing block numbers below {total}.")
        return layers

    @property
    def identity_at_attach(self) -> bool:
        return self.config.identity_start or not self.layers

    def commit_every(self, segment: int) -> int:
        every = self.config.update_every or segment
        if segment % every:
            raise ConfigError(f"lm2: update_every = {every} does not divide the segment of {segment} tokens.")
        if self.config.route == "identity" and every != self.config.num_slots:
            raise ConfigError(
                f"lm2: identity routing needs num_slots = segment; got {self.config.num_slots} and {every}."
            )
        return every

    def initial_state(self, batch_size: int) -> State:
        # A buffer where the slots are not learned: FSDP2's mixed precision casts parameters only.
        slots = self.first_slots.to(next(self.query.parameters()).dtype) if self.layers else self.first_slots
        return State({"bank": slots.expand(batch_size, *slots.shape)})

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        """Keys and values of the slots by block: "<block>/keys" and "<block>/values", (B, h, N, e)."""
        if not self.layers:
            return {}
        bank, width = state["bank"], self.host.hidden_size
        w_key, w_value = self.key.full(), self.value.full()
        slots = bank
        if self.slot_norm is not None:
            slots = F.rms_norm(bank, (width,))
            w_key = self.slot_norm[:, :, None] * w_key
        keys, values = self._project(slots, w_key), self._project(bank, w_value)
        found = (("keys", keys), ("values", values))
        return {
            f"{i}/{name}": part
            for name, whole in found
            for i, part in enumerate(slot_bank.split_heads(whole, self.config.num_heads).unbind(1))
        }

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        i = self._index[step.layer]
        tokens = x if self.config.query_source == "attention" else source
        query = self.query(self._normed(tokens, self.query_norm, i), i)
        factors = step.slot_factors(f"bank/{self._bank_of(i)}")
        read = slot_bank.read(query, step.read(f"{i}/keys"), step.read(f"{i}/values"), self.config.top_k, factors)
        part = self._gate(self.gate_out, self.bias_out, read, i) * read
        if self.alpha is not None:
            part = self.alpha[i] * part
        step.keep(tokens=tokens, query=query, read=read)
        return x + part

    def commit(self, state: State, segment: Segment) -> State:
        if not self.layers:
            return state
        banks = list(state["bank"].unbind(1))
        reads = self.prepare(state) if self.config.write_scores == "read" else {}
        opened: list[Tensor] = []
        for layer, i in self._index.items():
            bank = self._bank_of(i)
            given = reads.get(f"{i}/keys")
            banks[bank], gates = self._write(banks[bank], i, segment.trace[layer], segment.mask, given)
            opened.append(gates["gate_in"])
        if self.training and self.config.write_cost:
            segment.add_loss(self.config.write_cost * torch.stack(opened).mean((0, 2, 3)))
        return State({"bank": torch.stack(banks, dim=1)})

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block: mean gates, entropy of reads over slots relative to its maximum, norm of the bank (per slot)."""
        found: dict[str, Tensor] = {}
        banks, reads = list(state["bank"].unbind(1)), self.prepare(state)
        for layer, i in self._index.items():
            bank = self._bank_of(i)
            trace = segment.trace[layer]
            given = reads[f"{i}/keys"] if self.config.write_scores == "read" else None
            banks[bank], gates = self._write(banks[bank], i, trace, segment.mask, given)
            query = slot_bank.split_heads(trace["query"], self.config.num_heads)
            weights = slot_bank.attention_weights(query, reads[f"{i}/keys"], self.config.top_k)
            entropy = torch.special.entr(weights).sum(-1).mean() / max(math.log(self.config.num_slots), 1e-9)
            gate_out = self._gate(self.gate_out, self.bias_out, trace["read"], i)
            block = {**gates, "gate_out": gate_out, "slot_entropy": entropy, "bank_norm": banks[bank].norm(dim=-1)}
            found.update({f"block{layer}/{name}": value.detach().float().mean() for name, value in block.items()})
        return found

    def slot_use(self, state: State, segment: Segment) -> dict[int, SlotUse]:
        found: dict[int, SlotUse] = {}
        banks, reads = list(state["bank"].unbind(1)), self.prepare(state)
        for layer, i in self._index.items():
            bank, trace, config = self._bank_of(i), segment.trace[layer], self.config
            query, keys = trace["query"], reads[f"{i}/keys"]
            read = slot_bank.attention_weights(slot_bank.split_heads(query, config.num_heads), keys, config.top_k)
            keys = keys if config.write_scores == "read" else self._keys(banks[bank], i)
            written = None
            if config.route != "identity" or query.shape[1] == config.num_slots:
                routed = slot_bank.routing_weights(query, keys, config.route, segment.mask, config.top_k)
                banks[bank], gates = self._write(banks[bank], i, trace, segment.mask, keys)
                written = (routed.mean(1) * gates["gate_in"].mean(-1, keepdim=True)).mT
            found[layer] = SlotUse(f"bank/{bank}", read.mean(1), written)
        return found

    def _bank_of(self, i: int) -> int:
        return i if self.config.memory_scope == "per_layer" else 0

    def _keys(self, bank: Tensor, i: int) -> Tensor:
        """Keys (B, h, N, e) of a bank (B, N, d) for block i."""
        return slot_bank.split_heads(self.key(self._normed(bank, self.slot_norm, i), i), self.config.num_heads)

    def _write(
        self, bank: Tensor, i: int, trace: Trace, mask: Tensor | None, keys: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The bank (B, N, d) after block i has written, and its gates."""
        if keys is None:
            keys = self._keys(bank, i)
        (tokens, memory), mass = slot_bank.route(
            trace["query"], keys, (trace["tokens"], trace["read"]), self.config.route, mask, self.config.top_k
        )
        gate_in = self._gate(self.gate_in, self.bias_in, tokens, i)
        kept = 1 / (1 + math.exp(-self._forget_bias()))
        gate_forget = self._gate(self.gate_forget, self.bias_forget, memory, i, without=kept)
        if mass is not None:
            gate_in = gate_in * mass.clamp_max(1).unsqueeze(-1)
        content = memory if self.content is None else memory + self.content(tokens, i)
        written = gate_in * torch.tanh(content) + gate_forget * bank
        return written, {"gate_in": gate_in, "gate_forget": gate_forget}

    @staticmethod
    def _gate(linear: Any, bias: Any, x: Tensor, i: int, without: float = 1.0) -> Tensor:
        """Of block i, the shape of `x`; where there is no such gate it is `without`."""
        return torch.full_like(x, without) if linear is None else torch.sigmoid(linear(x, i) + bias[i])

    def _project(self, banks: Tensor, weights: Tensor) -> Tensor:
        """(B, banks, N, d) through each block's matrix (blocks, d, d) -> (B, blocks, N, d)."""
        if banks.shape[1] > 1:
            return torch.matmul(banks, weights)
        # One product for a shared bank and all blocks; broadcasting would run one a row and block.
        wide = banks.squeeze(1) @ weights.transpose(0, 1).flatten(1)
        return wide.unflatten(-1, (len(weights), -1)).transpose(1, 2)

    def _normed(self, x: Tensor, weight: nn.Parameter | None, i: int) -> Tensor:
        return x if weight is None else F.rms_norm(x, (x.shape[-1],), weight[i])

    def _forget_bias(self) -> float:
        named = {"paper": 0.0, "code": 1.0}
        if isinstance(self.config.retention, str):
            return named[self.config.retention]
        writers = len(self.layers) if self.config.memory_scope == "shared" else 1
        kept = self.config.retention ** (1 / max(writers, 1))
        return math.log(kept / (1 - kept))

    def _first_slots(self, num_banks: int, width: int) -> Tensor:
        slots = self.config.num_slots
        if self.config.init == "identity":
            first = torch.eye(slots, width)
        else:
            first = F.normalize(nn.init.orthogonal_(torch.empty(slots, width)), dim=-1)
        return first.expand(num_banks, slots, width).clone()
