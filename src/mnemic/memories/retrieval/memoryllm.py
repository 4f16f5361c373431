"""MemoryLLM: Towards Self-Updatable Large Language Models (2024, arXiv 2402.04624, ICML 2024).

Every layer owns a pool of N = blocks * K hidden states, read as a prefix of its attention. A segment is injected by
running it a second time with the last K states, and storing K outputs in place of K random old states. For layer l with
input h_l, pool theta_l and a learned state bos_l:

    read     keys and values of norm([bos_l ; theta_l]) stand before those of norm(h_l), at positions 0 .. N; text from
             N + 1 on; all of it visible to every token
    inject   the same with [bos_l ; last K of theta_l] at 0 .. K and text from K + 1 on; before each layer a learned
             vector p is added to the last K tokens;  delta_l = the layer's output at the last K tokens
    write    theta_l <- [N - K random entries of theta_l, in order ; delta_l];  an empty pool: delta_l, N / K times

A state survives t injections with probability (1 - K/N)^t. Low-rank adapters on the linear layers tell injecting
("encoder") from reading ("decoder").

Decisions:
- One injection is one complete segment, so a segment must have at least K tokens (then only text tokens are queries)
  and `min_chunk` tokens: shorter chunks are refused at attaching, not padded.
- Which states are dropped is a hash of (seed, injections so far, layer, entry), so streams, training calls, reloaded
  files and rows at different places drop alike. The seed is part of the state: that of the options, or in training one
  drawn for each row (`redraw`): with one for all, a model learns which entries are safe (measured: recall of 1.0 where
  the law allows 0.78).
- delta_l is an output of layer l that is read at its input, as in the authors' code.
- An empty pool is masked. With `bos` off (preset "attach") the first segment is then exactly the host's; later segments
  read the pool, which no host has learned, so no setting starts as the identity.
- bos_l stands for the tokenizer's BOS: feed text without one.
- Gradients flow through every state that is kept; the authors cut all but the newest K, which is Truncation("tail", 1).
- The prefix stays in sight of layers with a sliding window, which limits the text only.
- Hosts with a table of positions (GPT-2) add none to the pool: its states carry those of their own segment.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import AttentionCall, Host, Step
from ...ops.attention import with_columns


@dataclass(frozen=True, kw_only=True)
class MemoryLLMConfig(MemoryConfig):
    name = "memoryllm"
    presets = {
        "attach": {"bos": False},
        "7b": {"new_states": 256, "blocks": 30},
        "8b": {"new_states": 256, "blocks": 50},
    }

    new_states: int = option(64, "states K that an injection adds to each layer; at most a segment", minimum=1)
    blocks: int = option(16, "size of a pool in injections: N = blocks * new_states", minimum=1)
    min_chunk: int = option(16, "shortest segment that may be injected", minimum=1)
    rank: int = option(8, "rank of the adapters, 0 for none", minimum=0)
    alpha: float = option(32.0, "scale of the adapters times their rank")
    dropout: float = option(0.1, "dropout before the adapters", minimum=0, maximum=1)
    bos: bool = option(True, "a learned state of each layer in front of the pool")
    drop_per_layer: bool = option(True, "each layer drops states of its own, or all the same ones")
    seed: int = option(0, "of the dropping", minimum=0, maximum=2**31 - 1)
    redraw: bool = option(True, "in training every new row drops by a seed of its own, from torch's random numbers")


def survivors(
    count: Tensor, layers: int, size: int, new: int, seed: int | Tensor = 0, per_layer: bool = True
) -> Tensor:
    """The entries of a full pool that an injection keeps, in order.

    Args:
        count: (B,) int64, injections so far. layers: L. size: N. new: K, how many are dropped. seed: one, or (B,).

    Returns: (B, L, N - K) int64, increasing. A function of (seed, count) alone, so equal counts give equal rows.
    """
    key = _mixed(torch.zeros_like(count) + seed & _LOW)
    key = _mixed(key ^ (count & _LOW))[:, None]
    layer = torch.arange(layers, device=count.device) if per_layer else count.new_zeros(layers)
    key = _mixed(key ^ layer)[..., None]
    entry = torch.arange(size, device=count.device)
    # Two entries with one hash are told apart by their place.
    order = _mixed(key ^ entry) * size + entry
    return order.topk(size - new, sorted=False).indices.sort(-1).values


_LOW = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (int64) that spreads every bit; multipliers below 2^31 cannot overflow."""
    x = x + 0x1E3779B9 & _LOW
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D), (13, 0x5E2D58D9)):
        x = (x ^ (x >> shift)) * factor & _LOW
    return x ^ (x >> 16)


