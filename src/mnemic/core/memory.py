"""Memory: one mechanism that reads a state while the host runs and writes it at the end of a segment.

A system is one file: a `MemoryConfig`, a `Memory`, its paper. The module holds parameters and never what it
remembers: state comes in as an argument and leaves as a result. A memory overrides only the sites it uses.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from .errors import ConfigError, UnknownNameError
from .state import State
from .step import AttentionCall, Host, Step

Site = Literal["tokens", "attention", "residual", "feed_forward", "logits"]
"""Where a memory reads. `tokens`: memory tokens around the segment; `attention`: inside a block's attention, or in its
place; `residual`: beside it, or around the block; `feed_forward`: beside a feed-forward part, or in its place;
`logits`: after the head."""

HostKind = Literal["decoder", "encoder", "encoder-decoder"]
"""Causal language models; models whose tokens see each other both ways; models of both."""

SITE_METHODS: Mapping[str, Site] = {
    "before_attention": "attention",
    "mixer": "attention",
    "keys_values": "attention",
    "attention": "attention",
    "linear": "attention",
    "before_layer": "residual",
    "around_block": "residual",
    "residual": "residual",
    "after_layer": "residual",
    "feed_forward": "feed_forward",
    "logits": "logits",
}
"""The methods that a memory overrides to read at a site."""


def option(default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field of a `MemoryConfig`: its default, its meaning, and the range it must lie in."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What fixes a memory besides its weights. Subclasses add fields with `option`.

    Raises:
        ConfigError: unknown key, wrong type, or a value outside its range or choices.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings that differ from the defaults; "default" always exists."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            check_option(self.name, f, hints[f.name], getattr(self, f.name))
        self.validate()

    def validate(self) -> None:
        """Checks across fields; raises `ConfigError`."""

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> "MemoryConfig":
        presets = {"default": {}, **cls.presets}
        if preset not in presets:
            raise UnknownNameError.of(f"preset of {cls.name}", preset, presets)
        return cls._build({**presets[preset], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        values = dict(values)
        version = values.pop("version", cls.version)
        if not isinstance(version, int):
            raise ConfigError(f"A {cls.name} configuration has version {version!r}, expected a whole number.")
        if version > cls.version:
            raise ConfigError(f"This {cls.name} configuration has version {version}; this release knows {cls.version}.")
        return cls._build(values)

    def to_dict(self) -> dict[str, Any]:
        # Lists for tuples, as JSON gives them back: what was saved must equal what it is compared with.
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"memory": self.name, "version": self.version, **values}

    def replace(self, **overrides: Any) -> Self:
        return self._build({**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **overrides})

    @classmethod
    def _build(cls, values: Mapping[str, Any]) -> Self:
        known = {f.name for f in dataclasses.fields(cls)}
        ConfigError.check_names(f"option of {cls.name}", values, known)
        # JSON and TOML have no tuples.
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def check_option(name: str, f: dataclasses.Field, hint: Any, value: Any) -> None:
    """Raises `ConfigError` unless `value` has the type `hint` and lies in the range that the field `f` gives."""

    def fail(expected: str) -> typing.NoReturn:
        raise ConfigError(f"{name}: {f.name} = {value!r}, expected {expected}. It means: {f.metadata.get('help', '')}")

    options = get_args(hint) if _is_union(hint) else (hint,)
    literals = [v for o in options if get_origin(o) is Literal for v in get_args(o)]
    types = tuple(float if o is float else (get_origin(o) or o) for o in options if get_origin(o) is not Literal)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    fits = value in literals or any(
        (t is float and numeric)
        or (t is not float and isinstance(value, t) and (t is bool or not isinstance(value, bool)))
        for t in types
    )
    if not fits:
        kinds = [t.__name__ for t in types if t is not type(None)] + [repr(v) for v in literals]
        fail(" or ".join(kinds) + (" or None" if type(None) in types else ""))
    low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
    # Written so that NaN is out of every range.
    if numeric and not ((low is None or value >= low) and (high is None or value <= high)):
        fail(f"at least {low}" if high is None else f"between {low} and {high}")


def _is_union(hint: Any) -> bool:
    import types

    return get_origin(hint) in (typing.Union, types.UnionType)


@dataclass(frozen=True)
class HostSpec:
    """What a memory may know about its host when it is built.

    hidden_size: width d of the residual stream; num_layers: L; embedding_std: standard deviation of the token
    embeddings, for memories that start out looking like tokens; num_heads, num_key_value_heads, head_dim: of the
    attention; rotary: keys are turned by their position; vocab_size; max_positions: None
    if unlimited; linears: by their names in the first block, (input, output) widths of its linear layers. kind: what it
    is; of an encoder-decoder all else is said of the encoder.
    """

    hidden_size: int
    num_layers: int
    embedding_std: float
    dtype: torch.dtype
    device: torch.device
    num_heads: int = 1
    num_key_value_heads: int = 1
    head_dim: int = 0
    vocab_size: int = 0
    rotary: bool = False
    max_positions: int | None = None
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kind: HostKind = "decoder"


Trace = dict[str, Tensor]
"""What one layer keeps for the commit: named tensors (B, tokens, ...)."""


@dataclass(frozen=True)
class Segment:
    """What happened in a segment, for `Memory.commit`.

    trace: per layer, what was kept with `Step.keep`, over all text tokens of the segment in order, (B, T, ...).
    written: last hidden states (after the host's final norm) of the write tokens, (B, num_write_tokens, d).
    written_trace: per layer, what was kept with `Step.keep_written`, (B, num_write_tokens, ...).
    mask: (B, T) bool, False for padding; None where every token is real.
    start: (B,) int64, tokens of the stream before this segment.
    losses: what the commit adds to the training loss, see `add_loss`.
    """

    trace: Mapping[int, Trace]
    written: Tensor | None = None
    written_trace: Mapping[int, Trace] = field(default_factory=dict)
    mask: Tensor | None = None
    start: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)

    def add_loss(self, value: Tensor) -> None:
        """(B,), what this commit costs in each row: the mean over all commits of a call joins the training loss."""
        self.losses.append(value)


@dataclass(frozen=True)
class SlotUse:
    """How one block used the slots of a bank in a segment; B rows, T tokens, N slots.

    bank: the name of the bank, as in `banks`.
    read: (B, T, N) weights with which each token read the slots, mean over heads; a token's sum to 1.
    written: (B, T, N) how much of each slot's write came from each token: its share of what was routed there, times
    the slot's input gate. None where tokens are not told apart.
    """

    bank: str
    read: Tensor
    written: Tensor | None = None


class Memory(nn.Module):
    """Base of all memories.

    A memory overrides the methods of the sites it reads at (`SITE_METHODS`), `initial_state`, and `commit` or the
    running state that a site leaves with `Step.leave`. What it does not override is not hooked.

    Class attributes that a system declares:
        name: as in the registry; config_class; paper: title, year and arXiv number for tables and docs.
        state_size: numbers that a row's state holds with the default options, as an expression of L (blocks), d
            (width), H and Hkv (heads), e (head width), T (segment) and options' names; "0" for none. A continuous
            memory counts what it keeps in the cache.
        croppable: the last tokens can be taken back, so assisted decoding may use it.
        constant_size: the state's bytes do not grow with the tokens read.
        reorderable: rows of its state may change places, so beam search may use it.
        batch_safe: rows may be read side by side.
        whole_segments: each call brings complete segments for every row; no decoding token by token.
        masked_commits: where some rows commit and others do not, `commit` gets all of them and a mask, and takes a row
            without real tokens as it is; by default it gets copies of the rows that commit.
        write_pass: a complete segment runs through the host a second time, with `Step.writing` set, before `commit`.
        limits: rules of the contract that it does not hold -> why, for tables; {} for nearly all.
        hosts: kinds of hosts it stands on.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[MemoryConfig]]
    paper: ClassVar[str]
    state_size: ClassVar[str] = "?"
    croppable: ClassVar[bool] = False
    reorderable: ClassVar[bool] = True
    batch_safe: ClassVar[bool] = True
    constant_size: ClassVar[bool] = True
    whole_segments: ClassVar[bool] = False
    masked_commits: ClassVar[bool] = False
    write_pass: bool = False
    limits: ClassVar[Mapping[str, str]] = {}
    hosts: ClassVar[frozenset[HostKind]] = frozenset({"decoder"})

    num_read_tokens: int = 0
    """Memory tokens in front of each segment."""
    num_write_tokens: int = 0
    """Memory tokens behind each complete segment; their last hidden states reach `commit` as `written`."""
    bidirectional_tokens: bool = False
    """Memory tokens of one end see each other in both directions."""
    num_inner_tokens: int = 0
    """Memory tokens (`inner_tokens`) before every `inner_every`-th text token of a segment but the first."""
    inner_every: int = 1
    shifting_tokens: bool = True
    """Memory tokens take positions; otherwise each has the position of the text token behind it."""
    keeps_embeddings: bool = False
    """The text's input embeddings (B, T, d) reach `commit` as `trace[-1]["embeddings"]`, and `tokens` gets what
    `prepare` and `fetch` made, batch first, beside the state."""
    makes_masks: bool = False
    """The host gets no mask: `attention` makes those that it needs with `Step.visible`."""
    num_sinks: int = 0
    """With `continuous`: the first tokens of a stream, which stay in sight of all."""
    continuous: bool = False
    """No segments and no commits: positions count from the start of the stream, `window` says how far tokens see."""
    owns_cache: bool = False
    """The host keeps no keys and values: `attention` gets this step's only and keeps what it wants in its buffers."""
    keeps_hidden: bool = False
    """The text's last hidden states, after the host's final norm, reach `commit` as `trace[-1]["hidden"]`."""
    opening_token: int | None = None
    """On encoders: the token in front of each segment and its memory, [CLS]."""
    closing_token: int | None = None
    """On encoders: the token behind each segment, and behind its memory tokens, [SEP]."""
    slot_dims: Mapping[str, int] = {}
    """Tensors of the state that are banks of slots: name -> the dimension that counts slots. Those between it and the
    batch count banks, the others are of one slot."""
    companion: Any = None
    """A second language model that reads the same tokens, for `logits` (`Step.companion_logits`)."""

    def __init__(self, config: MemoryConfig, host: HostSpec):
        super().__init__()
        self.config = config
        self.host = host

    def uses(self, method: str) -> bool:
        """Whether the memory overrides one of `SITE_METHODS`, or another method of this class."""
        return getattr(type(self), method) is not getattr(Memory, method)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites this memory reads at: those whose methods it overrides."""
        found: set[Site] = {site for method, site in SITE_METHODS.items() if self.uses(method)}
        if self.num_read_tokens or self.num_write_tokens or self.num_inner_tokens:
            found.add("tokens")
        return frozenset(found)

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks in which this memory takes part, in order."""
        inside = self.sites - {"tokens", "logits"}
        return tuple(range(self.host.num_layers)) if inside else ()

    @property
    def claims(self) -> frozenset[tuple[Site, int]]:
        """Sites that it takes for itself: (site, block). By default attention where it replaces or keeps it."""
        alone = self.uses("mixer") or self.owns_cache
        return frozenset(("attention", layer) for layer in self.layers) if alone else frozenset()

    @property
    def identity_at_attach(self) -> bool:
        """The host's logits are unchanged by a freshly attached memory, segment by segment."""
        return False

    def commit_every(self, segment: int) -> int:
        """Tokens between two commits; divides the segment length."""
        return segment

    def window(self, segment: int) -> int:
        """With `continuous`: how many tokens before the segment stay in sight, sinks not counted; 0 for none kept."""
        return 0

    def first_position(self, writing: bool = False) -> int:
        """Position of a segment's first token on hosts with rotary positions: room for a memory that stands before."""
        return 0

    def initial_state(self, batch_size: int) -> State:
        """The state of a stream that has read nothing."""
        return State()

    def prepare(self, state: State, host: Host) -> dict[str, Tensor]:
        """What the sites need from the committed state, batch first: computed once after a commit, not at every token.
        `Step.read` gives it."""
        return {}

    def fetch(self, state: State, tokens: Tensor, step: Step) -> dict[str, Tensor]:
        """What the sites need from elsewhere for the text tokens of this step, ids (B, T) or embeddings (B, T, d):
        always the latter with `keeps_embeddings`."""
        return {}

    # Sites, in the order in which a token meets them

    def tokens(self, state: State) -> tuple[Tensor, Tensor]:
        """Read and write tokens as input embeddings, (B or 1, num_read_tokens, d), (B or 1, num_write_tokens, d)."""
        raise TypeError(f"{type(self).__name__} declares memory tokens and must override `tokens`.")

    def tokens_there(self, state: State) -> Tensor:
        """Rows (B,) bool that have their read tokens. If overridden, the others' text does not see them, and stands
        where it would without them on hosts with a table of positions."""
        raise TypeError(f"{type(self).__name__} has its read tokens in every row.")

    def inner_tokens(self, state: State) -> Tensor:
        """One group of inner tokens as input embeddings, (B or 1, num_inner_tokens, d)."""
        raise TypeError(f"{type(self).__name__} declares inner tokens and must override `inner_tokens`.")

    def before_layer(self, x: Tensor, step: Step) -> Tensor:
        """What the block reads, (B, T, d), from what it was given."""
        return x

    def around_block(self, x: Tensor, run: Callable[..., Tensor], step: Step) -> Tensor:
        """In place of the block: (B, T, d) from its input. `run(x)` is the host's own, and may be called several times;
        `run(x, writing=True)` sets `Step.writing` meanwhile. What the last call keeps of a token counts."""
        return run(x)

    def before_attention(self, x: Tensor, step: Step) -> Tensor:
        """What the attention reads, (B, T, d), from what it was given (normalised in pre-norm hosts)."""
        return x

    def mixer(self, x: Tensor, step: Step) -> Tensor:
        """In place of the attention module: (B, T, d) from its input (B, T, d)."""
        raise TypeError(f"{type(self).__name__} does not replace attention.")

    def linear(self, x: Tensor, out: Tensor, name: str, step: Step) -> Tensor:
        """What a linear layer of the block gives, from its input and its own output."""
        return out

    def keys_values(self, keys: Tensor, values: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """This step's keys, free of position, and values before they are kept, (B, key-value heads, T, e)."""
        return keys, values

    def attention(self, call: AttentionCall, step: Step) -> Tensor:
        """The attention's result before its output projection, (B, T, H, e); `call.plain()` is the host's."""
        return call.plain()

    def residual(self, x: Tensor, source: Tensor, step: Step) -> Tensor:
        """What the attention of the block adds to the residual stream, with the memory's part.

        Args:
            x: attention output, (B, T, d).
            source: input of the attention module (the normalised residual stream in pre-norm hosts), (B, T, d).
        """
        return x

    def feed_forward(self, x: Tensor, mlp: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        """In place of the block's feed-forward part, `mlp`: (B, T, d) from its input (B, T, d)."""
        return mlp(x)

    def after_layer(self, x: Tensor, step: Step) -> Tensor:
        """What the block gives, (B, T, d), from what it made."""
        return x

    def logits(self, logits: Tensor, step: Step) -> Tensor:
        """Logits (B, n, vocabulary) of some text tokens, from the host's own."""
        return logits

    # Training

    def optimizer_groups(self) -> Mapping[str, Mapping[str, float]]:
        """Parameters trained unlike the rest: pattern of their names (as `fnmatch`, names as in `named_parameters`) ->
        settings; of several patterns that fit the first counts.

        lr: a learning rate of its own, constant over the training (no warm-up, no decay). lr_scale: factor of the
        memory's rate, which follows the schedule. weight_decay. What is not named is as for all: norms and biases are
        never decayed.
        """
        return {}

    # Hosts

    def copy_from(self, blocks: Sequence[nn.Module], stack: nn.Module, host: Host) -> None:
        """Take weights from the host's blocks, or from the module that runs them, when the memory is attached."""

    def encoded(self, hidden: Tensor, state: State) -> Tensor:
        """On encoder-decoders: what the decoder reads, (B, n + T, d), from the encoder's last hidden states (B, T, d)
        and the state that they leave: the memory's n rows come first."""
        return hidden

    # Writing

    def write_input(self, state: State, embeddings: Tensor) -> Tensor:
        """Input of the second pass (`write_pass`), from the segment's token embeddings (B, T, d)."""
        return embeddings

    def write_positions(self, tokens: int) -> Tensor | None:
        """Host positions (n,) of that input for a segment of so many tokens, or None: in order. Where it gives some,
        the host gets no mask: `attention` makes its own."""
        return None

    def commit(self, state: State, segment: Segment) -> State:
        """The state after a complete segment."""
        return state

    def diagnostics(self, state: State, segment: Segment) -> dict[str, Tensor]:
        """Named scalars per block that tell a living memory from a dead one; empty where there is nothing to tell."""
        return {}

    def slot_use(self, state: State, segment: Segment) -> dict[int, SlotUse]:
        """By block, how the tokens of a segment read the slots of the state that it began with, and how they are
        written to. A memory that overrides it applies `Step.slot_factors` in its read."""
        return {}

    def banks(self, state: State) -> dict[str, Tensor]:
        """The slots of a state, (B, N, width) by the name of the bank: that of the tensor, or "<tensor>/<number>" where
        it has several; see `slot_dims`."""
        found: dict[str, Tensor] = {}
        for name, dim in self.slot_dims.items():
            slots = state[name]
            sizes = slots.shape[0], math.prod(slots.shape[1:dim]), slots.shape[dim], math.prod(slots.shape[dim + 1 :])
            several = slots.reshape(sizes).unbind(1)
            found |= {name if dim == 1 else f"{name}/{i}": one for i, one in enumerate(several)}
        return found
