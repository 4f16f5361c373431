"""Titans: Learning to Memorize at Test Time (2024, arXiv 2501.00663).

The weights of a small network are the memory: every token takes a step of gradient descent with momentum and decay on
|M(k) - v|^2, in training and at inference alike (`_neural_memory`, ops.fast_weights). With x the attention's input, P
learned persistent tokens, one set a block, four forms:

    lmm   y = M([P ; x])                               in place of attention, or beside it
    mac   h_j = M(x_j; W at the last commit);  y = Attn([P ; h ; x]) within the segment;  W_t writes y_t;
          o_t = y_t * gate(M(y_t; W_t))
    mag   y = SWA([P ; x]);  o = silu(u1 * RMSNorm(y)) * silu(u2 * RMSNorm(M([P ; x])))
    mal   y = x + M([P ; x]);  o = SWA(y)

Decisions, where the paper is silent or its form cannot be used:
- Causality of mac: the paper reads the weights after the whole segment and lets every token see all of h, which tells
  the future. Token i sees h_j for j <= i (wherever its layer sees token j) and reads W_i. The paper's form fits
  encoders only and is left out: hosts are decoders.
- gate(m) = 2 sigmoid(g * RMSNorm(m)), g = 1 from scratch: a plain product would throw the sign of y away.
- `identity_start` (preset "attach"): g = 0, for mag in place of its product; W_O = 0 for lmm and mal; and P and h join
  the attention as plain + c (joint - plain), c = 0 for each head. Each starts exactly as the host and has gradients.
- SWA is the host's own attention over the last `segment` tokens of the stream, without borders (mag, mal). lmm and
  mac keep the host's segments; their memory runs on across them.
- P is the beginning of the stream for the memory (lmm, mag, mal: the first state has read P, which takes chunks of its
  own) and a set of keys and values in sight of every token for attention. There it has no position: its scores are
  taken with queries and keys free of rotation, since any fixed place would drift away in an endless stream. h_j
  stands at the place of token j. For mal, attention sees what the memory makes of P.
- mac writes y / rms(y): attention outputs have any size.
- W_0 is learned, momentum runs across chunks, alpha decays to zero (`decay_to_init`: to W_0).
- The chunk is part of the model: gradients are taken at the weights of its start. It is saved with the config, and
  streams made with another are refused.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import AttentionCall, Host, Step
from ...ops.attention import repeat_heads
from ...ops.fast_weights import Rule
from ...ops.rotary import rotate
from ._neural_memory import Named, NeuralMemory

METHODS = {
    "lmm/replace": {"mixer"},
    "lmm/side": {"residual"},
    "mac": {"before_attention", "attention", "residual", "commit"},
    "mag": {"attention", "residual"},
    "mal": {"before_attention", "attention"},
}
"""What each form takes part in."""


@dataclass(frozen=True, kw_only=True)
class TitansConfig(MemoryConfig):
    name = "titans"
    presets = {"attach": {"identity_start": True, "place": "side"}}

    form: Literal["lmm", "mac", "mag", "mal"] = option(
        "mac", "memory alone, as context, as a gate beside sliding-window attention, or as a layer before it"
    )
    place: Literal["replace", "side"] = option("replace", "lmm only: in place of the blocks' attention, or beside it")
    memory_layers: int | tuple | None = option(
        None, "blocks with memory: a list, the first so many, or None for all", minimum=0
    )
    chunk: int = option(64, "tokens b that share the weights at which their gradients are taken", minimum=1)
    head_dim: int = option(64, "width of a head; must divide the host's width", minimum=1)
    depth: int = option(2, "layers of the memory network; 1 is a matrix", minimum=1)
    expansion: int = option(2, "width of its hidden layers, in widths of a head", minimum=1)
    num_persistent: int = option(16, "persistent tokens P of a block", minimum=0)
    momentum: bool = option(True, "carry a momentum; without, eta is 0")
    theta_max: float = option(1.0, "largest learning rate of a token", minimum=0)
    decay_to_init: bool = option(False, "forgetting pulls to the learned first weights instead of to zero")
    max_norm: float | None = option(1.0, "soft bound of a token's gradient norm, or None", minimum=0)
    loss_reduction: Literal["half_sum", "sum", "mean"] = option(
        "half_sum", "|M(k) - v|^2 halved, as it is, or its mean over channels"
    )
    identity_start: bool = option(False, "the host is unchanged at first")

    def validate(self) -> None:
        if self.max_norm == 0:
            raise ConfigError("titans: max_norm = 0 would let nothing be written; give a positive number or None.")
        if self.form == "lmm" and self.place == "replace" and self.identity_start:
            raise ConfigError(
                "titans: a memory in place of attention cannot start as the host; give place='side', or "
                "preset='default' to replace attention from scratch."
            )


class Titans(Memory):
    name = "titans"
    config_class = TitansConfig
    paper = "Titans: Learning to Memorize at Test Time (2024, arXiv 2501.00663)"
    state_size = "L * (8 * expansion * d * head_dim + 12 * d)"
    config: TitansConfig

    def __init__(self, config: TitansConfig, host: HostSpec):
        super().__init__(config, host)
        width = host.hidden_size
        if width % config.head_dim:
            raise ConfigError(f"titans: head_dim = {config.head_dim} does not divide the host's width {width}.")
        self.continuous = config.form in ("mag", "mal")
        self.methods = METHODS[f"lmm/{config.place}" if config.form == "lmm" else config.form]
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        start, blocks = config.identity_start, len(self.layers)
        rule = Rule(chunk=config.chunk, loss=config.loss_reduction, max_norm=config.max_norm)
        factory = {"dtype": host.dtype, "device": host.device}
        self.memories = nn.ModuleList(
            NeuralMemory(
                width, config.head_dim, config.depth, config.expansion, rule, theta_max=config.theta_max,
                momentum=config.momentum, decay_to_init=config.decay_to_init,
                closed=start and config.form in ("lmm", "mal"), dtype=host.dtype, device=host.device,
            )
            for _ in self.layers
        )  # fmt: skip
        learned = lambda value, *shape: nn.Parameter(torch.full((blocks, *shape), value, **factory))  # noqa: E731
        count = config.num_persistent
        self.persistent = nn.Parameter(torch.randn(blocks, count, width, **factory) * 0.02) if count else None
        columns = config.form == "mac" or (config.form != "lmm" and count)
        self.columns = learned(0.0, host.num_heads) if start and columns else None
        products = config.form == "mag" and not start
        self.scale = learned(float(not start), width) if config.form in ("mac", "mag") else None
        self.scale_attention = learned(1.0, width) if products else None

    def uses(self, method: str) -> bool:
        return method in self.methods if any(method in all for all in METHODS.values()) else super().uses(method)

    @property
    def layers(self) -> tuple[int, ...]:
        chosen, total = self.config.memory_layers, self.host.num_layers
        layers = tuple(range(total if chosen is None else chosen)) if not isinstance(chosen, tuple) else chosen
        if any(not isinstance(i, int) or not 0 <= i < total for i in layers) or sorted(set(layers)) != list(layers):
            raise ConfigError(f"titans: memory_layers = {chosen!r}, expected increasing block numbers below {total}.")
        return layers

    @property
    def identity_at_attach(self) -> bool:
        return self.config.identity_start or not self.layers

    def window(self, segment: int) -> int:
        return segment

    # State

    def initial_state(self, batch_size: int) -> State:
        named: Named = {}
        for layer, memory in self._parts():
            mac = self.config.form == "mac"
            own = memory.initial(None if mac else self._prefix(layer))
            if mac:
                own |= {f"r{i}": own[f"w{i}"] for i in self._depth}
                own["x_tail"] = own["tail"][:, :, : self.host.hidden_size]
            named |= {f"{layer}/{name}": t.expand(batch_size, *t.shape[1:]) for name, t in own.items()}
        return State(named)

    def prepare(self, state: State, host: Host) -> dict[str, Tensor]:
        """Keys, free of position, and values of P for each block: (B, key-value heads, N, e)."""
        if self.persistent is None or self.config.form == "lmm":
            return {}
        made, batch = {}, state.batch_size or 1
        for layer, memory in self._parts():
            prefix = self.persistent[self._index[layer]][None]
            if self.config.form == "mal":
                prefix = prefix + memory.write(prefix, memory.initial(), None)[0]
            for name, columns in zip(("keys", "values"), host.project(prefix, layer), strict=True):
                made[f"{name}{layer}"] = columns.expand(batch, -1, -1, -1)
        return made

    def commit(self, state: State, segment: Segment) -> State:
        """mac: what the next segment's h is read from."""
        if self.config.form != "mac":
            return state
        read = {f"{layer}/r{i}": state[f"{layer}/w{i}"] for layer in self.layers for i in self._depth}
        return State({**state, **read})

    # Sites

    def mixer(self, x: Tensor, step: Step) -> Tensor:
        return self._write(x, step)

    def before_attention(self, x: Tensor, step: Step) -> Tensor:
        if self.config.form == "mal":
            return x + self._write(x, step)
        weights = tuple(step.running(f"r{i}") for i in self._depth)
        h, tail = self._memory(step.layer).read(x, weights, step.running("x_tail"), step.real)
        step.leave(x_tail=tail)
        keys, values = step.host.project(h, step.layer)
        step.add_note(keys=keys, values=values)
        return x

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        """Joint attention over P, h (mac) and the host's own columns."""
        free = None
        if self.persistent is not None:
            free = step.read(f"keys{step.layer}"), step.read(f"values{step.layer}")
        recalled = self._recalled(call, step) if self.config.form == "mac" else None
        if free is None and recalled is None:
            return call.plain()
        joint = _joint(call, free, recalled)
        if self.columns is None:
            return joint
        plain = call.plain()
        return plain + self.columns[self._index[step.layer]][:, None] * (joint - plain)

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        if self.config.form == "lmm":
            return x + self._write(source, step)
        assert self.scale is not None
        i, width = self._index[step.layer], (x.shape[-1],)
        inputs = F.rms_norm(x, width) if self.config.form == "mac" else source
        gate = F.rms_norm(self._write(inputs, step), width) * self.scale[i]
        if self.scale_attention is None:
            return x * (2 * gate.sigmoid())
        return F.silu(F.rms_norm(x, width) * self.scale_attention[i]) * F.silu(gate)

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block, means over rows and heads: norms of the weights, of their way from the first, of the momentum."""
        found = {}
        for layer, memory in self._parts():
            weights, momentum = ([state[f"{layer}/{letter}{i}"] for i in self._depth] for letter in "ws")
            way = [w - first for w, first in zip(weights, memory.first_weights(), strict=True)]
            for name, tensors in {"weights": weights, "moved": way, "momentum": momentum}.items():
                squares = torch.stack([t.detach().square().sum((-2, -1)) for t in tensors])
                found[f"block{layer}/{name}"] = squares.sum(0).sqrt().mean()
        return found

    # Inside

    @property
    def _depth(self) -> range:
        return range(1, self.config.depth + 1)

    def _memory(self, layer: int) -> NeuralMemory:
        return cast(NeuralMemory, self.memories[self._index[layer]])

    def _parts(self) -> list[tuple[int, NeuralMemory]]:
        return [(layer, self._memory(layer)) for layer in self.layers]

    def _prefix(self, layer: int) -> Tensor | None:
        return None if self.persistent is None else self.persistent[self._index[layer]]

    def _write(self, x: Tensor, step: Step) -> Tensor:
        names = [f"{letter}{i}" for letter in "wsc" for i in self._depth] + ["n", "tail"]
        m, after = self._memory(step.layer).write(x, {name: step.running(name) for name in names}, step.real)
        step.leave(**after)
        return m

    def _recalled(self, call: AttentionCall, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values of h for all visible tokens, in the order of the host's columns."""
        keys, values = (step.note(name, step.layer) for name in ("keys", "values"))
        assert keys is not None
        assert values is not None
        if call.rotation is not None:
            keys = rotate(keys, *call.rotation)
        kept = (step.features(n, t.transpose(1, 2)) for n, t in (("keys", keys), ("values", values)))
        keys, values = (t.transpose(1, 2) for t in kept)
        return keys, values


