"""HMT: Hierarchical Memory Transformer for Efficient Long Context Language Processing (2024, arXiv 2405.06067).

Three levels, after how people remember: the last k tokens of the segment before (sensory), one vector for each segment
(short-term), and the last N of these, searched by a summary of the text (long-term). f gives last hidden states, E are
input embeddings, t and m_0 learned vectors:

    summary   s = f([t ; E[: j] ; t]) at its last place
    recall    p = softmax(s W_q (C W_k)^T / sqrt(d_h)) C;    p = m_0 while C is empty
    read      f([p ; last k of E before ; E ; p]),  its last place is m
    write     C <- the last N of [C ; m]

Decisions:
- `summary_of`: the paper summarises the first j tokens of the segment that is about to be read, so what stands before
  these tokens knows them and their logits leak: "current", which reads segments whole and is honest only behind token j
  (`honest_labels`). By default the last j tokens of the segment before are summarised, which is causal and streams.
- Scores are divided by sqrt(d_h) always; the released code divides by d_h in training of wide models.
- Without `recall` (the paper's first stage of training) p is the last m. With k = 0 this is RMT with one vector.
- The sensory tokens are input embeddings read again, behind p; of the first segment there are none, and the place that
  they have is masked. They take part in the positions, so segment + k + 2 must fit the host's.
- m and s are taken after the host's final norm, as the released code does.
- Truncation cuts C where a segment begins, so no gradient reaches further back. W_q and W_k are used when a segment is
  read: they are trained however short the truncation, once C holds two vectors.
- Left out: the released code's second loss on recall, reading speed ("browse and switch"), random prefixes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import AttentionCall, Host, Step


@dataclass(frozen=True, kw_only=True)
class HMTConfig(MemoryConfig):
    name = "hmt"

    cache_size: int = option(300, "segments N whose vectors are kept", minimum=1)
    sensory: int = option(32, "tokens k of the segment before that are read again", minimum=0)
    recall: bool = option(True, "search all vectors that are kept, or take the last one")
    summary_of: Literal["previous", "current"] = option(
        "previous", "what the search asks with: the end of the segment before, or (leaking) the start of this one"
    )
    summary_tokens: int | None = option(None, "tokens j of a summary, or None for half a segment", minimum=1)
    key_width: int | None = option(None, "width d_h of the search, or None for the host's", minimum=1)


def honest_labels(labels: Tensor, segment: int, summary_tokens: int | None = None) -> Tensor:
    """Labels (B, T) of rows that start with a segment, without the first j tokens of each segment (-100): those that a
    memory with summary_of="current" knows before it reads them."""
    known = segment // 2 if summary_tokens is None else summary_tokens
    place = torch.arange(labels.shape[1], device=labels.device) % segment
    return labels.masked_fill(place < known, -100)


class HMT(Memory):
    name = "hmt"
    config_class = HMTConfig
    paper = "HMT: Hierarchical Memory Transformer for Long Context Language Processing (2024, arXiv 2405.06067)"
    state_size = "(cache_size + (sensory if sensory > T // 2 else T // 2)) * d"
    keeps_embeddings = True
    config: HMTConfig

    def __init__(self, config: HMTConfig, host: HostSpec):
        super().__init__(config, host)
        width, factory = host.hidden_size, {"dtype": host.dtype, "device": host.device}
        self.num_read_tokens, self.num_write_tokens = 1 + config.sensory, 1
        vector = lambda: nn.Parameter(torch.randn(width, **factory) * host.embedding_std)  # noqa: E731 - two of a kind
        self.first_memory = vector()
        if config.recall:
            keys = config.key_width or width
            self.summary_token = vector()
            self.query, self.key = (nn.Parameter(torch.randn(width, keys, **factory) * width**-0.5) for _ in range(2))
        self.segment = 0

    @property
    def whole_segments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.config.recall and self.config.summary_of == "current"

    @property
    def limits(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not self.whole_segments:
            return {}
        return {"causality": "what stands before the first tokens of a segment summarises them, as in the paper"}

    def uses(self, method: str) -> bool:
        needed = {"attention": self.config.sensory > 0, "fetch": self.whole_segments}
        return super().uses(method) and needed.get(method, True)

    def commit_every(self, segment: int) -> int:
        self.segment = segment
        for name, tokens in (("sensory", self.config.sensory), ("summary_tokens", self.summarised)):
            if not tokens <= segment:
                raise ConfigError(
                    f"hmt: {name} = {tokens} is more than a segment of {segment} tokens holds; lower it, or use longer "
                    "segments."
                )
        return segment

    @property
    def summarised(self) -> int:
        """Tokens j of a summary."""
        return self.config.summary_tokens or max(self.segment // 2, 1)

    @property
    def tail(self) -> int:
        """Input embeddings of a segment's end that are kept."""
        behind = self.summarised if self.config.recall and not self.whole_segments else 0
        return max(self.config.sensory, behind)

    def initial_state(self, batch_size: int) -> State:
        """cache (B, N, d), newest last; tail (B, max(k, j), d), input embeddings; count (B,): vectors made so far."""
        first, slots = self.first_memory, self.config.cache_size if self.config.recall else 1
        return State(
            {
                "cache": first.new_zeros(batch_size, slots, len(first)),
                "tail": first.new_zeros(batch_size, self.tail, len(first)),
                "count": torch.zeros(batch_size, dtype=torch.int64, device=first.device),
            }
        )

    def prepare(self, state: State, host: Host) -> dict[str, Tensor]:
        """ "prompt" (B, 1, d): p."""
        if self.whole_segments:
            return {}
        if not self.config.recall:
            return {"prompt": self._or_first(state["cache"], state["count"])}
        return {"prompt": self.recalled(state, state["tail"][:, -self.summarised :], host)}

    def fetch(self, state: State, tokens: Tensor, step: Step) -> dict[str, Tensor]:
        return {"prompt": self.recalled(state, tokens[:, : self.summarised], step.host)}

    def recalled(self, state: State, text: Tensor, host: Host) -> Tensor:
        """p (B, 1, d) for input embeddings (B, j, d) that are summarised."""
        ends = self.summary_token.to(text.dtype).expand(len(text), 1, -1)
        summary = host.run(torch.cat([ends, text, ends], dim=1))[:, -1:]
        cache, query = state["cache"].to(summary.dtype), summary @ self.query
        scores = query @ (cache @ self.key).mT / query.shape[-1] ** 0.5
        slots = cache.shape[1]
        stored = torch.arange(slots, device=cache.device) >= slots - state["count"][:, None]
        # An empty cache has its last slot searched, so that nothing is undefined, and what comes of it is dropped.
        stored = stored | (torch.arange(slots, device=cache.device) == slots - 1)
        weights = scores.masked_fill(~stored[:, None], float("-inf")).softmax(-1)
        return self._or_first(weights @ cache, state["count"])

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        prompt, sensory = state["prompt"], self.config.sensory
        tail = state["tail"][:, self.tail - sensory :]
        return torch.cat([prompt, tail.to(prompt.dtype)], dim=1), prompt

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        mask, begun = call.bool_mask(), (step.state("count") > 0)[:, None, None, None]
        mask = mask.expand(len(begun), -1, -1, -1)
        ahead = self.num_read_tokens
        columns = mask[..., 1:ahead] & begun
        return call.plain(mask=torch.cat([mask[..., :1], columns, mask[..., ahead:]], dim=-1))

    def commit(self, state: State, segment: Segment) -> State:
        assert segment.written is not None
        cache, slots = state["cache"], state["cache"].shape[1]
        after = {"cache": torch.cat([cache, segment.written.to(cache.dtype)], dim=1)[:, -slots:]}
        embeddings = segment.trace[-1]["embeddings"]
        # A copy: the trace of the next segment is written to the same place.
        after["tail"] = embeddings[:, embeddings.shape[1] - self.tail :].to(cache.dtype, copy=True)
        return State({**after, "count": state["count"] + 1})

    def _or_first(self, memory: Tensor, count: Tensor) -> Tensor:
        """memory (B, 1, d), or m_0 in rows that have none yet."""
        return torch.where((count > 0)[:, None, None], memory, self.first_memory.to(memory.dtype))
