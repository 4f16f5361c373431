"""Transformer-XL (2019, arXiv 1901.02860), with lengths and ranges per layer (2020, arXiv 2007.03356).

Each layer l keeps what its attention read of the last M_l tokens and attends to it beside the segment H (T x d):

    Hc = [SG(mems_l) ; H];  q = H W_q;  k, v = Hc W_k, Hc W_v
    key j is seen by query i if j <= i and i - j < range_l              (range_l = M_l + T: no limit)
    mems_l <- last M_l rows of [mems_l ; H]                              at the end of a segment
    positions = "relative": score(i, j) = (q_i + u).k_j + (q_i + w).(W_r R_{i-j}),  R sinusoidal

Few layers with a long memory do as well as all, if they are not the first ones (`layout`).

Decisions:
- `cache`: "hidden" projects the stored inputs afresh after each commit, so W_k and W_v learn through the memory; "kv"
  stores keys, free of position, and values: the same numbers while the weights rest, and nothing to project.
- `positions` "host": the host's own scores. On rotary hosts the segment starts at position max M_l and slot s of a
  layer stands at max M_l - M_l + s: its true distance. On hosts with a table of positions the stored vectors carry the
  place that the token had in its own segment, so a pretrained host cannot tell them from the segment's; "relative" is
  the meaningful one there. It turns rotary hosts' keys back (keeping them twice while a segment is open) and replaces
  the scores, so the model must be trained with it; a table of positions stays in the host's input. u, w and W_r are
  per layer. The position term goes to the host's attention as its mask: dropout and softcap (of the content) stay.
- A memory is in sight of layers with a sliding window of their own, unless `ranges` says otherwise.
- `stop_gradient` False is for parity with one long pass and for short unrolls.
- Rows whose stream is younger than M_l mask the slots that are still empty. Documents are not told apart: start a new
  stream for a new one.
- While decoding, memory and segment are attended apart and merged, so that the cache is not copied at each token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, Segment, Site, option
from ...core.state import State
from ...core.step import AttentionCall, Host, Step
from ...ops.attention import with_columns
from ...ops.relative_shift import distances, relative_shift
from ...ops.rotary import rotate

_STD = 0.02


def layout(
    kind: Literal["first", "last", "interleaved"], n_long: int, num_layers: int, long: int, short: int = 0
) -> tuple[int, ...]:
    """`memory_lengths` with `n_long` layers of `long` tokens among `num_layers`, the others of `short`.

    first: the lowest layers; last: the highest; interleaved: evenly through the depth, the highest among them.

    Raises:
        ConfigError: another kind, or more long layers than layers.
    """
    if not 0 <= n_long <= num_layers:
        raise ConfigError(f"n_long = {n_long}, expected between 0 and the number of layers, {num_layers}.")
    chosen = {
        "first": range(n_long),
        "last": range(num_layers - n_long, num_layers),
        # Halves upwards: Python's round would leave two layers on one place.
        "interleaved": [(2 * (i + 1) * num_layers + n_long) // (2 * n_long) - 1 for i in range(n_long)],
    }
    if kind not in chosen:
        raise ConfigError(f"kind = {kind!r}, expected one of {', '.join(chosen)}.")
    return tuple(long if layer in chosen[kind] else short for layer in range(num_layers))


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(MemoryConfig):
    name = "transformer-xl"

    memory_lengths: int | tuple = option(
        512, "tokens M_l that a layer remembers: for all layers, or for each (see `layout`)", minimum=0
    )
    ranges: int | tuple | None = option(
        None, "how far tokens see, themselves included: for all layers, or each; None for memory and segment", minimum=1
    )
    cache: Literal["hidden", "kv"] = option(
        "hidden", "store the attention's inputs and project them afresh, or keys and values"
    )
    positions: Literal["host", "relative"] = option(
        "host", "the host's own scores, or Transformer-XL's in their place (to be trained)"
    )
    clamp: int | None = option(None, "relative positions: larger distances count as this one", minimum=1)
    stop_gradient: bool = option(True, "no gradient through what is stored")

    def validate(self) -> None:
        for name, least in (("memory_lengths", 0), ("ranges", 1)):
            value = getattr(self, name)
            for n in value if isinstance(value, tuple) else ():
                missing = n is None and name == "ranges"
                if not missing and (not isinstance(n, int) or isinstance(n, bool) or n < least):
                    raise ConfigError(
                        f"transformer-xl: {name} = {value!r}, expected whole numbers of at least {least}."
                    )
        if self.clamp is not None and self.positions != "relative":
            raise ConfigError("transformer-xl: clamp is for positions='relative'; rotary hosts have no use for it.")

    def per_layer(self, name: str, num_layers: int) -> tuple:
        """An option as one value for each layer; raises `ConfigError` if there are not as many."""
        value = getattr(self, name)
        values = value if isinstance(value, tuple) else (value,) * num_layers
        if len(values) != num_layers:
            raise ConfigError(
                f"transformer-xl: {name} has {len(values)} values, the host {num_layers} layers; give one for each."
            )
        return values


class TransformerXL(Memory):
    name = "transformer-xl"
    config_class = TransformerXLConfig
    paper = "Transformer-XL (2019, arXiv 1901.02860), Do Transformers Need Deep Long-Range Memory? (2020, 2007.03356)"
    state_size = "L * memory_lengths * d"
    config: TransformerXLConfig

    def __init__(self, config: TransformerXLConfig, host: HostSpec):
        super().__init__(config, host)
        self.lengths: tuple[int, ...] = config.per_layer("memory_lengths", host.num_layers)
        self.ranges: tuple[int | None, ...] = config.per_layer("ranges", host.num_layers)
        self.relative = config.positions == "relative"
        factory = {"dtype": host.dtype, "device": host.device}
        # Tells the dtype and device that the model has now.
        self.register_buffer("like", torch.empty(0, **factory), persistent=False)
        self.like: Tensor
        if self.relative:
            if host.hidden_size % 2:
                raise ConfigError(
                    f"transformer-xl: relative positions need an even width, the host has {host.hidden_size}."
                )
            normal = lambda *shape: nn.Parameter(_STD * torch.randn(host.num_layers, *shape, **factory))  # noqa: E731
            self.position_weight = normal(host.hidden_size, host.num_heads, host.head_dim)
            self.content_bias, self.position_bias = (normal(host.num_heads, host.head_dim) for _ in range(2))

    @property
    def layers(self) -> tuple[int, ...]:
        taking_part = (self.relative or m or r for m, r in zip(self.lengths, self.ranges, strict=True))
        return tuple(layer for layer, used in enumerate(taking_part) if used)

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        return frozenset(("attention", layer) for layer in self.layers)

    @property
    def identity_at_attach(self) -> bool:
        return not self.layers

    @property
    def limits(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        cut = self.config.stop_gradient and any(self.lengths)
        return {"gradients through the state": "what is stored is detached (SG in the paper)"} if cut else {}

    def first_position(self, writing: bool = False) -> int:
        return 0 if self.relative else max(self.lengths)

    def initial_state(self, batch_size: int) -> State:
        """Per layer "<layer>/hidden" (B, M_l, d), or "<layer>/keys" and "<layer>/values" (B, M_l, Hkv, e), newest last;
        count (B,): tokens stored so far, dropped ones included."""
        host, state = self.host, {}
        for layer in self._storing:
            if self.config.cache == "hidden":
                state[f"{layer}/hidden"] = self.like.new_zeros(batch_size, self.lengths[layer], host.hidden_size)
            else:
                for name in ("keys", "values"):
                    shape = (batch_size, self.lengths[layer], host.num_key_value_heads, host.head_dim)
                    state[f"{layer}/{name}"] = self.like.new_zeros(shape)
        if state:
            state["count"] = torch.zeros(batch_size, dtype=torch.long, device=self.like.device)
        return State(state)

    def prepare(self, state: State, host: Host) -> dict[str, Tensor]:
        """Per layer keys, at their places or free of position, and values of the memory, (B, Hkv, M_l, e)."""
        reads = {}
        for layer in self._storing:
            places = torch.arange(self.lengths[layer], device=self.like.device)[None]
            places = places + (self.first_position() - self.lengths[layer])
            rotation = None if self.relative else host.rotary(places, layer)
            if self.config.cache == "hidden":
                given = None if rotation is None else places
                keys, values = host.project(state[f"{layer}/hidden"], layer, given)
            else:
                keys, values = (state[f"{layer}/{name}"].transpose(1, 2) for name in ("keys", "values"))
                keys = keys if rotation is None else rotate(keys, *rotation)
            reads |= {f"{layer}/keys": keys, f"{layer}/values": values}
        return reads

    def fetch(self, state: State, tokens: Tensor, step: Step) -> dict[str, Tensor]:
        """R (D, d) of all distances of this step, largest first."""
        if not self.relative:
            return {}
        keys = step.places if step.frame.key_places is None else step.frame.key_places
        number = max(self.lengths) + keys.shape[1]
        width, clamp = self.host.hidden_size, self.config.clamp
        return {"distances": distances(number, width, clamp, dtype=self.like.dtype, device=self.like.device)}

    def before_attention(self, x: Tensor, step: Step) -> Tensor:
        if self.config.cache == "hidden" and self.lengths[step.layer]:
            step.keep(hidden=x)
        return x

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        layer, keys = step.layer, call.keys
        if self.config.cache == "kv" and self.lengths[layer]:
            step.keep(keys=call.free_keys().transpose(1, 2), values=call.new_values.transpose(1, 2))
        if self.relative and call.rotation is not None:
            keys = step.features("free_keys", call.free_keys().transpose(1, 2)).transpose(1, 2)
        apart = None
        if self.relative or self.ranges[layer] is not None:
            apart = self._apart(call, step)
        seen = self._memory_seen(step, apart)
        if not self.relative and apart is None and self._decoding(call, step):
            more_keys, more_values = (step.read(f"{layer}/{name}").to(keys.dtype) for name in ("keys", "values"))
            part = with_columns(call.query, keys, call.values, call.mask, more_keys, more_values, seen, call.scale)
            return part.transpose(1, 2)
        mask = call.bool_mask()
        if (limit := self.ranges[layer]) is not None:
            assert apart is not None
            mask = mask & (apart[:, None, :, self.lengths[layer] :] < limit)
        values = call.values
        if seen is not None:
            shape = (max(seen.shape[0], mask.shape[0]), 1, mask.shape[2])
            mask = torch.cat([m.expand(*shape, -1) for m in (seen, mask)], dim=-1)
            keys = torch.cat([step.read(f"{layer}/keys").to(keys.dtype), keys], dim=2)
            values = torch.cat([step.read(f"{layer}/values").to(values.dtype), values], dim=2)
        if not self.relative:
            return call.plain(keys=keys, values=values, mask=mask)
        assert apart is not None
        query = call.free_query()
        terms = self._position_terms(query, apart, step) * call.scale
        terms = terms.masked_fill(~mask, torch.finfo(terms.dtype).min)
        return call.plain(query=query + self.content_bias[layer][:, None], keys=keys, values=values, mask=terms)

    def commit(self, state: State, segment: Segment) -> State:
        after, mask = {}, segment.mask
        for layer in self._storing:
            for name, new in segment.trace[layer].items():
                full = f"{layer}/{name}"
                after[full] = self._pushed(state[full], new.to(state[full].dtype), state["count"], mask)
        if after:
            tokens = next(iter(segment.trace[self._storing[0]].values())).shape[1]
            after["count"] = state["count"] + (tokens if mask is None else mask.sum(1))
        return State(after)

    @property
    def _storing(self) -> tuple[int, ...]:
        return tuple(layer for layer, length in enumerate(self.lengths) if length)

    def _pushed(self, old: Tensor, new: Tensor, count: Tensor, mask: Tensor | None) -> Tensor:
        """The last rows of [old ; new], as many as old (B, M, ...) has."""
        length, tokens = old.shape[1], new.shape[1]
        if self.config.stop_gradient:
            new = new.detach()
        if mask is None:
            return torch.cat([old[:, tokens:], new[:, -length:]], dim=1)
        # Padding first, then what is stored and real in its order.
        stored = torch.arange(length, device=old.device) >= length - count[:, None]
        order = torch.cat([stored, mask], dim=1).long().argsort(dim=1, stable=True)[:, -length:]
        rows = torch.arange(old.shape[0], device=old.device)[:, None]
        return torch.cat([old, new], dim=1)[rows, order]

    def _decoding(self, call: AttentionCall, step: Step) -> bool:
        """Whether the two parts may be attended apart: no softcap, no dropout."""
        return bool(self.lengths[step.layer]) and step.streaming and not step.training and call.softcap is None

    def _apart(self, call: AttentionCall, step: Step) -> Tensor:
        """Distances i - j of queries and [memory ; segment], (B or 1, T, M + K); of padding anything.

        Raises:
            ConfigError: another memory's tokens stand around the segment, and have no place in it.
        """
        if step.num_read or step.num_write:
            raise ConfigError(
                "transformer-xl: relative positions and ranges count distances between text tokens, which the memory "
                "tokens of a stacked memory do not have. Beside it use positions='host' without ranges."
            )
        places, among, length = step.places, call.key_places, self.lengths[step.layer]
        apart = places[:, :, None] - among[:, None]
        if not length:
            return apart
        # Not the count: places begin anew where a state is carried into another call.
        start = among.masked_fill(among < 0, torch.iinfo(among.dtype).max).amin(1, keepdim=True)
        slots = start - length + torch.arange(length, device=places.device)
        memory = places[:, :, None] - slots[:, None]
        batch = max(memory.shape[0], apart.shape[0])
        return torch.cat([m.expand(batch, -1, -1) for m in (memory, apart)], dim=-1)

    def _memory_seen(self, step: Step, apart: Tensor | None) -> Tensor | None:
        """(B, 1, 1 or T, M) bool: slots that hold a token in range; None without memory."""
        length, limit = self.lengths[step.layer], self.ranges[step.layer]
        if not length:
            return None
        filled = torch.arange(length, device=self.like.device) >= length - step.state("count")[:, None]
        seen = filled[:, None, None]
        if limit is not None:
            assert apart is not None
            seen = seen & (apart[:, None, :, :length] < limit)
        return seen

    def _position_terms(self, query: Tensor, apart: Tensor, step: Step) -> Tensor:
        """(q_i + w).(W_r R_{i-j}), (B, H, T, M + K)."""
        tokens, columns = apart.shape[1:]
        weight, table = self.position_weight[step.layer].to(query.dtype), step.read("distances")[-columns:]
        query = query + self.position_bias[step.layer][:, None]
        # The cheaper order of the two products: few queries go to the width of R, many meet projected distances.
        if tokens < self.host.head_dim:
            by_distance = torch.einsum("bhte,dhe->bhtd", query, weight) @ table.mT
        else:
            by_distance = query @ torch.einsum("kd,dhe->hek", table, weight)
        if not step.streaming:
            return relative_shift(by_distance.contiguous())
        # Rows stand at different places of their segments.
        index = (columns - 1 - apart).clamp(0, columns - 1)[:, None]
        return by_distance.gather(-1, index.expand(by_distance.shape[0], by_distance.shape[1], -1, -1))
