"""Stack: several memories on one host, as one memory.

At each site the memories act in the order of the config: the first is nearest to the host. Each has its own state,
under its name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from .errors import ConfigError
from .memory import HostKind, HostSpec, Memory, MemoryConfig, Segment, Site, SlotUse, Trace
from .state import State
from .step import AttentionCall, Host, Step


@dataclass(frozen=True, kw_only=True)
class StackConfig(MemoryConfig):
    name = "stack"

    memories: tuple = field(default=(), metadata={"help": "configurations of the memories, nearest to the host first"})

    def validate(self) -> None:
        if len(self.memories) < 2 or not all(isinstance(m, MemoryConfig) for m in self.memories):
            raise ConfigError(f"A stack has at least two memory configurations; got {self.memories!r}.")
        if any(isinstance(m, StackConfig) for m in self.memories):
            raise ConfigError("A stack holds memories, not stacks; list all memories in one.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        from .registry import config_from_dict

        return cls(memories=tuple(config_from_dict(m) for m in values.get("memories", ())))

    def to_dict(self) -> dict[str, Any]:
        return {"memory": self.name, "version": self.version, "memories": [m.to_dict() for m in self.memories]}


class Stack(Memory):
    name = "stack"
    config_class = StackConfig
    paper = "several memories on one host"
    hosts: ClassVar[frozenset[HostKind]] = frozenset({"decoder", "encoder-decoder"})
    config: StackConfig

    def __init__(self, config: StackConfig, host: HostSpec):
        from .registry import memory_class

        super().__init__(config, host)
        self.parts = nn.ModuleDict()
        for one in config.memories:
            same = sum(m.name == one.name for m in config.memories[: len(self.parts)])
            self.parts[f"{one.name}-{same + 1}" if same else one.name] = memory_class(one.name)(one, host)
        self.members: Mapping[str, Memory] = dict(self.parts.items())  # pyright: ignore[reportAttributeAccessIssue]
        _check(self.members)
        for name in ("num_read_tokens", "num_write_tokens", "num_inner_tokens", "num_sinks"):
            setattr(self, name, sum(getattr(m, name) for m in self.members.values()))
        self.inner_every = max(m.inner_every for m in self.members.values())
        self.shifting_tokens = all(m.shifting_tokens for m in self.members.values())
        for name in ("bidirectional_tokens", "continuous", "owns_cache", "write_pass", "makes_masks", "keeps_hidden"):
            setattr(self, name, any(getattr(m, name) for m in self.members.values()))
        self.keeps_embeddings = any(m.keeps_embeddings for m in self.members.values())

    @property
    def croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(m.croppable for m in self.members.values())

    @property
    def constant_size(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(m.constant_size for m in self.members.values())

    @property
    def reorderable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(m.reorderable for m in self.members.values())

    @property
    def batch_safe(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(m.batch_safe for m in self.members.values())

    @property
    def limits(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {rule: f"{n}: {reason}" for n, m in self.members.items() for rule, reason in m.limits.items()}

    @property
    def whole_segments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(m.whole_segments for m in self.members.values())

    @property
    def masked_commits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(m.masked_commits for m in self.members.values() if m.uses("commit"))

    @property
    def companion(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return next((m.companion for m in self.members.values() if m.companion is not None), None)

    def uses(self, method: str) -> bool:
        return any(m.uses(method) for m in self.members.values())

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset().union(*(m.sites for m in self.members.values()))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({i for m in self.members.values() for i in m.layers}))

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        return frozenset().union(*(m.claims for m in self.members.values()))

    @property
    def identity_at_attach(self) -> bool:
        return all(m.identity_at_attach for m in self.members.values())

    def commit_every(self, segment: int) -> int:
        every = {n: m.commit_every(segment) for n, m in self.members.items() if m.uses("commit")}
        if len(set(every.values())) > 1:
            raise ConfigError(f"Stacked memories commit together; got {every} tokens between commits.")
        return next(iter(every.values()), segment)

    def window(self, segment: int) -> int:
        return max(m.window(segment) for m in self.members.values())

    def first_position(self, writing: bool = False) -> int:
        return max(m.first_position(writing) for m in self.members.values())

    def optimizer_groups(self) -> Mapping[str, Mapping[str, float]]:
        groups = {n: m.optimizer_groups() for n, m in self.members.items()}
        return {f"parts.{n}.{pattern}": one for n, part in groups.items() for pattern, one in part.items()}

    # State

    def initial_state(self, batch_size: int) -> State:
        return self._joined({n: m.initial_state(batch_size) for n, m in self.members.items()})

    def prepare(self, state: State, host: Host) -> dict[str, Tensor]:
        return self._joined({n: m.prepare(self._part(n, state), host) for n, m in self.members.items()})._tensors

    def fetch(self, state: State, tokens: Tensor, step: Step) -> dict[str, Tensor]:
        found = {
            n: m.fetch(self._part(n, state), tokens, step.scoped(f"{n}/"))
            for n, m in self.members.items()
            if m.uses("fetch")
        }
        return {f"{n}/{key}": t for n, part in found.items() for key, t in part.items()}

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        name = next(n for n, m in self.members.items() if "tokens" in m.sites)
        return self.members[name].tokens(self._part(name, state))

    def tokens_there(self, state: State) -> Tensor:
        name = next(n for n, m in self.members.items() if m.uses("tokens_there"))
        return self.members[name].tokens_there(self._part(name, state))

    def inner_tokens(self, state: State) -> Tensor:
        name = next(n for n, m in self.members.items() if m.num_inner_tokens)
        return self.members[name].inner_tokens(self._part(name, state))

    def copy_from(self, blocks: Sequence[nn.Module], stack: nn.Module, host: Host) -> None:
        for member in self.members.values():
            member.copy_from(blocks, stack, host)

    def encoded(self, hidden: Tensor, state: State) -> Tensor:
        for name, member in self.members.items():
            hidden = member.encoded(hidden, self._part(name, state))
        return hidden

    def write_input(self, state: State, embeddings: Tensor) -> Tensor:
        name = next(n for n, m in self.members.items() if m.write_pass)
        return self.members[name].write_input(self._part(name, state), embeddings)

    def write_positions(self, tokens: int) -> Tensor | None:
        return next(m for m in self.members.values() if m.write_pass).write_positions(tokens)

    def commit(self, state: State, segment: Segment) -> State:
        after = {}
        for name, member in self.members.items():
            after[name] = member.commit(self._part(name, state), self._segment(name, segment))
        return self._joined(after)

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        found = {n: m.diagnostics(self._part(n, state), self._segment(n, segment)) for n, m in self.members.items()}
        return {f"{n}/{key}": t for n, part in found.items() for key, t in part.items()}

    @property
    def slot_dims(self) -> Mapping[str, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {f"{n}/{name}": dim for n, m in self.members.items() for name, dim in m.slot_dims.items()}

    def slot_use(self, state: State, segment: Segment) -> dict[int, SlotUse]:
        """Of each block by the first memory that reads slots there."""
        found: dict[int, SlotUse] = {}
        for name, member in self.members.items():
            own = member.slot_use(self._part(name, state), self._segment(name, segment))
            found = {i: replace(use, bank=f"{name}/{use.bank}") for i, use in own.items()} | found
        return found

    # Sites

    def before_layer(self, x: Tensor, step: Step) -> Tensor:
        for member, own in self._at("before_layer", step):
            x = member.before_layer(x, own)
        return x

    def around_block(self, x: Tensor, run: Callable[..., Tensor], step: Step) -> Tensor:
        for member, own in self._at("around_block", step):
            run = _around_block(member, run, own)
        return run(x)

    def before_attention(self, x: Tensor, step: Step) -> Tensor:
        for member, own in self._at("before_attention", step):
            x = member.before_attention(x, own)
        return x

    def mixer(self, x: Tensor, step: Step) -> Tensor:
        member, own = self._at("mixer", step)[0]
        return member.mixer(x, own)

    def linear(self, x: Tensor, out: Tensor, name: str, step: Step) -> Tensor:
        for member, own in self._at("linear", step):
            out = member.linear(x, out, name, own)
        return out

    def keys_values(self, keys: Tensor, values: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        for member, own in self._at("keys_values", step):
            keys, values = member.keys_values(keys, values, own)
        return keys, values

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        """The first is called with the host's attention; what it makes is the plain attention of the second."""
        inner = call
        for member, own in self._at("attention", step):
            inner = replace(inner, base=_nested(member, own, inner))
        return inner.plain()

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        for member, own in self._at("residual", step):
            x = member.residual(x, source, own)
        return x

    def feed_forward(self, x: Tensor, mlp: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        for member, own in self._at("feed_forward", step):
            mlp = _around(member, mlp, own)
        return mlp(x)

    def after_layer(self, x: Tensor, step: Step) -> Tensor:
        for member, own in self._at("after_layer", step):
            x = member.after_layer(x, own)
        return x

    def logits(self, logits: Tensor, step: Step) -> Tensor:
        for member, own in self._at("logits", step):
            logits = member.logits(logits, own)
        return logits

    # Inside

    def _at(self, method: str, step: Step) -> list[tuple[Memory, Step]]:
        return [
            (m, step.scoped(f"{n}/"))
            for n, m in self.members.items()
            if m.uses(method)
            and (method == "logits" or step.layer in m.layers)
            and (m.write_pass or m.uses("around_block") or not step.writing)
        ]

    def _part(self, name: str, state: State) -> State:
        return State({n.removeprefix(f"{name}/"): t for n, t in state.items() if n.startswith(f"{name}/")})

    @staticmethod
    def _joined(parts: Mapping[str, Mapping[str, Tensor]]) -> State:
        return State({f"{name}/{key}": t for name, part in parts.items() for key, t in part.items()})

    def _segment(self, name: str, segment: Segment) -> Segment:
        def own(traces: Mapping[int, Trace]) -> dict[int, Trace]:
            prefix = f"{name}/"
            picked = {
                i: {n.removeprefix(prefix): t for n, t in trace.items() if n.startswith(prefix)}
                for i, trace in traces.items()
            }
            # What the host gives is nobody's own.
            shared = {n: t for n, t in traces.get(-1, {}).items() if n in ("hidden", "embeddings")}
            if shared:
                picked[-1] = {**picked[-1], **shared}
            return {i: trace for i, trace in picked.items() if trace}

        return replace(segment, trace=own(segment.trace), written_trace=own(segment.written_trace))


def _nested(member: Memory, step: Step, call: AttentionCall) -> Callable[..., Tensor]:
    def base(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        return member.attention(replace(call, query=query, keys=keys, values=values, mask=mask), step)

    return base


def _around(member: Memory, mlp: Callable[[Tensor], Tensor], step: Step) -> Callable[[Tensor], Tensor]:
    return lambda x: member.feed_forward(x, mlp, step)


def _around_block(member: Memory, run: Callable[..., Tensor], step: Step) -> Callable[..., Tensor]:
    return lambda x, **how: run(x, **how) if how else member.around_block(x, run, step)


def _check(members: Mapping[str, Memory]) -> None:
    """Raises `ConfigError` where two memories cannot stand on one host."""
    names = list(members)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            for a, b in ((first, second), (second, first)):
                shared = members[a].claims & _used(members[b])
                if shared:
                    site, layers = next(iter(shared))[0], sorted({layer for _, layer in shared})
                    raise ConfigError(
                        f"The memory {a!r} takes the site {site!r} of blocks {layers} for itself, where {b!r} reads "
                        "too. Give them different blocks, or stack one of them only."
                    )
    for what, have in {
        "memory tokens around the segment": [n for n, m in members.items() if "tokens" in m.sites],
        "a second language model": [n for n, m in members.items() if m.companion is not None],
        "a second pass for writing": [n for n, m in members.items() if m.write_pass],
        "positions before the segment": [n for n, m in members.items() if m.first_position() > 0],
        "a window of the stream": [n for n, m in members.items() if m.continuous],
    }.items():
        if len(have) > 1:
            raise ConfigError(f"{' and '.join(map(repr, have))} each bring {what}; a host takes one of them.")
    flowing = [n for n, m in members.items() if m.continuous]
    written = [n for n, m in members.items() if m.uses("commit") or "tokens" in m.sites]
    if flowing and written:
        raise ConfigError(
            f"{flowing[0]!r} reads a stream without segments, {written[0]!r} writes at the end of segments; they "
            "cannot be stacked."
        )


def _used(memory: Memory) -> frozenset[tuple[Site, int]]:
    inside: set[Site] = {"attention", "feed_forward"}
    return frozenset((site, layer) for site in memory.sites & inside for layer in memory.layers)
