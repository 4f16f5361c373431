"""UIO-LLMs: Unbiased Incremental Optimization for Long-Context Large Language Models (2024, arXiv 2406.18173).

A complete segment of l tokens is read once more by the host with low-rank adapters (the encoder), with M copies of one
learned <mem> token among it; what a transfer head makes of them in every layer are M keys and values that all later
text reads, in front of its own. The text itself meets the host's own weights:

    <mem> i    at position (i + 1) l / M, sees the tokens before that and itself only
    encoder    W_q + alpha / r A_q B_q,  W_v + alpha / r A_v B_v,  for all tokens of the second pass
    transfer   K_s = h (W_k + alpha / r A_k B_k),  V_s = h (W_v + alpha / r A'_v B'_v),  h: attention's input at <mem>
    read       o = Attn(q; [K_1 .. K_{s-1} ; K], [V_1 .. V_{s-1} ; V]),  positions counted over the concatenation

A segment is encoded without the memories before it, so dm_i / dm_j = 0 and the gradient is a sum over segments:
`training.unbiased_segments` estimates it while few encodings keep their activations.

Decisions:
- Keys are kept free of position, and stand right before the text, as counting from 0 over the concatenation has it:
  rotary positions say only how far apart two tokens are. Hosts with a table: keys carry their <mem> token's position.
- The newest `capacity` segments are kept, in room that is there from the start: rows of a batch commit at different
  times, so their states cannot grow apart. Columns that no row has filled are not read.
- M l-ths are rounded down where M does not divide l. An unfinished segment is never compressed.
- h is the input of the layer's attention, after its norm: what the host's own keys and values are made of. In the
  first layer it is the <mem> embedding, which has met no text; its M slots are what is learned there.
- Hosts with one linear layer for queries, keys and values have it adapted as a whole, by encoder and transfer head.
- Layers with a sliding window see as far as they do among the text; <mem> tokens and memories are not limited by it.
- <mem> starts at random with the spread of the vocabulary's embeddings, not as that of the end of text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, HostError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, Trace, option
from ...core.state import State
from ...core.step import AttentionCall, Host, Step
from ...ops.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class UIOLLMsConfig(MemoryConfig):
    name = "uio-llms"
    presets = {"ratio_8": {"num_tokens": 128}}

    num_tokens: int = option(32, "<mem> tokens M of a segment: 1/32 of the paper's 1024 tokens", minimum=1)
    capacity: int = option(32, "segments whose memories are kept, the newest", minimum=1)
    rank: int = option(128, "rank r of the adapters", minimum=1)
    alpha: float = option(512.0, "scale of the adapters times their rank")


class UIOLLMs(Memory):
    name = "uio-llms"
    config_class = UIOLLMsConfig
    paper = "UIO-LLMs: Unbiased Incremental Optimization for Long-Context LLMs (2024, arXiv 2406.18173)"
    state_size = "2 * L * Hkv * e * num_tokens * capacity"
    write_pass = True
    config: UIOLLMsConfig

    def __init__(self, config: UIOLLMsConfig, host: HostSpec):
        super().__init__(config, host)
        self.slots = config.num_tokens * config.capacity
        first = torch.randn(host.hidden_size, dtype=host.dtype, device=host.device)
        self.mem = nn.Parameter(first * host.embedding_std)
        self.encoder = Adapters(host, config, "qv")
        self.transfer = Adapters(host, config, "kv")

    def commit_every(self, segment: int) -> int:
        if segment < self.config.num_tokens:
            raise ConfigError(
                f"uio-llms: {self.config.num_tokens} <mem> tokens (num_tokens) are more than the {segment} tokens of a "
                "segment that they stand for; use fewer, or longer segments."
            )
        host = self.host
        if not host.rotary and host.max_positions is not None and segment >= host.max_positions:
            raise ConfigError(
                f"uio-llms: the last <mem> token has position {segment}, behind a segment of as many tokens, and this "
                f"host has {host.max_positions} positions; use segment={host.max_positions - 1} or less."
            )
        return segment

    def initial_state(self, batch_size: int) -> State:
        """Per layer "<layer>/keys", free of position, and "<layer>/values", (B, slots, Hkv, e), newest last; "count"
        (B,), segments read so far."""
        host = self.host
        empty = self.mem.new_zeros(batch_size, self.slots, host.num_key_value_heads, host.head_dim)
        state = {f"{layer}/{name}": empty for layer in self.layers for name in ("keys", "values")}
        return State({**state, "count": torch.zeros(batch_size, dtype=torch.int64, device=self.mem.device)})

    # Writing

    def write_input(self, state: State, embeddings: Tensor) -> Tensor:
        mem = self.mem.expand(len(embeddings), self.config.num_tokens, -1)
        return torch.cat([embeddings, mem.to(embeddings.dtype)], dim=1)

    def write_positions(self, tokens: int) -> Tensor:
        return torch.cat([torch.arange(tokens), self.ends(tokens)])

    def ends(self, tokens: int) -> Tensor:
        """How many of a segment's tokens each <mem> token stands behind, (M,)."""
        number = self.config.num_tokens
        return torch.arange(1, number + 1) * tokens // number

    def linear(self, x: Tensor, out: Tensor, name: str, step: Step) -> Tensor:
        if not step.writing:
            return out
        # The transfer head projects <mem> tokens alone, the encoder has text before them.
        alone = x.shape[1] == self.config.num_tokens
        return out + (self.transfer if alone else self.encoder)(x, name, step.layer)

    def before_attention(self, x: Tensor, step: Step) -> Tensor:
        if step.writing:
            keys, values = step.host.project(x[:, -self.config.num_tokens :], step.layer)
            step.keep(keys=keys.transpose(1, 2), values=values.transpose(1, 2))
        return x

    def covered(self, tokens: int, span: tuple[str, int] | None) -> Tensor:
        """Who sees whom in the second pass of a segment of so many tokens, (tokens + M, tokens + M) bool; span: how
        far the host's layer sees."""
        text = torch.arange(tokens)
        seen = text <= text[:, None]
        if span is not None:
            kind, size = span
            near = text[:, None] - text < size if kind == "sliding_attention" else text[:, None] // size == text // size
            seen = seen & near
        seen = torch.cat([seen, text < self.ends(tokens)[:, None]])
        number = self.config.num_tokens
        return torch.cat([seen, torch.eye(tokens + number, dtype=torch.bool)[:, tokens:]], dim=1)

    def commit(self, state: State, segment: Segment) -> State:
        return self.appended(state, [self.made(segment.trace)])

    def made(self, trace: Mapping[int, Trace]) -> State:
        """One segment's memory from its second pass: "<layer>/keys" and "<layer>/values", (B, M, Hkv, e)."""
        return State({f"{layer}/{name}": trace[layer][name] for layer in self.layers for name in ("keys", "values")})

    def appended(self, state: State, memories: Sequence[State]) -> State:
        """The state after further segments with these memories."""
        after = {}
        for name in memories[0] if memories else ():
            after[name] = torch.cat([state[name], *(m[name].to(state[name].dtype) for m in memories)], dim=1)
            after[name] = after[name][:, -self.slots :]
        return State({**state, **after, "count": state["count"] + len(memories)})

    # Reading

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        """Per layer keys, free of position, and values of the slots in use by any row, (B, Hkv, N, e), and which of
        them are a row's, "there" (B, N)."""
        count = state["count"]
        filled = (count * self.config.num_tokens).clamp_max(self.slots)
        used = int(filled.max())
        reads = {"there": torch.arange(used, device=count.device) >= used - filled[:, None]}
        for layer in self.layers:
            for name in (f"{layer}/keys", f"{layer}/values"):
                reads[name] = state[name][:, self.slots - used :].transpose(1, 2)
        return reads

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        if step.writing:
            rows, _, width, _ = call.query.shape
            seen = self.covered(width - self.config.num_tokens, step.host.span(step.layer))
            return call.plain(mask=seen.to(call.query.device).expand(rows, 1, -1, -1))
        layer, there = step.layer, step.read("there")
        used = there.shape[1]
        if not used:
            return call.plain()
        keys, values = (step.read(f"{layer}/{name}").to(call.keys.dtype) for name in ("keys", "values"))
        turned = step.host.rotary(torch.arange(-used, 0, device=there.device)[None] + step.first, layer)
        keys = keys if turned is None else rotate(keys, *turned)
        return call.after(keys, values, there, step)


