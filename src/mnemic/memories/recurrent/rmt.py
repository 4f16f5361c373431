"""RMT: Recurrent Memory Transformer (2022, arXiv 2207.06881, NeurIPS 2022).

m vectors stand in front of a segment (read) and, the same vectors, behind it (write). What the last layer makes of
the trailing ones is the memory of the next segment:

    [_ ; H ; mem'] = Transformer([mem ; tokens ; mem]),   mem_0 = learned

Decisions: memory tokens take ordinary positions (read 0..m-1, tokens next, write last), so segment + 2m must fit the
host's positions. Written states are taken after the host's final norm, as the authors' code does; this keeps the
recurrence stable. No write tokens are present while a segment is open, so none stand before generated text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State


@dataclass(frozen=True, kw_only=True)
class RMTConfig(MemoryConfig):
    name = "rmt"

    num_tokens: int = option(10, "memory tokens m at each end of a segment", minimum=0)
    memory_causal: bool = option(
        False, "memory tokens see each other left to right only (as the authors' GPT-2 wrapper) instead of all"
    )


class RMT(Memory):
    name = "rmt"
    config_class = RMTConfig
    paper = "Recurrent Memory Transformer (2022, arXiv 2207.06881)"
    state_size = "num_tokens * d"
    slot_dims = {"memory": 1}
    config: RMTConfig

    def __init__(self, config: RMTConfig, host: HostSpec):
        super().__init__(config, host)
        self.num_read_tokens = self.num_write_tokens = config.num_tokens
        self.bidirectional_tokens = not config.memory_causal
        shape = (config.num_tokens, host.hidden_size)
        first = torch.randn(shape, dtype=host.dtype, device=host.device) * host.embedding_std
        self.first_tokens = nn.Parameter(first)

    @property
    def identity_at_attach(self) -> bool:
        return self.config.num_tokens == 0

    def initial_state(self, batch_size: int) -> State:
        return State({"memory": self.first_tokens.expand(batch_size, -1, -1)})

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        return state["memory"], state["memory"]

    def commit(self, state: State, segment: Segment) -> State:
        return state if segment.written is None else State({"memory": segment.written})
