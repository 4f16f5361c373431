"""R3Mem: Bridging Memory Retention and Retrieval via Reversible Compression (2025, arXiv 2502.15957, ACL Findings).

Memory tokens as in RMT, and an invertible map between what the host writes and what is kept, so that a memory can be
turned back into the vectors that the host wrote, and these into the text they stand for:

    h_w = what the last layer makes of the write tokens of [mem_{t-1} ; tokens ; mem_{t-1} + W]
    mem_t = Phi(h_w),   mem_0 learned
    raw text of segment t, from the same model:   [Phi^-1(mem_t) ; query ; text]

Reading and writing are here. Expanding a memory to text, the losses that teach it (forward, backward, cycle) and the
archive of memories are in training/reversible_compression.py.

No code was published; what follows is our reading of the paper.

- Phi: additive coupling blocks (ops/coupling.py) on the channels. They start as the identity, and so does W: then the
  system is rmt with the same first tokens.
- m vectors cannot hold any segment without loss. Exact is the inverse of Phi only; that text comes back is learned.
- The memory is float32 at least: in bfloat16 the inverse would be off in the third digit.
- Written states are taken after the host's final norm, and memory tokens see each other, as in rmt.
- The host is to be frozen and adapted with LoRA: `freeze_host(model)` and `mnemic.add_lora(model, LoraConfig(...))`,
  which expansion goes through too.
- A whole host of reversible layers (y1 = lam x1 + Layer(x2), y2 = x2 + Adapter(y1)) is not offered: it is no longer
  the pretrained host, since only lam -> 0 leaves that unchanged, and the inverse divides by lam in every layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.errors import HostError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...ops.coupling import Coupling


@dataclass(frozen=True, kw_only=True)
class R3MemConfig(MemoryConfig):
    name = "r3mem"

    num_tokens: int = option(16, "memory tokens m at each end of a segment", minimum=1)
    num_blocks: int = option(4, "coupling blocks R of the invertible map; 0 keeps what is written as it is", minimum=0)
    bottleneck: int = option(64, "width of the hidden layers in the coupling blocks", minimum=1)


class R3Mem(Memory):
    name = "r3mem"
    config_class = R3MemConfig
    paper = "R3Mem: Bridging Memory Retention and Retrieval via Reversible Compression (2025, arXiv 2502.15957)"
    state_size = "num_tokens * d"
    slot_dims = {"memory": 1}
    bidirectional_tokens = True
    config: R3MemConfig

    def __init__(self, config: R3MemConfig, host: HostSpec):
        super().__init__(config, host)
        width, factory = host.hidden_size, {"dtype": host.dtype, "device": host.device}
        if width % 2:
            raise HostError(f"r3mem splits the host's width in halves; got {width}, expected an even width.")
        self.num_read_tokens = self.num_write_tokens = config.num_tokens
        first = torch.randn(config.num_tokens, width, **factory) * host.embedding_std
        self.first_tokens = nn.Parameter(first)
        self.write_tokens = nn.Parameter(torch.zeros_like(first))
        self.coupling = Coupling(config.num_blocks, width, config.bottleneck, **factory)

    def initial_state(self, batch_size: int) -> State:
        """ "memory" (B, m, d) in float32 or float64."""
        first = self.first_tokens.to(torch.promote_types(self.first_tokens.dtype, torch.float32))
        return State({"memory": first.expand(batch_size, -1, -1)})

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        return state["memory"], state["memory"] + self.write_tokens

    def commit(self, state: State, segment: Segment) -> State:
        assert segment.written is not None
        return State({"memory": self.coupling(segment.written)})

    def prompt(self, memory: Tensor) -> Tensor:
        """Phi^-1: the vectors (B, m, d) that the host wrote, of a memory (B, m, d)."""
        return self.coupling.inverse(memory)

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Norm of the vectors of the memory, and how far Phi moves what was written, relative to its norm."""
        assert segment.written is not None
        written = segment.written.detach()
        kept = self.coupling(written).detach()
        moved = (kept - written).norm(dim=-1) / written.norm(dim=-1).clamp_min(1e-9)
        return {"memory_norm": kept.norm(dim=-1).mean(), "coupling_shift": moved.mean()}
