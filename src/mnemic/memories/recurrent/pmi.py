"""PMI: A Neural Module for Inference Inspired by Human Memory Mechanisms (2023, arXiv 2310.09297).

N slots of working memory and C banks of a slower long-term memory, written by the tokens that each slot's attention
likes best; tokens read both, and the reading of the long-term memory looks at that of the working memory to correct
itself. The equations are in ops/perception_memory.py. Beside the attention of each block, of its input x:

    X = x W_in + b;   residual stream += g * O(X; working, long-term)                g = 0 at first
    at the end of a segment:   working, long-term <- write(X of the segment; working, long-term)

In the paper the block stands in the place of self-attention in an encoder: write, then read, over all tokens. As a
memory of a language model, and why:

- Tokens read the memory as it was before their segment; the segment writes when it is complete. A write pools over all
  of its tokens, so reading it inside the segment would show the future. The host's own attention mixes tokens there.
- The correction A(L; R) attends from tokens to tokens. Here a token sees the readings of earlier tokens of its segment
  and its own: in the paper's form later ones would leak.
- `memory_scope`: in the paper one state flows through the layers of one forward pass and is then thrown away, so that
  its forget gates (0.73 each at the start) act once a layer. Carried over segments it would keep 0.73^L of a slot, of
  16 layers less than a hundredth; so each block has a state of its own. "shared" is the one bank, written by the
  blocks in order at the end of a segment.
- `shared_weights`: one set of weights for all blocks, as in the paper. The gate g is each block's, a number a channel.
- The first long-term memory is drawn once, from [0, 1), and kept with the weights; the authors' code draws a new one
  for every batch, so that one text could be answered in two ways.
- LN3 makes the rows of the long-term memory sum to zero, and a write multiplies by that sum: until its weights have
  learned otherwise, only the first segment writes to it. `diagnostics` has the sum.
- Top-k keeps weights as they are: rows sum to less than 1. With fewer tokens or slots than k all are kept.
- mixing = 0 is the paper's ablation without the working memory's own reading; num_banks = 0 that without a long-term
  memory, which leaves a shared workspace; correction = False that without correction.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, option
from ...core.state import State
from ...core.step import Host, Step
from ...ops.perception_memory import PerceptionMemory


@dataclass(frozen=True, kw_only=True)
class PMIConfig(MemoryConfig):
    name = "pmi"

    num_slots: int = option(8, "slots N of the working memory, and of each bank of the long-term memory", minimum=1)
    num_banks: int = option(5, "banks C of the long-term memory; 0 for none", minimum=0)
    num_heads: int = option(8, "heads of all attentions; must divide the host's width", minimum=1)
    top_k: int = option(5, "tokens that a slot takes in, and long-term slots that a token reads", minimum=1)
    mixing: float = option(
        0.7, "share of the working memory's reading; the rest is the long-term memory's", minimum=0, maximum=1
    )
    correction: bool = option(True, "the long-term reading attends to the working memory's readings")
    memory_scope: Literal["shared", "per_layer"] = option("per_layer", "one state for all blocks, or one for each")
    shared_weights: bool = option(True, "all blocks have the same weights")
    memory_layers: tuple | None = option(None, "blocks with memory, or None for all")


class PMI(Memory):
    name = "pmi"
    config_class = PMIConfig
    paper = (
        "Understanding AI Cognition: A Neural Module for Inference Inspired by Human Memory Mechanisms (2023, arXiv "
        "2310.09297)"
    )
    state_size = "L * (1 + num_banks) * num_slots * d"
    config: PMIConfig

    def __init__(self, config: PMIConfig, host: HostSpec):
        super().__init__(config, host)
        width, factory = host.hidden_size, {"dtype": host.dtype, "device": host.device}
        if width % config.num_heads:
            raise ConfigError(f"pmi: num_heads = {config.num_heads} does not divide the host's width {width}.")
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        self.blocks = nn.ModuleList(
            PerceptionMemory(
                width,
                num_slots=config.num_slots,
                num_banks=config.num_banks,
                num_heads=config.num_heads,
                top_k=config.top_k,
                mixing=config.mixing,
                correction=config.correction,
                **factory,
            )
            for _ in range(1 if config.shared_weights else len(self.layers))
        )
        self.gate = nn.Parameter(torch.zeros(len(self.layers), width, **factory))
        working, long_term = self._block(0).first(self.num_states)
        self.register_buffer("first_working", working.clone())
        self.register_buffer("first_long_term", None if long_term is None else long_term.clone())

    @property
    def num_states(self) -> int:
        return 1 if self.config.memory_scope == "shared" else len(self.layers)

    @property
    def layers(self) -> tuple[int, ...]:
        chosen, total = self.config.memory_layers, self.host.num_layers
        layers = tuple(range(total)) if chosen is None else chosen
        fits = all(type(i) is int and 0 <= i < total for i in layers)
        if not layers or not fits or sorted(set(layers)) != list(layers):
            raise ConfigError(f"pmi: memory_layers = {chosen!r}, expected increasing block numbers below {total}.")
        return layers

    @property
    def identity_at_attach(self) -> bool:
        return True

    def initial_state(self, batch_size: int) -> State:
        """ "working" (B, S, N, d) and, with banks, "long_term" (B, S, C, N, d), S states."""
        first = {"working": self.first_working, "long_term": self.first_long_term}
        # Buffers: mixed precision casts parameters only.
        return State(
            {
                name: t.to(self.gate.dtype).expand(batch_size, *t.shape)
                for name, t in first.items()
                if isinstance(t, Tensor)
            }
        )

    def prepare(self, state: State, host: Host | None = None) -> dict[str, Tensor]:
        """Keys and values of both memories' slots, by block: "<block>/<memory>_keys" and "_values", (B, H, N, e)."""
        slots = {"working": state["working"].unbind(1)}
        if "long_term" in state:
            slots["long_term"] = state["long_term"].mean(2).unbind(1)
        found: dict[str, Tensor] = {}
        for layer, i in self._index.items():
            for name, states in slots.items():
                keys, values = self._block(i).keys_values(states[i if len(states) > 1 else 0])
                found.update({f"{layer}/{name}_keys": keys, f"{layer}/{name}_values": values})
        return found

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        i, layer = self._index[step.layer], step.layer
        block = self._block(i)
        tokens = block.input(source)
        step.keep(tokens=tokens)
        read = lambda name: (step.read(f"{layer}/{name}_keys"), step.read(f"{layer}/{name}_values"))  # noqa: E731
        fast, slow = block.readings(tokens, read("working"), read("long_term") if self.config.num_banks else None)
        others, seen = (fast, fast), None
        if slow is not None and self.config.correction:
            keys = step.features("keys", block.key(fast))
            others = block.heads(keys), block.heads(step.features("values", block.value(fast)))
            seen = _earlier(step)
        return x + self.gate[i] * block.joined(fast, slow, others, seen)

    def commit(self, state: State, segment: Segment) -> State:
        working, long_term = state["working"], state.get("long_term")
        tokens = [segment.trace[layer]["tokens"] for layer in self.layers]
        if self.config.memory_scope == "shared":
            fast, slow = working[:, 0], None if long_term is None else long_term[:, 0]
            for i, written in enumerate(tokens):
                fast, slow = self._block(i).write(written, fast, slow)
            working, long_term = fast[:, None], None if slow is None else slow[:, None]
        elif self.config.shared_weights:
            rows = len(working)
            # One write for all blocks: their states stand side by side as rows do.
            slow = None if long_term is None else long_term.flatten(0, 1)
            fast, slow = self._block(0).write(torch.stack(tokens, dim=1).flatten(0, 1), working.flatten(0, 1), slow)
            working, long_term = fast.unflatten(0, (rows, -1)), None if slow is None else slow.unflatten(0, (rows, -1))
        else:
            slow = [None] * len(tokens) if long_term is None else long_term.unbind(1)
            made = [
                self._block(i).write(*given)
                for i, given in enumerate(zip(tokens, working.unbind(1), slow, strict=True))
            ]
            working = torch.stack([fast for fast, _ in made], dim=1)
            long_term = None if long_term is None else torch.stack([s for _, s in made if s is not None], dim=1)
        return State({"working": working, **({} if long_term is None else {"long_term": long_term})})

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block: size of the output gate, means of the input and forget gates, and how far the long-term memory's
        rows sum from zero."""
        found: dict[str, Tensor] = {}
        for layer, i in self._index.items():
            at = i if self.num_states > 1 else 0
            put, keep = self._block(i).gates(segment.trace[layer]["tokens"], state["working"][:, at])
            block = {"gate_out": self.gate[i].abs(), "gate_in": put, "gate_forget": keep}
            if "long_term" in state:
                block["long_term_sum"] = state["long_term"][:, at].sum(-1).abs()
            found.update({f"block{layer}/{name}": value.detach().float().mean() for name, value in block.items()})
        return found

    def _block(self, i: int) -> PerceptionMemory:
        block = self.blocks[0 if self.config.shared_weights else i]
        assert isinstance(block, PerceptionMemory)
        return block


def _earlier(step: Step) -> Tensor:
    """(B or 1, 1, T, K) bool: text tokens see those of their segment up to themselves; memory tokens see nothing."""
    keys = step.places if step.frame.key_places is None else step.frame.key_places
    seen = (keys[:, None] <= step.places[:, :, None]) & (keys >= 0)[:, None]
    return seen[:, None]
