"""RxT: Reactive Transformer, stateful real-time processing for reactive language models (2025, arXiv 2510.03561).

Every block l has S slots of its own, the short-term memory STM_l. Beside the attention of a block tokens read them;
they stay as they are while a segment (a query and its answer) goes on, and are rewritten once it is complete. Written
out for block l (x input of its attention, ED_l what the block made of the segment, n RMSNorm, one head):

    read    x <- x + tanh(a) Attn(q = R x W_Q; k = n(STM) W_K, v = n(STM) W_V) W_O
    mix     STM <- gate(STM, Attn(n(STM) W_Q'; M W_K', M W_V') W_O'),  M: n(STM), or its mean over blocks, or of both
    update  U = Attn(q = n(STM) W_q; k = R n(ED) W_k, v = n(ED) W_v) W_o
            STM <- gate(STM, U)
    gate    sigmoid (1 - G) S + G U;   tanh (1 - G) S + (1 + G) U;   none S + U

R turns by the place in the segment. G is the squashed g of a slot, or g z, or W z + g, z the mean over d of U + S.

Decisions:
- The host is encoder and decoder, a causal language model: ED are its own hidden states of the segment, so nothing runs
  twice, and there is no masked-token loss. a starts at 0: the host is unchanged at first.
- Reads join the attention's output and take its input as query, as in lm2: the sum after attention, where the paper
  reads, is out of reach in hosts with two norms around it.
- The first STM is N(0, 1), the same for every row, from `seed`; so streams and their copies agree.
- g starts at 3, so that a slot takes 0.95 of an update, as the assembled models have it (0 in the released class).
- "gated" mixes both sources by a learned share of each block, at first one half.
- Norms have no weights: the projections behind them have. One released norm divides by the root of the root mean
  square; that is a fault and not followed.
- Slots are written at a commit, before the next segment reads: the paper's background update with the wait for it.

The stages of training are `training.rxt_stages`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, SlotUse, option
from ...core.state import State
from ...core.step import Host, Step
from ...ops import slot_bank
from ...ops.block_linear import BlockLinear
from ...ops.rotary import Rotation, rotate


@dataclass(frozen=True, kw_only=True)
class RxTConfig(MemoryConfig):
    name = "rxt"
    presets = {"self": {"mixing": "self"}, "gated": {"mixing": "gated"}}

    num_slots: int = option(32, "slots S of a block", minimum=1)
    num_heads: int = option(4, "heads of reads and writes; of even width, must divide the host's width", minimum=1)
    mixing: Literal["none", "self", "interlayer", "gated"] = option(
        "interlayer", "what slots read before an update: nothing, their block's, the blocks' mean, or a share of both"
    )
    residual: Literal["sigmoid", "tanh", "none"] = option("sigmoid", "how an update joins what a slot held")
    gate: Literal["static", "elementwise", "linear"] = option(
        "static", "G from a parameter of each slot, from it times the slot's status, or from the status of all slots"
    )
    gate_start: float = option(3.0, "first value of the gates' parameters")
    init: Literal["normal", "uniform", "zeros"] = option(
        "normal", "first slots: N(0, 1), between -0.02 and 0.02, or zeros"
    )
    seed: int = option(0, "of the first slots", minimum=0)


class RxT(Memory):
    name = "rxt"
    config_class = RxTConfig
    paper = "Reactive Transformer: Stateful Real-Time Processing (2025, arXiv 2510.03561)"
    state_size = "L * num_slots * d"
    slot_dims = {"slots": 2}
    config: RxTConfig

    def __init__(self, config: RxTConfig, host: HostSpec):
        super().__init__(config, host)
        width, heads = host.hidden_size, config.num_heads
        if width % heads or width // heads % 2:
            raise ConfigError(
                f"rxt: num_heads = {heads} does not cut the host's width {width} into heads of even width."
            )
        factory = {"dtype": host.dtype, "device": host.device}
        self.read = Attention(host)
        self.update = Attention(host)
        self.mix = Attention(host) if config.mixing != "none" else None
        self.scale = nn.Parameter(torch.zeros(host.num_layers, **factory))
        # Of the update and of the mixing.
        self.update_gate = Gate(config, host)
        self.mix_gate = Gate(config, host) if config.mixing != "none" else None
        self.share = nn.Parameter(torch.zeros(host.num_layers, **factory)) if config.mixing == "gated" else None

    @property
    def identity_at_attach(self) -> bool:
        return True

    def initial_state(self, batch_size: int) -> State:
        """ "slots" (B, L, S, d)."""
        c = self.config
        shape = (self.host.num_layers, c.num_slots, self.host.hidden_size)
        # Drawn on the CPU: the same on every device.
        generator = torch.Generator().manual_seed(c.seed)
        if c.init == "normal":
            first = torch.randn(shape, generator=generator)
        else:
            first = (torch.rand(shape, generator=generator) * 2 - 1) * (0.02 if c.init == "uniform" else 0.0)
        return State({"slots": first.to(self.scale).expand(batch_size, -1, -1, -1)})

    # Reading

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        """Keys and values of the slots by block: "<block>/keys" and "<block>/values", (B, h, S, e)."""
        slots, reads = norm(state["slots"]), {}
        for name, linear in (("keys", self.read.key), ("values", self.read.value)):
            parts = slot_bank.split_heads(slots @ linear.full(), self.config.num_heads).unbind(1)
            reads |= {f"{layer}/{name}": part for layer, part in enumerate(parts)}
        return reads

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        layer = step.layer
        query = slot_bank.split_heads(self.read.query(source, layer), self.config.num_heads)
        query = slot_bank.merge_heads(rotate(query, *rotation(step.places % step.segment, query.shape[-1])))
        if step.diagnosing:
            step.keep(query=query)
        factors = step.slot_factors(f"slots/{layer}")
        found = slot_bank.read(query, step.read(f"{layer}/keys"), step.read(f"{layer}/values"), factors=factors)
        return x + self.scale[layer].tanh() * self.read.out(found, layer)

    def after_layer(self, x: Tensor, step: Step) -> Tensor:
        step.keep(hidden=x)
        return x

    def slot_use(self, state: State, segment: Segment) -> dict[int, SlotUse]:
        reads, found = self.prepare(state), {}
        for layer in self.layers:
            query = slot_bank.split_heads(segment.trace[layer]["query"], self.config.num_heads)
            read = slot_bank.attention_weights(query, reads[f"{layer}/keys"]).mean(1)
            found[layer] = SlotUse(f"slots/{layer}", read)
        return found

    # Writing

    def commit(self, state: State, segment: Segment) -> State:
        hidden = torch.stack([segment.trace[layer]["hidden"] for layer in self.layers], dim=1)
        return State({"slots": self.updated(state["slots"], hidden, segment.mask)})

    def updated(self, slots: Tensor, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Slots (B, L, S, d) after a segment of which the blocks made `hidden` (B, L, T, d); mask (B, T) bool, False
        for padding."""
        if self.mix is not None and self.mix_gate is not None:
            mixed = self.mix(norm(slots), norm(self.mixed(slots)), self.config.num_heads)
            slots = self.mix_gate(slots, mixed)
        found = self.update(norm(slots), norm(hidden.to(slots.dtype)), self.config.num_heads, turned=True, mask=mask)
        return self.update_gate(slots, found)

    def mixed(self, slots: Tensor) -> Tensor:
        """What slots (B, L, S, d) read when they mix, of the same shape."""
        mean = slots.mean(1, keepdim=True).expand_as(slots)
        if self.share is None:
            return slots if self.config.mixing == "self" else mean
        share = self.share.sigmoid()[:, None, None]
        return share * slots + (1 - share) * mean

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """How far a block's slots turn in an update (1 - cosine), and how much of its reads joins the text."""
        after = self.commit(state, segment)["slots"]
        turned = (1 - F.cosine_similarity(after, state["slots"], dim=-1)).mean((0, 2)).detach().float()
        scale = self.scale.detach().float().tanh()
        return {
            f"block{layer}/{name}": values[layer]
            for layer in self.layers
            for name, values in (("turned", turned), ("scale", scale))
        }