class Adapters(nn.Module):
    """Low-rank additions to some projections of every attention: x -> alpha / r x A B, with B zero at first.

    parts: first letters of the projections, among "q", "k" and "v". A layer that makes all three is adapted as a whole.
    """

    def __init__(self, host: HostSpec, config: UIOLLMsConfig, parts: str):
        super().__init__()
        self.scale = config.alpha / config.rank
        sizes = {name.replace(".", "-"): host.linears[name] for name in projections(host, parts)}
        layers, make = host.num_layers, {"dtype": host.dtype, "device": host.device}
        # Parameter names cannot hold dots.
        self.down = nn.ParameterDict(
            {
                n: nn.Parameter(torch.randn(layers, wide, config.rank, **make) * wide**-0.5)
                for n, (wide, _) in sizes.items()
            }
        )
        self.up = nn.ParameterDict(
            {n: nn.Parameter(torch.zeros(layers, config.rank, wide, **make)) for n, (_, wide) in sizes.items()}
        )

    def forward(self, x: Tensor, name: str, layer: int) -> Tensor | float:
        """What is added to the output of the linear layer `name`."""
        name = name.replace(".", "-")
        if name not in self.down:
            return 0.0
        return x @ self.down[name][layer] @ (self.scale * self.up[name][layer])


def projections(host: HostSpec, parts: Iterable[str]) -> list[str]:
    """Names of the linear layers that make `parts` of queries, keys and values in an attention of this host.

    Raises:
        HostError: there are none for a part.
    """
    inside = [name for name in host.linears if "att" in name.split(".")[0]]
    joint = (host.num_heads + 2 * host.num_key_value_heads) * host.head_dim
    whole = [name for name in inside if host.linears[name][1] == joint]
    found = [whole or [n for n in inside if n.split(".")[-1].startswith(part)] for part in parts]
    if not all(found):
        raise HostError(
            "uio-llms: this host has no linear layers for queries, keys and values in its attention (it has "
            f"{', '.join(host.linears)}); use a host such as Llama or GPT-2."
        )
    return list(dict.fromkeys(name for names in found for name in names))