Columns = tuple[Tensor, Tensor]
"""Keys and values, (B, key-value heads, n, e)."""


def _joint(call: AttentionCall, free: Columns | None, recalled: Columns | None) -> Tensor:
    """One softmax over free columns, which all see, recalled ones, where the host's own are seen, and these.

    Keys free of position meet the query free of position: their scores s go with the query as more of its width, where
    free key n is the n-th unit vector and all others are zero.
    """
    query, mask = call.query, call.bool_mask()
    keys, values, masks = [call.keys], [call.values], [mask]
    if recalled is not None:
        keys, values, masks = [recalled[0], *keys], [recalled[1], *values], [mask, *masks]
    width, more = values[0].shape[-1], 0
    if free is not None:
        free_keys, count = free[0], free[0].shape[2]
        if call.rotation is not None:
            more = count
            scores = call.free_query() @ repeat_heads(free_keys, query.shape[1]).mT
            query = torch.cat([query, scores.to(query.dtype)], dim=-1)
            free_keys = torch.cat(
                [torch.zeros_like(free_keys), torch.eye(count).to(free_keys).expand(*free_keys.shape[:2], -1, -1)], -1
            )
        keys, values = [free_keys, *(F.pad(k, (0, more)) for k in keys)], [free[1], *values]
        masks = [mask.new_ones(()).expand(*mask.shape[:3], count), *masks]
    # The fused kernels want values as wide as keys.
    joined = F.pad(torch.cat(values, dim=2), (0, more))
    out = call.plain(query=query, keys=torch.cat(keys, dim=2), values=joined, mask=torch.cat(masks, dim=3))
    return out[..., :width]
