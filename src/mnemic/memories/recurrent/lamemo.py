"""LaMemo: Language Modeling with Look-Ahead Memory (2022, arXiv 2204.07341, NAACL 2022).

Transformer-XL whose M remembered tokens go up through the layers beside each segment of N tokens, and on the way look
at the tokens to their right that have come since. For memory token i in one layer and head, with its attention's old
result C_i and s_i, the log of its softmax's denominator, of all that it has seen so far:

    new      C', s' = attention of m_i over the keys right of i among the last N - 1 memory tokens and x_0
    merge    s <- log(e^s_i + e^s');  a = e^(s_i - s);  C <- a C_i + (1 - a) C'        a, s and C_i without gradient
    go on    m <- block's output projection, residual and feed-forward part on C: input of the next layer's memory
    tokens   attention of x over [m ; x causal];  their C and s join the memory's at the end of the segment

x_0 is the segment's first token: a memory token sees nothing that the first reader of it has not read. Each refresh
adds the N tokens that came since the last one, so C stays attention over all that the token has seen on both sides, up
to the drift of weights. Nothing carries a gradient from one segment to the next.

Decisions:
- Memory tokens stand in front of the text like any tokens of the host, so its own projections, norms and feed-forward
  parts make the refreshed memory. What enters below is stored as the first layer read it: with positions from a table,
  a token keeps the place of its own segment.
- `positions` "host": the host's scores. With rotary positions look-ahead is a negative distance; the paper has no
  such form (our extension, and the only one for a pretrained host). On hosts with a table, memory takes places in it.
- `positions` "relative": the paper's (q_i + u).k_j + (q_i + v).(W_r R_|i-j|), with a v for the left and one for the
  right, R sinusoidal. The host's own turn is taken back; the model must be trained with it.
- The merge is in logs, float32 or wider, without the paper's epsilon of 1e-6: no denominator is 0.
- Empty slots are masked; they merge nothing. Layers with a sliding window of their own see all of the memory.
- The state has C and s twice, as they entered the open segment and refreshed by it: what an open segment has read is
  not yet remembered, and rows start their segments at different times.
- Attention has no dropout here: C and s must belong together.
- `look_ahead` False is Transformer-XL with its memory recomputed by the weights of today.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, Site, option
from ...core.state import State
from ...core.step import AttentionCall, Step
from ...ops.attention import attend
from ...ops.relative_shift import distances, relative_shift

_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class LaMemoConfig(MemoryConfig):
    name = "lamemo"

    memory_length: int = option(512, "tokens M that are remembered", minimum=1)
    look_ahead: bool = option(True, "remembered tokens look at what came after them; without, it is Transformer-XL")
    positions: Literal["host", "relative"] = option(
        "host", "the host's own scores, or the paper's in their place (to be trained)"
    )


class LaMemo(Memory):
    name = "lamemo"
    config_class = LaMemoConfig
    paper = "LaMemo: Language Modeling with Look-Ahead Memory (2022, arXiv 2204.07341)"
    state_size = "memory_length * (d + 2 * L * H * (e + 1))"
    limits: ClassVar[Mapping[str, str]] = {"gradients through the state": "what is stored is detached, as in the paper"}
    config: LaMemoConfig

    def __init__(self, config: LaMemoConfig, host: HostSpec):
        super().__init__(config, host)
        self.num_read_tokens = config.memory_length
        self.relative = config.positions == "relative"
        factory = {"dtype": host.dtype, "device": host.device}
        # Tells the dtype and device that the model has now.
        self.register_buffer("like", torch.empty(0, **factory), persistent=False)
        self.like: Tensor
        if self.relative:
            if host.hidden_size % 2:
                raise ConfigError(f"lamemo: relative positions need an even width, the host has {host.hidden_size}.")
            normal = lambda *shape: nn.Parameter(_STD * torch.randn(host.num_layers, *shape, **factory))  # noqa: E731
            self.position_weight = normal(host.hidden_size, host.num_heads, host.head_dim)
            self.content_bias, self.left_bias = (normal(host.num_heads, host.head_dim) for _ in range(2))
            self.right_bias = normal(host.num_heads, host.head_dim) if config.look_ahead else None

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        return frozenset(("attention", layer) for layer in self.layers)

    def initial_state(self, batch_size: int) -> State:
        """ "hidden" (B, M, d), what the first layer read of the last M tokens; per layer "<layer>/context" (B, M, H, e)
        and "<layer>/lse" (B, M, H), C and s; the same as "<layer>/new_context" and "<layer>/new_lse" with the open
        segment's part; "count" (B,): tokens stored so far, dropped ones included. Newest last."""
        host, length = self.host, self.config.memory_length
        wide = torch.promote_types(self.like.dtype, torch.float32)
        state = {"hidden": self.like.new_zeros(batch_size, length, host.hidden_size)}
        for layer in self.layers:
            for kind in ("", "new_") if self.config.look_ahead else ("",):
                state[f"{layer}/{kind}context"] = self.like.new_zeros(batch_size, length, host.num_heads, host.head_dim)
                state[f"{layer}/{kind}lse"] = self.like.new_zeros(batch_size, length, host.num_heads, dtype=wide)
        state["count"] = torch.zeros(batch_size, dtype=torch.long, device=self.like.device)
        return State(state)

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        """Places only: `before_layer` puts in what the first layer reads."""
        hidden = state["hidden"]
        return torch.zeros_like(hidden), hidden[:, :0]

    def fetch(self, state: State, tokens: Tensor, step: Step) -> dict[str, Tensor]:
        """R (K, d) of the distances 0..K - 1 of this step's columns."""
        if not self.relative:
            return {}
        columns = step.places if step.frame.key_places is None else step.frame.key_places
        number = max(columns.shape[1], self.config.memory_length + 1)
        table = distances(number, self.host.hidden_size, dtype=self.like.dtype, device=self.like.device)
        return {"distances": table.flip(0)}

    def before_layer(self, x: Tensor, step: Step) -> Tensor:
        if step.layer > 0:
            return x
        if step.num_read:
            x = torch.cat([step.state("hidden").to(x.dtype), x[:, step.num_read :]], dim=1)
        step.keep(hidden=x.detach())
        return x

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        query, keys, length = call.query, call.keys, self.config.memory_length
        if self.relative and call.rotation is not None:
            query = call.free_query()
            keys = step.features("free_keys", call.free_keys().transpose(1, 2)).transpose(1, 2)
        filled = torch.arange(length, device=query.device) >= length - step.state("count")[:, None]
        visible = torch.nn.functional.pad(filled, (0, keys.shape[2] - length), value=True)
        ahead = step.num_read
        mask = call.bool_mask()[:, :, ahead:] & visible[:, None, None]
        context, lse = self._attend(query[:, :, ahead:], keys, call, mask, self._left_terms, step)
        if ahead:
            memory, total = self._refreshed(query[:, :, :ahead], keys, call, visible, step)
            context, lse = torch.cat([memory, context], dim=2), torch.cat([total, lse], dim=2)
        context = context.transpose(1, 2)
        step.keep(context=context.detach(), lse=lse.detach().transpose(1, 2))
        return context

    def commit(self, state: State, segment: Segment) -> State:
        length, after = self.config.memory_length, {}
        last = lambda old, new: torch.cat([old, new.to(old.dtype)], dim=1)[:, -length:].detach()  # noqa: E731
        hidden = segment.trace[0]["hidden"]
        after["hidden"] = last(state["hidden"], hidden)
        for layer in self.layers:
            for name in ("context", "lse"):
                kinds = ("", "new_") if self.config.look_ahead else ("",)
                joined = last(state[f"{layer}/{kinds[-1]}{name}"], segment.trace[layer][name])
                after |= {f"{layer}/{kind}{name}": joined for kind in kinds}
        return State({**after, "count": state["count"] + hidden.shape[1]})

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Per block: how much of a filled slot's attention the last refresh has brought, 1 - a."""
        if not self.config.look_ahead:
            return {}
        length = self.config.memory_length
        filled = torch.arange(length, device=self.like.device) >= length - state["count"][:, None]
        if not bool(filled.any()):
            return {}
        gained = {i: state[f"{i}/lse"] - state[f"{i}/new_lse"] for i in self.layers}
        return {f"block{i}/refreshed": (1 - gain.exp())[filled].mean() for i, gain in gained.items()}

    def _refreshed(
        self, query: Tensor, keys: Tensor, call: AttentionCall, visible: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """C (B, H, M, e) and s (B, H, M) of the memory tokens, the segment's first token seen."""
        old, old_lse = (step.running(name).transpose(1, 2) for name in ("context", "lse"))
        old = old.to(query.dtype)
        if not self.config.look_ahead:
            return old, old_lse
        length = self.config.memory_length
        first = max(0, length - step.segment + 1)
        window, parts = slice(first, length + 1), []
        # As many queries at a time as there are keys: distances of a part are few, and its cost is that of its scores.
        for at in torch.arange(length, device=query.device).split(length + 1 - first):
            right = torch.arange(first, length + 1, device=query.device) > at[:, None]
            part = slice(int(at[0]), int(at[-1]) + 1)
            mask = right & visible[:, None, None, window]
            given = (query[:, :, part], keys[:, :, window], call, mask, self._right_terms, step)
            parts.append(self._attend(*given, values=call.values[:, :, window], start=first - part.start))
        new, new_lse = (torch.cat(found, dim=2) for found in zip(*parts, strict=True))
        total = torch.logaddexp(old_lse, new_lse.detach().to(old_lse.dtype))
        empty = ~visible[:, None, :length]
        total = torch.where(empty, old_lse, total)
        share = (old_lse - total).exp().to(query.dtype)[..., None]
        merged = share * old + (1 - share) * new
        self._leave(step, merged.detach().transpose(1, 2), total.transpose(1, 2))
        return merged, total

    def _leave(self, step: Step, context: Tensor, lse: Tensor) -> None:
        """Rows that take tokens have refreshed; the others keep what they had."""
        given = {"new_context": context, "new_lse": lse}
        if step.real is not None:
            taking = step.real.any(1)
            for name, new in given.items():
                old = step.running(name)
                given[name] = torch.where(taking.view(-1, *[1] * (new.dim() - 1)), new.to(old.dtype), old)
        step.leave(**{name: new.to(step.running(name).dtype) for name, new in given.items()})

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        call: AttentionCall,
        mask: Tensor,
        terms: Callable[[Tensor, int, int, Step], Tensor],
        step: Step,
        values: Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Result (B, H, T, e) and log of the denominator (B, H, T). start: the first key's column less the first
        query's."""
        values = call.values if values is None else values
        if not self.relative:
            return attend(query, keys, values, mask, call.scale, call.softcap)
        added = terms(query, keys.shape[2], start, step) * call.scale
        added = added.masked_fill(~mask, float("-inf"))
        content = query + self.content_bias[step.layer][:, None]
        return attend(content, keys, values, added, call.scale, call.softcap)

    def _left_terms(self, query: Tensor, columns: int, start: int, step: Step) -> Tensor:
        """(q_i + v).(W_r R_{i-j}) of text and the columns up to it, (B, H, T, K)."""
        table = self._projected(0, columns, query, step)
        by_distance = (query + self.left_bias[step.layer][:, None]) @ table.mT
        if not step.streaming:
            return relative_shift(by_distance.flip(-1).contiguous())
        # Rows stand at different places of their segments.
        among = step.places if step.frame.key_places is None else step.frame.key_places
        origin = among.masked_fill(among < 0, torch.iinfo(among.dtype).max).amin(1, keepdim=True)
        at = step.places[:, step.num_read :] - origin + self.config.memory_length
        apart = at[:, :, None] - torch.arange(columns, device=query.device)
        return _picked(by_distance, apart)

    def _right_terms(self, query: Tensor, columns: int, start: int, step: Step) -> Tensor:
        """(q_i + v).(W_r R_{j-i}) of memory tokens and columns to their right, (B, H, T, K)."""
        assert self.right_bias is not None
        queries = query.shape[2]
        least = max(0, start - queries + 1)
        table = self._projected(least, start + columns, query, step)
        by_distance = (query + self.right_bias[step.layer][:, None]) @ table.mT
        count = lambda n: torch.arange(n, device=query.device)  # noqa: E731
        return _picked(by_distance, (start - least + count(columns) - count(queries)[:, None])[None])

    def _projected(self, least: int, most: int, like: Tensor, step: Step) -> Tensor:
        """W_r R of the distances least..most - 1, (H, most - least, e)."""
        table, weight = step.read("distances")[least:most], self.position_weight[step.layer]
        return torch.einsum("kd,dhe->hke", table.to(like.dtype), weight.to(like.dtype))


def _picked(by_distance: Tensor, apart: Tensor) -> Tensor:
    """by_distance (B, H, T, D) -> (B, H, T, K) at distances apart (B or 1, T, K); out of range of D: anything."""
    index = apart.clamp(0, by_distance.shape[-1] - 1)[:, None]
    return by_distance.gather(-1, index.expand(*by_distance.shape[:2], -1, -1))
