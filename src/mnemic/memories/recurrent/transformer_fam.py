"""TransformerFAM: Feedback attention is working memory (2024, arXiv 2404.09173).

In every layer l, F feedback vectors f_l of the previous block (a segment) are key, query and residual of the next one.
For a block with inputs x of the layer, A the layer's attention, M past tokens' keys and values (P_k, P_v):

    z = norm([f ; x])           tokens    x <- x + A(z_x; [P ; z_f ; z_x causal])
                                feedback  r <- f + A(z_f; [z_f ; z_x])               r <- 0 + ... in the first block
    [x ; r] <- [x ; r] + ffn(norm([x ; r]))
    x goes to layer l + 1, r is f_l of the next block, the block's keys and values are pushed into P

The first f_l are what learned embeddings become on their way through the layers, seeing each other only: the inputs of
layer l. No other parameters. No gradient is stopped: how far it reaches back is the training's truncation.

Decisions:
- f_l is at once what layer l gave and what it reads next, by the layer's own norm and projections: each layer's loop is
  closed on itself. `feedback` "stack" is the variant that flows upwards (and RMT with another attention): F vectors
  enter below, what the last layer and the host's final norm make of them is carried.
- f stands in front of the text, where it is read, and behind it, where it is written: both in the one pass over the
  block, each as F tokens. In front it costs F tokens more than keys and values alone would, and the first block needs
  no pass of its own for the learned embeddings.
- Positions, on rotary hosts: f's keys stand at the last F positions before the block, its queries at the last F of the
  block. Only distances matter to these hosts, so the random offset of positions that the paper trains with is nothing.
  On hosts with a table of positions, f carries what the first block gave it, past keys the place in their own block.
- f sees its whole block, and tokens see f and P, also in layers whose own attention is limited to a window.
- `past` counts tokens: m blocks of T tokens are m T. Past keys are stored free of position.
- f grows: every block adds to it. `normalise` divides it by its root mean square where it is carried; the paper does
  not, and the recall toy is solved either way.
- `query` "static" is an ablation: learned queries (and residuals) for each layer in place of f, which stays among the
  keys. The paper reports that a static query fails; on the passkey toy it recalls as well as feedback.
- An open block changes nothing that is read later: f is written when the block is complete.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, Site, option
from ...core.state import State
from ...core.step import AttentionCall, Host, Step
from ...ops.attention import with_columns
from ...ops.rotary import rotate, unrotate


@dataclass(frozen=True, kw_only=True)
class TransformerFAMConfig(MemoryConfig):
    name = "transformer-fam"

    num_tokens: int = option(64, "feedback vectors F of a layer", minimum=0)
    past: int = option(1536, "tokens of earlier segments whose keys and values stay in sight", minimum=0)
    feedback: Literal["layer", "stack"] = option(
        "layer", "what a layer reads: what it gave itself in the last segment, or what comes up from the layer below"
    )
    query: Literal["feedback", "static"] = option(
        "feedback", "what asks for the next vectors: the last ones, or learned queries (an ablation)"
    )
    normalise: bool = option(False, "carry vectors of root mean square 1")

    def validate(self) -> None:
        if self.query == "static" and self.feedback == "stack":
            raise ConfigError("transformer-fam: query='static' has a query for each layer; use feedback='layer'.")


class TransformerFAM(Memory):
    name = "transformer-fam"
    config_class = TransformerFAMConfig
    paper = "TransformerFAM: Feedback attention is working memory (2024, arXiv 2404.09173)"
    state_size = "L * (num_tokens * d + 2 * past * Hkv * e)"
    bidirectional_tokens = True
    config: TransformerFAMConfig

    def __init__(self, config: TransformerFAMConfig, host: HostSpec):
        super().__init__(config, host)
        number, factory = config.num_tokens, {"dtype": host.dtype, "device": host.device}
        self.num_read_tokens = self.num_write_tokens = number
        self.first_tokens = nn.Parameter(torch.randn(number, host.hidden_size, **factory) * host.embedding_std)
        self.queries = None
        if config.query == "static":
            shape = (host.num_layers, number, host.hidden_size)
            self.queries = nn.Parameter(torch.randn(shape, **factory) * host.embedding_std)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.host.num_layers)) if self.config.num_tokens or self.config.past else ()

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        return frozenset(("attention", layer) for layer in self.layers)

    @property
    def identity_at_attach(self) -> bool:
        return not self.layers

    def first_position(self, writing: bool = False) -> int:
        # The vectors in front of the text take the last of the past tokens' positions.
        return max(0, self.config.past - self.config.num_tokens)

    def initial_state(self, batch_size: int) -> State:
        """Per layer "<layer>/fam" (B, F, d), zeros before the first block, or with feedback="stack" one "fam"; per
        layer "<layer>/keys" and "<layer>/values" (B, past, Hkv, e), newest last; counts (B,): blocks, and past tokens
        that are "filled"."""
        host, config, state = self.host, self.config, {}
        if config.num_tokens and config.feedback == "stack":
            state["fam"] = self.first_tokens.expand(batch_size, -1, -1)
        for layer in self.layers:
            if config.num_tokens and config.feedback == "layer":
                shape = (batch_size, config.num_tokens, host.hidden_size)
                state[f"{layer}/fam"] = self.first_tokens.new_zeros(shape)
            for name in ("keys", "values") if config.past else ():
                shape = (batch_size, config.past, host.num_key_value_heads, host.head_dim)
                state[f"{layer}/{name}"] = self.first_tokens.new_zeros(shape)
        for name, used in (("blocks", config.num_tokens), ("filled", config.past)):
            if used:
                state[name] = torch.zeros(batch_size, dtype=torch.long, device=self.first_tokens.device)
        return State(state)

    def prepare(self, state: State, host: Host) -> dict[str, Tensor]:
        """Per layer keys at their places before the block, and values of the past, (B, Hkv, past, e)."""
        reads, past = {}, self.config.past
        for layer in self.layers if past else ():
            keys, values = (state[f"{layer}/{name}"].transpose(1, 2) for name in ("keys", "values"))
            start = max(past, self.config.num_tokens) - past
            rotation = host.rotary(start + torch.arange(past, device=keys.device)[None], layer)
            reads[f"{layer}/keys"] = keys if rotation is None else rotate(keys, *rotation)
            reads[f"{layer}/values"] = values
        return reads

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        if self.config.feedback == "stack":
            return state["fam"], state["fam"]
        first = self.first_tokens.expand(len(state["blocks"]), -1, -1)
        return first, first

    def before_layer(self, x: Tensor, step: Step) -> Tensor:
        number = self.config.num_tokens
        if not number or self.config.feedback == "stack" or not (step.num_read or step.num_write):
            return x
        carried, new = step.running("fam"), self._new(step)
        fam = carried
        if step.num_read:
            # In a row's first block the learned embeddings have come up from below.
            fam = torch.where(new, x[:, :number].to(fam.dtype), fam)
            x = torch.cat([fam.to(x.dtype), x[:, number:]], dim=1)
            taking = None if step.real is None else step.real.any(1)[:, None, None]
            step.leave(fam=fam if taking is None else torch.where(taking, fam, carried))
        if step.num_write:
            residual = fam.masked_fill(new, 0) if self.queries is None else self._queries(step)
            x = torch.cat([x[:, :-number], residual.to(x.dtype)], dim=1)
            step.add_note(fam=fam)
        return x

    def before_attention(self, x: Tensor, step: Step) -> Tensor:
        """In a row's first block the attention reads the vectors, the residual stream zeros."""
        number = self.config.num_tokens
        fam = step.note("fam", step.layer)
        if fam is None or self.queries is not None:
            return x
        normed = step.host.normalise(fam.to(x.dtype), step.layer)
        written = torch.where(self._new(step), normed, x[:, -number:])
        return torch.cat([x[:, :-number], written], dim=1)

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        if self.config.past:
            step.keep(keys=call.free_keys().transpose(1, 2), values=call.new_values.transpose(1, 2))
        query, mask, number = call.query, call.mask, step.num_write
        if number:
            query = torch.cat([query[:, :, :-number], self._moved(call, step)], dim=2)
            mask = call.bool_mask()
            mask = torch.cat([mask[:, :, :-number], self._block_seen(mask, number)], dim=2)
        if not self.config.past:
            return call.plain(query=query, mask=mask)
        past_keys, past_values = (step.read(f"{step.layer}/{name}").to(query.dtype) for name in ("keys", "values"))
        filled = torch.arange(self.config.past, device=query.device) >= self.config.past - step.state("filled")[:, None]
        seen = filled[:, None, None]
        if not number and not step.num_read and step.streaming and not step.training and call.softcap is None:
            part = with_columns(
                query, call.keys, call.values, call.mask, past_keys, past_values, seen, call.scale
            )  # fmt: skip
            return part.transpose(1, 2)
        mask = mask if number else call.bool_mask()
        assert mask is not None
        text = torch.ones(query.shape[2], dtype=torch.bool, device=query.device)
        text[: step.num_read] = False
        text[query.shape[2] - number :] = False
        seen = seen & text[:, None]
        rows = max(seen.shape[0], mask.shape[0])
        mask = torch.cat([m.expand(rows, -1, -1, -1) for m in (seen, mask)], dim=-1)
        keys, values = torch.cat([past_keys, call.keys], dim=2), torch.cat([past_values, call.values], dim=2)
        return call.plain(query=query, keys=keys, values=values, mask=mask)

    def after_layer(self, x: Tensor, step: Step) -> Tensor:
        if self.config.feedback == "layer":
            step.keep_written(fam=x)
        return x

    def commit(self, state: State, segment: Segment) -> State:
        config, after = self.config, dict(state)
        if config.num_tokens:
            written = {"fam": segment.written} if config.feedback == "stack" else {}
            if config.feedback == "layer":
                written = {f"{i}/fam": segment.written_trace[i]["fam"] for i in self.layers}
            for name, fam in written.items():
                assert fam is not None
                fam = fam.to(state[name].dtype)
                after[name] = F.rms_norm(fam, fam.shape[-1:]) if config.normalise else fam
            after["blocks"] = state["blocks"] + 1
        for layer in self.layers if config.past else ():
            for name, new in segment.trace[layer].items():
                full = f"{layer}/{name}"
                after[full] = torch.cat([state[full], new.to(state[full].dtype)], dim=1)[:, -config.past :]
            tokens = segment.trace[layer]["keys"].shape[1]
            after["filled"] = (state["filled"] + tokens).clamp_max(config.past)
        return State(after)

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block: root mean square of the vectors, which grows where nothing holds it."""
        after = self.commit(state, segment)
        names = [name for name in after if name.endswith("fam")]
        where = lambda name: f"block{name.removesuffix('/fam')}/fam_norm" if "/" in name else "fam_norm"  # noqa: E731
        return {where(name): after[name].detach().float().square().mean(-1).sqrt().mean() for name in names}

    def _new(self, step: Step) -> Tensor:
        """(B, 1, 1) bool: rows in their first block."""
        return (step.state("blocks") == 0)[:, None, None]

    def _queries(self, step: Step) -> Tensor:
        assert self.queries is not None
        return self.queries[step.layer].expand(len(step.state("blocks")), -1, -1)

    def _moved(self, call: AttentionCall, step: Step) -> Tensor:
        """The feedback queries (B, H, F, e) at the block's last F positions."""
        number = step.num_write
        query = call.query[:, :, -number:]
        if call.rotation is None:
            return query
        places = step.first + step.segment - number + torch.arange(number, device=query.device)
        rotation = step.host.rotary(places[None], step.layer)
        assert rotation is not None
        cos, sin = call.rotation
        return rotate(unrotate(query, cos[:, -number:], sin[:, -number:]), *rotation)

    @staticmethod
    def _block_seen(mask: Tensor, number: int) -> Tensor:
        """(rows, 1, F, K) bool: feedback queries see the last vectors and the block, not each other's new columns."""
        keys = mask.shape[-1]
        return (torch.arange(keys, device=mask.device) < keys - number).expand(*mask.shape[:2], number, keys)
