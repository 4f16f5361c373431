"""RMT-1M: Scaling Transformer to 1M tokens and beyond with RMT (2023, arXiv 2304.11062; Bulatov, Kuratov, Burtsev).

RMT on a pretrained encoder, trained with a growing number of segments. The text is cut right-aligned: the last segment
is full, the first may be short. One block of m vectors in front of each segment is read and, because attention is
two-way, written:

    [_ ; mem' ; _ ; H ; _] = Encoder([CLS ; mem ; SEP ; tokens ; SEP]),   mem_0 = learned

On a decoder the layout is that of `rmt`, [mem ; tokens ; mem].

`retrieve` adds RMT-R: before each segment the memory looks back at all the states it has had,

    mem <- mem + softmax(mem W_Q (A W_K)^T / sqrt(d)) A W_V,      A = [mem_0 ; ... ; mem_{tau-1}]  (m vectors each)

Decisions:
- RMT-R has no published code. This is our reading: one head, the result is added to what is read (on a decoder in front
  of the segment only), W_V starts at zero, so that it starts as RMT. The archive grows by m vectors a segment.
- `cls_id`, `sep_id` are the tokenizer's; most configurations of encoders do not name them. None leaves the token out.
- Memory takes ordinary positions of the host, so segment + m + 3 must fit them. Written states are the encoder's last
  hidden states, after its final norm where it has one.
- Gradients flow through all segments of a call; `truncation` stops them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State


@dataclass(frozen=True, kw_only=True)
class RMT1MConfig(MemoryConfig):
    name = "rmt-1m"

    num_tokens: int = option(10, "memory tokens m", minimum=1)
    cls_id: int | None = option(None, "on encoders: token in front of each segment; None for none", minimum=0)
    sep_id: int | None = option(
        None, "on encoders: token behind the memory and behind the text; None for none", minimum=0
    )
    retrieve: bool = option(False, "the memory looks back at all its earlier states before each segment (RMT-R)")


class RMT1M(Memory):
    name = "rmt-1m"
    config_class = RMT1MConfig
    paper = "Scaling Transformer to 1M tokens and beyond with RMT (2023, arXiv 2304.11062)"
    state_size = "num_tokens * d"
    slot_dims = {"memory": 1}
    hosts = frozenset({"decoder", "encoder"})
    masked_commits = True
    bidirectional_tokens = True
    config: RMT1MConfig

    def __init__(self, config: RMT1MConfig, host: HostSpec):
        super().__init__(config, host)
        m, width, factory = config.num_tokens, host.hidden_size, {"dtype": host.dtype, "device": host.device}
        self.num_read_tokens = m
        if host.kind == "decoder":
            self.num_write_tokens = m
        else:
            self.opening_token, self.closing_token = config.cls_id, config.sep_id
        self.first_tokens = nn.Parameter(torch.randn(m, width, **factory) * host.embedding_std)
        self.query, self.key, self.value = None, None, None
        if config.retrieve:
            self.constant_size = False  # pyright: ignore[reportAttributeAccessIssue]
            self.query, self.key = (nn.Parameter(torch.randn(width, width, **factory) * width**-0.5) for _ in range(2))
            self.value = nn.Parameter(torch.zeros(width, width, **factory))

    def initial_state(self, batch_size: int) -> State:
        """ "memory" (B, m, d); with `retrieve` "archive" (B, segments, m, d), of which a row has "count" (B,) int64."""
        memory = self.first_tokens.expand(batch_size, -1, -1)
        if not self.config.retrieve:
            return State({"memory": memory})
        count = torch.zeros(batch_size, dtype=torch.long, device=memory.device)
        return State({"memory": memory, "archive": memory.new_zeros(batch_size, 0, *memory.shape[1:]), "count": count})

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        memory = state["memory"]
        return (self.recalled(state) if self.config.retrieve else memory), memory

    def recalled(self, state: State) -> Tensor:
        """The memory (B, m, d) with what it finds among its earlier states."""
        memory, archive = state["memory"], state["archive"]
        if not archive.shape[1]:
            return memory
        assert self.query is not None
        assert self.key is not None
        assert self.value is not None
        past = archive.flatten(1, 2)
        scores = (memory @ self.query) @ (past @ self.key).mT * memory.shape[-1] ** -0.5
        known = torch.arange(archive.shape[1], device=archive.device) < state["count"][:, None]
        known = known.repeat_interleave(archive.shape[2], dim=1)[:, None]
        # A row without a past finds nothing; its scores stay finite.
        weights = scores.masked_fill(~known & known.any(-1, keepdim=True), float("-inf")).softmax(-1)
        return memory + (weights * known.any(-1, keepdim=True)) @ (past @ self.value)

    def commit(self, state: State, segment: Segment) -> State:
        assert segment.written is not None
        written, mask = segment.written, segment.mask
        active = torch.ones_like(written[:, 0, 0], dtype=torch.bool) if mask is None else mask.any(1)
        memory = torch.where(active[:, None, None], written, state["memory"])
        if not self.config.retrieve:
            return State({"memory": memory})
        count = state["count"]
        archive = state["archive"]
        if bool((active & (count == archive.shape[1])).any()):
            archive = nn.functional.pad(archive, (0, 0, 0, 0, 0, 1))
        place = torch.arange(archive.shape[1], device=count.device) == count[:, None]
        place = (place & active[:, None])[:, :, None, None]
        archive = torch.where(place, state["memory"][:, None], archive)
        return State({"memory": memory, "archive": archive, "count": count + active.long()})
