"""MemBART: Stateful Memory-Augmented Transformers for Efficient Dialogue Modeling (2022, arXiv 2209.07634, EACL 2024).

k slots travel through the blocks of an encoder beside the tokens, with projections, feed-forward parts and norms of
their own that begin as copies of the block's. They meet in attention only: tokens see all slots and all tokens, a slot
sees itself and the tokens. Written out for one block (m slots, x tokens, K = [K_m m ; K_x x], V likewise):

    enter    m = LN(M + b),   M = 0 before the first turn, b learned
    slots    m <- LN_1(m + O_m attn(Q_m m, K, V; slot i sees {i} and the tokens))
             m <- LN_2(m + fc2_m(gelu(fc1_m m)))
    tokens   the host's own block, its attention over K and V
    leave    alpha = sigmoid(w gelu(W m + c) + d);   M <- alpha m + (1 - alpha) LN(M + b)
    decode   the decoder reads [M ; x], x from the last block

Decisions:
- A turn is a segment: one call of the model. M is committed whether or not the caller decodes from what the encoder
  made, and the decoder sees M as it leaves: what the turn said is in it.
- The residual of the gate is the entry state LN(M + b), as in the released code, not M itself.
- Blocks that normalise first (mBART, Pegasus) have the norms of the slots in the same places, and a copy of the
  encoder's last norm behind the last block; the paper's host normalises last.
- The dropout that the host's blocks apply to what they add to tokens is applied to slots too, as in the released code;
  dropout of attention weights and inside the feed-forward part is not.
- Encoders with LayerDrop are refused: a block that is skipped would skip the slots as well.
- It cannot start as the identity: tokens attend to slots from the first turn on. Without slots the encoder is the
  host's own.
- Left out: causal decoders, where slots would have to be written by a second pass over each turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import HostError
from ...core.memory import HostKind, HostSpec, Memory, MemoryConfig, option
from ...core.state import State
from ...core.step import AttentionCall, Host, Step
from ...ops.slot_bank import merge_heads, split_heads

_LINEARS = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.out_proj",
    "fc1": "fc1", "fc2": "fc2",
}  # fmt: skip
_NORMS = {"attention_norm": "self_attn_layer_norm", "final_norm": "final_layer_norm"}
_FITTING = (
    "BART and its relatives have them (mBART, Marian, Pegasus, Blenderbot); memformer attaches to others, such as T5"
)


@dataclass(frozen=True, kw_only=True)
class MemBARTConfig(MemoryConfig):
    name = "membart"

    num_slots: int = option(64, "slots k; the paper has 64 on the base host, 128 on the large one", minimum=0)
    bias_std: float = option(0.01, "standard deviation of the slots' learned bias b at the start", minimum=0)


class SlotBlock(nn.Module):
    """What one block of the encoder has for slots: four projections, a feed-forward part, two norms."""

    def __init__(self, width: int, inner: int, **factory: Any):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, **factory) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, inner, **factory), nn.Linear(inner, width, **factory)
        self.attention_norm, self.final_norm = (nn.LayerNorm(width, **factory) for _ in range(2))


class MemBART(Memory):
    name = "membart"
    config_class = MemBARTConfig
    paper = "Stateful Memory-Augmented Transformers for Efficient Dialogue Modeling (2022, arXiv 2209.07634)"
    state_size = "num_slots * d"
    hosts: ClassVar[frozenset[HostKind]] = frozenset({"encoder-decoder"})
    config: MemBARTConfig

    def __init__(self, config: MemBARTConfig, host: HostSpec):
        super().__init__(config, host)
        width = host.hidden_size
        lacking = [name for name in _LINEARS.values() if name not in host.linears]
        if lacking:
            raise HostError(
                f"membart copies parts of the encoder's blocks, which have no {', '.join(lacking)} here (linear "
                f"layers: {', '.join(host.linears)}). {_FITTING}."
            )
        factory = {"dtype": host.dtype, "device": host.device}
        inner = host.linears["fc1"][1]
        self.blocks = nn.ModuleList(SlotBlock(width, inner, **factory) for _ in range(host.num_layers))
        self.bias = nn.Parameter(config.bias_std * torch.randn(config.num_slots, width, **factory))
        self.entry_norm = nn.LayerNorm(width, **factory)
        self.gate = nn.Sequential(nn.Linear(width, width, **factory), nn.GELU(), nn.Linear(width, 1, **factory))
        self.last_norm: nn.LayerNorm | None = None
        self.dropout = 0.0
        self.activation: Callable[[Tensor], Tensor] = F.gelu

    @property
    def identity_at_attach(self) -> bool:
        return self.config.num_slots == 0

    @property
    def pre_norm(self) -> bool:
        """The blocks normalise before their parts, so that the last one needs a norm behind it."""
        return self.last_norm is not None

    @property
    def slots(self) -> str:
        """Name of the slots in the state: the last block leaves them."""
        return f"{self.layers[-1]}/slots"

    def copy_from(self, blocks: Sequence[nn.Module], stack: nn.Module, host: Host) -> None:
        """Takes the blocks' weights, activation and dropout; where they normalise first, the stack's last norm too.

        Raises:
            HostError: a block or stack without one of these parts.
        """
        for own, block in zip(self.blocks, blocks, strict=True):
            for name, path in (_LINEARS | _NORMS).items():
                _copy(getattr(own, name), _part(block, path))
        first: Any = blocks[0]
        self.activation, self.dropout = first.activation_fn, float(first.dropout)
        probe = self.bias.new_ones(1, 1, self.host.hidden_size)
        if host.normalise(probe, 0) is not probe:
            self.last_norm = nn.LayerNorm(self.host.hidden_size, dtype=self.host.dtype, device=self.host.device)
            _copy(self.last_norm, _part(stack, "layer_norm"))

    def initial_state(self, batch_size: int) -> State:
        """ "<last block>/slots" (B, k, d)."""
        return State({self.slots: self.bias.new_zeros(batch_size, *self.bias.shape)})

    def prepare(self, state: State, host: Host) -> dict[str, Tensor]:
        """ "entry" (B, k, d): the slots as they enter the first block."""
        return {"entry": self.entry_norm(state[self.slots] + self.bias)}

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        if not self.config.num_slots:
            return call.plain()
        slots = step.read("entry") if step.layer == 0 else step.below("slots")
        assert slots is not None
        block, (rows, heads, tokens, _), k = self.block(step.layer), call.query.shape, slots.shape[1]
        m = block.attention_norm(slots) if self.pre_norm else slots
        keys = torch.cat([split_heads(block.key(m), heads), call.keys], dim=2)
        values = torch.cat([split_heads(block.value(m), heads), call.values], dim=2)
        real = m.new_ones(rows, tokens, dtype=torch.bool) if step.real is None else step.real
        own = torch.eye(k, dtype=torch.bool, device=m.device).expand(rows, k, k)
        seen = torch.cat([own, real[:, None].expand(-1, k, -1)], dim=-1)[:, None]
        read = F.scaled_dot_product_attention(
            split_heads(block.query(m), heads), keys, values, attn_mask=seen, scale=call.scale
        )
        self._carry(slots, block.out(merge_heads(read)), real, step)
        mask = call.mask
        if mask is not None:
            mask = F.pad(mask, (k, 0), value=True if mask.dtype == torch.bool else 0.0)
        return call.plain(keys=keys, values=values, mask=mask)

    def encoded(self, hidden: Tensor, state: State) -> Tensor:
        return torch.cat([state[self.slots].to(hidden.dtype), hidden], dim=1)

    def block(self, layer: int) -> SlotBlock:
        block = self.blocks[layer]
        assert isinstance(block, SlotBlock)
        return block

    def gated(self, new: Tensor, entry: Tensor) -> Tensor:
        """Slots (B, k, d) as they leave, from those of the last block and those that entered the first."""
        alpha = torch.sigmoid(self.gate(new))
        return alpha * new + (1 - alpha) * entry

    def _carry(self, slots: Tensor, read: Tensor, real: Tensor, step: Step) -> None:
        """The slots through the rest of the block: noted for the next one, or left as the state behind the last."""
        block, rate = self.block(step.layer), self.dropout if step.training else 0.0
        m = slots + F.dropout(read, rate)
        m = m if self.pre_norm else block.attention_norm(m)
        inner = block.fc2(self.activation(block.fc1(block.final_norm(m) if self.pre_norm else m)))
        m = m + F.dropout(inner, rate)
        m = m if self.pre_norm else block.final_norm(m)
        step.add_note(slots=m)
        if step.layer == self.layers[-1]:
            m = m if self.last_norm is None else self.last_norm(m)
            after = self.gated(m, step.read("entry"))
            # A row without tokens keeps what it had.
            step.leave(slots=torch.where(real.any(1)[:, None, None], after, step.running("slots")))


def _part(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise HostError(f"membart finds no {path} in {type(module).__name__}. {_FITTING}.") from error


@torch.no_grad()
def _copy(own: nn.Module, source: nn.Module) -> None:
    """Weight, bias (zeros where there is none) and epsilon."""
    ours: Any = own
    ours.weight.copy_(source.get_parameter("weight"))
    bias = getattr(source, "bias", None)
    ours.bias.zero_() if bias is None else ours.bias.copy_(bias)
    if isinstance(source, nn.LayerNorm):
        ours.eps = source.eps
