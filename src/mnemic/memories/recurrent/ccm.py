"""CCM: Compressed Context Memory for online language model interaction (2023, arXiv 2312.03414, ICLR 2024).

Behind a complete segment c(t) stand n learned <COMP> tokens. What every layer makes of them as keys and values is the
memory of c(t); later segments see the memory in place of the text. Low-rank adapters act on these tokens only, so text
meets the host's own weights:

    h(t) = K, V of the <COMP> tokens of [c(t) ; COMP] with Mem(t-1) before it, in every layer
    concat   Mem(t) = [Mem(t-1) ; h(t)]
    merge    Mem(t) = (1 - a_t) Mem(t-1) + a_t h(t),   a_t = 1 / t, or constant
    q, k, v, o projections:  y = W x + [x is <COMP>] alpha / r B A x

`training.parallel_compression` computes all segments of a text in one pass of the host, with masks in place of the
recurrence.

Decisions:
- Keys are kept free of position. <COMP> tokens have the ids behind their segment, and the text that follows begins at
  the first of these ids again. With "concat" each slot is read at the place that it had; with "merge" all slots of one
  number are averaged, and read at the place of the newest: an average of keys turned alike is the turned average.
- "concat" keeps the newest `capacity` segments, as rows of a batch cannot grow apart; the released streaming mode keeps
  8 slots. Its window of raw tokens beside the memory is the open segment here.
- `recurrent` False is the variant in which segments are compressed without a memory before them: they are read a second
  time for it, because their text was read with one.
- Before the first segment is complete the host's own attention runs, and nothing else. The memory is in sight of
  layers with a sliding window.
- <COMP> embeddings start at random with the spread of the vocabulary's, not as the mean of some of its rows.
- The released streaming merge takes new values from the place of the keys; that is a fault and not followed.
- Hosts with a table of positions: keys carry the place behind their own segment.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError, HostError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import AttentionCall, Host, Step
from ...ops.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class CCMConfig(MemoryConfig):
    name = "ccm"
    presets = {"merge": {"update": "merge"}, "unified": {"rank": 16}}

    num_tokens: int = option(2, "<COMP> tokens n behind a segment", minimum=1)
    update: Literal["concat", "merge"] = option("concat", "append what a segment leaves, or average it in")
    capacity: int = option(16, "segments that 'concat' keeps, the newest", minimum=1)
    merge_rate: float | None = option(
        None, "share a_t of the newest segment for 'merge'; None: 1 / t, the mean", minimum=0, maximum=1
    )
    recurrent: bool = option(True, "compress a segment with the memory of those before in sight")
    rank: int = option(8, "rank r of the adapters, 0 for none", minimum=0)
    alpha: float = option(16.0, "scale of the adapters times their rank")
    dropout: float = option(0.05, "dropout before the adapters", minimum=0, maximum=1)

    def validate(self) -> None:
        if self.merge_rate is not None and self.update != "merge":
            raise ConfigError("ccm: merge_rate is for update='merge'; 'concat' averages nothing.")
        if self.merge_rate == 0:
            raise ConfigError("ccm: merge_rate = 0 would write nothing; expected more than 0.")


class CCM(Memory):
    name = "ccm"
    config_class = CCMConfig
    paper = "Compressed Context Memory for Online Language Model Interaction (2023, arXiv 2312.03414)"
    state_size = "2 * L * Hkv * e * num_tokens * capacity"
    config: CCMConfig

    def __init__(self, config: CCMConfig, host: HostSpec):
        super().__init__(config, host)
        self.write_pass = not config.recurrent
        self.num_write_tokens = config.num_tokens if config.recurrent else 0
        self.slots = config.num_tokens * (config.capacity if config.update == "concat" else 1)
        factory = {"dtype": host.dtype, "device": host.device}
        first = torch.randn(config.num_tokens, host.hidden_size, **factory)
        self.comp = nn.Parameter(first * host.embedding_std)
        adapted = {n: size for n, size in host.linears.items() if "att" in n.split(".")[0]} if config.rank else {}
        if config.rank and not adapted:
            raise HostError(
                f"ccm: no linear layer of this host is part of an attention (it has {', '.join(host.linears)}), so "
                "there is nothing to adapt; use rank=0, or a host such as Llama or GPT-2."
            )
        layers, rank = host.num_layers, config.rank
        # Parameter names cannot hold dots.
        self.down = nn.ParameterDict(
            {
                name.replace(".", "-"): nn.Parameter(torch.randn(layers, wide, rank, **factory) * wide**-0.5)
                for name, (wide, _) in adapted.items()
            }
        )
        self.up = nn.ParameterDict(
            {
                name.replace(".", "-"): nn.Parameter(torch.zeros(layers, rank, wide, **factory))
                for name, (_, wide) in adapted.items()
            }
        )

    def initial_state(self, batch_size: int) -> State:
        """Per layer "<layer>/keys", free of position, and "<layer>/values", (B, slots, Hkv, e), newest last; "count"
        (B,), segments compressed so far."""
        like, host = self.comp, self.host
        # A running mean loses its newest terms in half precision.
        dtype = torch.promote_types(like.dtype, torch.float32) if self.config.update == "merge" else like.dtype
        shape = (batch_size, self.slots, host.num_key_value_heads, host.head_dim)
        state = {
            f"{layer}/{name}": like.new_zeros(shape, dtype=dtype)
            for layer in self.layers
            for name in ("keys", "values")
        }
        state["count"] = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        return State(state)

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        comp = self.comp.expand(len(state["count"]), -1, -1)
        return comp[:, :0], comp

    def write_input(self, state: State, embeddings: Tensor) -> Tensor:
        return torch.cat([embeddings, self.comp.expand(len(embeddings), -1, -1).to(embeddings.dtype)], dim=1)

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        """Per layer keys, free of position, and values of the slots in use by any row, (B, Hkv, N, e), and which of
        them are a row's, "there" (B, N)."""
        count, number = state["count"], self.config.num_tokens
        filled = (count * number).clamp_max(self.slots)
        used = int(filled.max())
        reads = {"there": torch.arange(used, device=count.device) >= used - filled[:, None]}
        for layer in self.layers:
            for name in (f"{layer}/keys", f"{layer}/values"):
                reads[name] = state[name][:, self.slots - used :].transpose(1, 2)
        return reads

    def linear(self, x: Tensor, out: Tensor, name: str, step: Step) -> Tensor:
        number, name = self.compressing(step), name.replace(".", "-")
        if not number or name not in self.down:
            return out
        given = F.dropout(x[:, -number:], self.config.dropout, step.training)
        scale = self.config.alpha / self.config.rank
        added = given @ self.down[name][step.layer] @ (scale * self.up[name][step.layer])
        return torch.cat([out[:, :-number], out[:, -number:] + added], dim=1)

    def compressing(self, step: Step) -> int:
        """How many of the last tokens of this step are <COMP>."""
        return self.config.num_tokens if step.writing else step.num_write

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        if number := self.compressing(step):
            made = {"keys": call.free_keys().transpose(1, 2), "values": call.new_values.transpose(1, 2)}
            if step.writing:
                step.keep(**{name: t[:, -number:] for name, t in made.items()})
                return call.plain()
            step.keep_written(**made)
        layer, there = step.layer, step.read("there")
        if not there.shape[1]:
            return call.plain()
        keys, values = (step.read(f"{layer}/{name}").to(call.keys.dtype) for name in ("keys", "values"))
        turned = step.host.rotary(self.places(there.shape[1], step.segment) + step.first, layer)
        keys = keys if turned is None else rotate(keys, *turned)
        return call.after(keys, values, there, step)

    def places(self, used: int, segment: int) -> Tensor:
        """Positions of the newest `used` slots, relative to the first token of a segment, (1, used)."""
        slot = torch.arange(used, device=self.comp.device)[None]
        number = self.config.num_tokens
        age = used // number - 1 - slot // number
        return slot % number - age * segment

    def commit(self, state: State, segment: Segment) -> State:
        traces = segment.written_trace if self.config.recurrent else segment.trace
        count, after = state["count"], {}
        for layer in self.layers:
            for name in ("keys", "values"):
                old = state[f"{layer}/{name}"]
                after[f"{layer}/{name}"] = self.updated(old, traces[layer][name].to(old.dtype), count)
        return State({**after, "count": count + 1})

    def updated(self, old: Tensor, new: Tensor, count: Tensor) -> Tensor:
        """Slots (B, slots, ...) after those of one more segment, (B, n, ...), with `count` (B,) before it."""
        if self.config.update == "concat":
            return torch.cat([old, new], dim=1)[:, new.shape[1] :]
        share = 1 / (count + 1).to(old.dtype)
        if self.config.merge_rate is not None:
            share = torch.where(count == 0, 1.0, self.config.merge_rate).to(old.dtype)
        return torch.lerp(old, new, share.view(-1, *[1] * (old.dim() - 1)))