class Adapters(nn.Module):
    """Low-rank additions to the linear layers of all blocks: x -> alpha / r * dropout(x) A B, with B zero at first."""

    def __init__(self, host: HostSpec, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = alpha / rank, dropout
        make = {"dtype": host.dtype, "device": host.device}
        # Parameter names cannot hold dots.
        self.down = nn.ParameterDict(
            {
                name.replace(".", "-"): nn.Parameter(torch.randn(host.num_layers, wide, rank, **make) * wide**-0.5)
                for name, (wide, _) in host.linears.items()
            }
        )
        self.up = nn.ParameterDict(
            {
                name.replace(".", "-"): nn.Parameter(torch.zeros(host.num_layers, rank, wide, **make))
                for name, (_, wide) in host.linears.items()
            }
        )

    def forward(self, x: Tensor, name: str, layer: int, training: bool) -> Tensor | None:
        """What is added to the output of the linear layer `name`; None for one that has no adapter."""
        name = name.replace(".", "-")
        if name not in self.down:
            return None
        if training:
            x = F.dropout(x, self.dropout)
        return x @ self.down[name][layer] @ (self.scale * self.up[name][layer])


class MemoryLLM(Memory):
    name = "memoryllm"
    config_class = MemoryLLMConfig
    paper = "MEMORYLLM: Towards Self-Updatable Large Language Models (2024, arXiv 2402.04624)"
    state_size = "L * blocks * new_states * d"
    write_pass = True
    config: MemoryLLMConfig

    def __init__(self, config: MemoryLLMConfig, host: HostSpec):
        super().__init__(config, host)
        make = {"dtype": host.dtype, "device": host.device}
        self.size = config.blocks * config.new_states
        self.new_position = nn.Parameter(torch.zeros(host.hidden_size, **make))
        first = torch.randn(host.num_layers, 1, host.hidden_size, **make) * host.embedding_std
        self.bos = nn.Parameter(first) if config.bos else None
        given = (host, config.rank, config.alpha, config.dropout)
        self.encoder = Adapters(*given) if config.rank else None
        self.decoder = Adapters(*given) if config.rank else None

    def commit_every(self, segment: int) -> int:
        least = max(self.config.new_states, self.config.min_chunk)
        if segment < least:
            raise ConfigError(
                f"memoryllm: a segment of {segment} tokens is shorter than the {self.config.new_states} states that it "
                f"leaves (new_states) or than min_chunk = {self.config.min_chunk}; use segment={least} or more, or "
                "lower these options."
            )
        return segment

    def first_position(self, writing: bool = False) -> int:
        return 1 + (self.config.new_states if writing else self.size)

    def initial_state(self, batch_size: int) -> State:
        like, c = self.new_position, self.config
        count = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        seed = torch.randint_like(count, 2**31) if self.training and c.redraw else torch.full_like(count, c.seed)
        pool = like.new_zeros(batch_size, self.host.num_layers, self.size, self.host.hidden_size)
        return State({"pool": pool, "count": count, "seed": seed})

    def prepare(self, state: State, host: Host) -> dict[str, Tensor]:
        """Keys and values of the prefix of every layer, and which of its columns there are."""
        reads = {"there": self._there(state["count"], self.size)}
        for layer in self.layers:
            reads[f"{layer}/keys"], reads[f"{layer}/values"] = self._prefix(state["pool"][:, layer], layer, host)
        return reads

    def before_layer(self, x: Tensor, step: Step) -> Tensor:
        if not step.writing:
            return x
        new = self.config.new_states
        return x + F.pad(self.new_position.expand(new, -1), (0, 0, x.shape[1] - new, 0))

    def after_layer(self, x: Tensor, step: Step) -> Tensor:
        if step.writing:
            step.keep(delta=x[:, -self.config.new_states :])
        return x

    def linear(self, x: Tensor, out: Tensor, name: str, step: Step) -> Tensor:
        adapters = self.encoder if step.writing else self.decoder
        added = None if adapters is None else adapters(x, name, step.layer, step.training)
        return out if added is None else out + added

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        if step.writing:
            last = step.state("pool")[:, step.layer, -self.config.new_states :]
            keys, values = self._prefix(last, step.layer, step.host)
            there = self._there(step.state("count"), self.config.new_states)
        else:
            keys, values, there = (step.read(n) for n in (f"{step.layer}/keys", f"{step.layer}/values", "there"))
        keys, values = keys.to(call.keys.dtype), values.to(call.values.dtype)
        there = there[:, None, None]
        if step.streaming and call.softcap is None and not step.training:
            return with_columns(
                call.query, call.keys, call.values, call.mask, keys, values, there, call.scale
            ).transpose(1, 2)
        text = call.bool_mask()
        there = there.expand(-1, -1, text.shape[2], -1)
        return call.plain(
            keys=torch.cat([keys, call.keys], dim=2),
            values=torch.cat([values, call.values], dim=2),
            mask=torch.cat([there, text.expand(len(there), -1, -1, -1)], dim=3),
        )

    def commit(self, state: State, segment: Segment) -> State:
        delta = torch.stack([segment.trace[layer]["delta"] for layer in self.layers], dim=1)
        pool, count, c = state["pool"], state["count"], self.config
        kept = survivors(count, len(self.layers), self.size, c.new_states, state["seed"], c.drop_per_layer)
        later = torch.cat([pool.gather(2, kept[..., None].expand(-1, -1, -1, pool.shape[3])), delta], dim=2)
        empty = (count == 0)[:, None, None, None]
        pool = torch.where(empty, delta.repeat(1, 1, c.blocks, 1), later)
        return State({"pool": pool, "count": count + 1, "seed": state["seed"]})

    def _prefix(self, states: Tensor, layer: int, host: Host) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, [1 +] N, e) of [bos ; states (B, N, d)], at positions 0 .. N."""
        places = torch.arange(states.shape[1] + 1, device=states.device)[None]
        if self.bos is None:
            places = places[:, 1:]
        else:
            states = torch.cat([self.bos[layer].expand(len(states), -1, -1).to(states.dtype), states], dim=1)
        return host.project(host.normalise(states, layer), layer, places)

    def _there(self, count: Tensor, size: int) -> Tensor:
        """Which columns of a prefix with so many states there are, (B, [1 +] size) bool."""
        there = (count > 0)[:, None].expand(-1, size)
        return there if self.bos is None else F.pad(there, (1, 0), value=True)
