"""Memory Transformer (2020, arXiv 2006.11527; Burtsev, Kuratov, Peganov, Sapunov).

m learned vectors x_m stand among the text x_s of a segment: slots that every later token may attend to. Nothing is
carried from segment to segment. One layer, with block(q; k) = FFN(q + Attn(q; k)), norms as the host has them:

    plain        [x_m ; x_s] <- block_s([x_m ; x_s]; [x_m ; x_s])
    controller   x_m <- block_m(x_m; [x_m ; x_s]),   then  x_s <- block_s(x_s; [x_m ; x_s])
    bottleneck   x_m <- block_m(x_m; [x_m ; x_s]),   then  x_s <- block_s(x_s; x_m)

block_s is the host's block, block_m one of the same form with weights of its own.

Decisions:
- A causal decoder. In front of the text (`every` unset) memory sees no token: it is a learned constant of each layer.
  With `every` = k a group of m stands before text tokens k, 2k, ...: it sees the text before it and the earlier groups,
  and all text behind sees it. Every group starts from the same vectors; its members see each other both ways.
- Memory is updated before the text (`order`), which then sees the new one; "parallel" lets both see the old one.
- The controller's weights are the host's plus a learned difference for every linear layer, zero at first; norms and
  biases are shared. `share_controller` leaves the difference out: block_m is block_s.
- The bottleneck lets text tokens attend to memory only, not to themselves, as printed; the residual stream carries
  each token. With `every` a group also stands in front, so that the first tokens have something to read. It makes the
  masks that it needs, so nothing has T x T entries; with the number of groups fixed, the cost is linear in T.
- A memory token has the position of the text token behind it, so text keeps its positions whatever m is;
  `shift_positions` gives memory tokens positions of their own, as prepending them to the input does.
- controller and bottleneck run each block twice where memory tokens take part: for memory, then for text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Site, option
from ...core.state import State
from ...core.step import AttentionCall, Step


@dataclass(frozen=True, kw_only=True)
class MemoryTransformerConfig(MemoryConfig):
    name = "memory-transformer"

    num_tokens: int = option(10, "memory tokens m of a group", minimum=0)
    every: int | None = option(
        None, "text tokens k between groups within a segment; None for one group in front", minimum=1
    )
    variant: Literal["plain", "controller", "bottleneck"] = option(
        "plain", "ordinary tokens; weights of their own; or these and the only thing that text attends to"
    )
    order: Literal["memory_first", "parallel"] = option(
        "memory_first", "text sees the memory that its layer has updated, or the one that entered the layer"
    )
    share_controller: bool = option(False, "update memory with the host's weights, not with others")
    shift_positions: bool = option(False, "memory tokens take positions, as if they were prepended to the text")


class MemoryTransformer(Memory):
    name = "memory-transformer"
    config_class = MemoryTransformerConfig
    paper = "Memory Transformer (2020, arXiv 2006.11527)"
    state_size = "0"
    bidirectional_tokens = True
    config: MemoryTransformerConfig

    def __init__(self, config: MemoryTransformerConfig, host: HostSpec):
        super().__init__(config, host)
        m, factory = config.num_tokens, {"dtype": host.dtype, "device": host.device}
        self.makes_masks = self.bottleneck
        self.shifting_tokens = config.shift_positions
        if config.every is None or self.bottleneck:
            self.num_read_tokens = m
        if config.every is not None:
            self.num_inner_tokens, self.inner_every = m, config.every
        self.first_tokens = nn.Parameter(torch.randn(m, host.hidden_size, **factory) * host.embedding_std)
        own = self.controlled and not config.share_controller
        self.difference = nn.ParameterDict(
            {
                # Parameter names cannot hold dots.
                name.replace(".", "-"): nn.Parameter(torch.zeros(host.num_layers, *shape, **factory))
                for name, shape in (host.linears.items() if own else ())
            }
        )

    @property
    def controlled(self) -> bool:
        """Memory is updated apart from the text."""
        return self.config.variant != "plain" and self.config.num_tokens > 0

    @property
    def bottleneck(self) -> bool:
        return self.config.variant == "bottleneck" and self.config.num_tokens > 0

    def uses(self, method: str) -> bool:
        apart = ("around_block", "before_attention", "attention", "linear")
        return super().uses(method) and (self.controlled or method not in apart)

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        return frozenset(("attention", layer) for layer in self.layers) if self.bottleneck else frozenset()

    @property
    def identity_at_attach(self) -> bool:
        return self.config.num_tokens == 0

    @property
    def limits(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.controlled and self.config.order == "parallel":
            return {"gradients to every parameter": "nothing reads what the last layer makes of memory"}
        return {}

    def commit_every(self, segment: int) -> int:
        every = self.config.every
        if every is not None and every >= segment:
            raise ConfigError(
                f"memory-transformer: every = {every}, expected less than the segment of {segment} tokens, or no "
                "memory stands in it; leave every unset for memory in front of the text."
            )
        return segment

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        first = self.first_tokens[None]
        return first[:, : self.num_read_tokens], first[:, :0]

    def inner_tokens(self, state: State) -> Tensor:
        return self.first_tokens[None]

    def around_block(self, x: Tensor, run: Callable[..., Tensor], step: Step) -> Tensor:
        if not step.num_read and not step.num_inner:
            return run(x)
        memory = run(x, writing=True)
        text = run(self._joined(memory, x, step) if self.config.order == "memory_first" else x)
        return self._joined(memory, text, step)

    def linear(self, x: Tensor, out: Tensor, name: str, step: Step) -> Tensor:
        if not step.writing or (name := name.replace(".", "-")) not in self.difference:
            return out
        return out + x @ self.difference[name][step.layer]

    def before_attention(self, x: Tensor, step: Step) -> Tensor:
        # What later groups see of these tokens is what entered the layer, not what the second run makes of memory.
        if step.writing or not (step.num_read or step.num_inner):
            step.add_note(inputs=step.features("inputs", x))
        return x

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        if not step.writing and not self.bottleneck:
            return call.plain()
        tokens = torch.arange(call.query.shape[2], device=call.query.device)
        text = step.text(tokens[None])[0]
        if step.writing:
            # Read tokens stand before the text, inner ones behind it.
            queries, among = torch.cat([tokens[: step.num_read], tokens[step.num_read + len(text) :]]), None
            inputs = step.note("inputs", step.layer)
            assert inputs is not None
            keys, values = step.host.project(inputs, step.layer, step.key_positions())
        else:
            queries, among = text, step.memory_keys()
            keys, values = call.keys[:, :, among], call.values[:, :, among]
        seen = step.visible(queries, among).expand(len(call.query), -1, -1, -1)
        part = call.plain(query=call.query[:, :, queries], keys=keys, values=values, mask=seen)
        out = part.new_zeros(len(part), len(tokens), *part.shape[2:])
        return out.index_copy(1, queries, part)

    def _joined(self, memory: Tensor, text: Tensor, step: Step) -> Tensor:
        """Memory tokens of one (B, T, d), text tokens of another."""
        last = text.shape[1] - step.num_inner
        return torch.cat([memory[:, : step.num_read], step.text(text), memory[:, last:]], dim=1)