class Attention(nn.Module):
    """The projections of an attention for each block, without biases."""

    def __init__(self, host: HostSpec):
        super().__init__()
        width = host.hidden_size
        make = {"std": width**-0.5, "dtype": host.dtype, "device": host.device}
        self.query, self.key, self.value, self.out = (BlockLinear(host.num_layers, width, **make) for _ in range(4))

    def forward(
        self, x: Tensor, source: Tensor, heads: int, turned: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """All blocks at once: x (B, L, S, d) attends to source (B, L, n, d).

        turned: keys turn by their number; mask: (B, n) bool, False for what is not seen.
        """
        query, keys, values = (
            slot_bank.split_heads(t @ linear.full(), heads)
            for t, linear in ((x, self.query), (source, self.key), (source, self.value))
        )
        if turned:
            places = torch.arange(source.shape[2], device=source.device)[None]
            keys = rotate(keys.flatten(0, 1), *rotation(places, keys.shape[-1])).view_as(keys)
        seen = None if mask is None else mask[:, None, None, None]
        found = F.scaled_dot_product_attention(query, keys, values, seen)
        return slot_bank.merge_heads(found) @ self.out.full()


class Gate(nn.Module):
    """The residual gate of every slot of every block."""

    def __init__(self, config: RxTConfig, host: HostSpec):
        super().__init__()
        layers, slots, make = host.num_layers, config.num_slots, {"dtype": host.dtype, "device": host.device}
        self.residual, self.kind, gated = config.residual, config.gate, config.residual != "none"
        self.bias = nn.Parameter(torch.full((layers, slots), config.gate_start, **make)) if gated else None
        linear = gated and config.gate == "linear"
        self.weight = nn.Parameter(torch.randn(layers, slots, slots, **make) * slots**-0.5) if linear else None

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        """old, new: (B, L, S, d); returns the same."""
        if self.bias is None:
            return old + new
        score = self.bias[..., None]
        if self.kind != "static":
            status = (old + new).mean(-1, keepdim=True)
            score = score * status if self.weight is None else self.weight @ status + score
        if self.residual == "sigmoid":
            share = score.sigmoid()
            return (1 - share) * old + share * new
        share = score.tanh()
        return (1 - share) * old + (1 + share) * new


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def rotation(places: Tensor, width: int) -> Rotation:
    """cos and sin (B or 1, n, width), float64, of places (B or 1, n)."""
    half = torch.arange(0, width, 2, device=places.device, dtype=torch.float64)
    angles = (places[..., None] * 10000.0 ** (-half / width)).repeat(1, 1, 2)
    return angles.cos(), angles.sin()
