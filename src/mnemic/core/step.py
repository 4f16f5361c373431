"""Step: what a memory sees while the host runs over one piece of the input, and where it leaves what it makes.

What goes in is fixed before the host runs; what comes out is left by name. A layer that runs twice (activation
checkpointing) therefore reads the same and leaves the same.
"""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.attention import with_columns
from ..ops.rotary import unrotate


class Host(Protocol):
    """What a memory may ask of its host while it runs."""

    def rotary(self, places: Tensor, layer: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin (B or 1, N, rotary width) of layer `layer` at positions (B or 1, N); None for hosts without."""
        ...

    def project(self, hidden: Tensor, layer: int, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, key-value heads, N, e) that layer `layer` makes of inputs of its attention (B, N, d):
        free of position, or with the keys rotated to `places` (B or 1, N)."""
        ...

    def normalise(self, hidden: Tensor, layer: int) -> Tensor:
        """What stands before the attention of layer `layer`: residual stream in, input of the attention out."""
        ...

    def run(self, embeddings: Tensor) -> Tensor:
        """Last hidden states (B, n, d), after the final norm, of the host alone on input embeddings (B, n, d)."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Rows (..., d) of the host's table of token embeddings for ids (...), without positions or scaling."""
        ...

    def span(self, layer: int) -> tuple[str, int] | None:
        """How far layer `layer` of the host sees by itself: ("sliding_attention", tokens, its own counted),
        ("chunked_attention", tokens), or None for no limit."""
        ...


class Columns(Protocol):
    """Features kept for every token of the open segment beside its keys and values."""

    def features(self, name: str, new: Tensor) -> Tensor:
        """Keep `new` (B, T, ...) at the places of this step's tokens; returns those of all visible ones (B, K, ...)."""
        ...


@dataclass(eq=False)
class Frame:
    """One step of the host, all layers.

    state: as it entered. reads: `Memory.prepare` and `Memory.fetch` of this step.
    real: (B, T) bool, the tokens that are text of a row that takes them; None where all are.
    places: (B or 1, T) int64, each token's number in its stream, -1 for memory tokens. key_places: (B or 1, K), those
    of the visible keys, -1 for unused columns; None where keys and tokens are the same.
    num_read, num_inner, num_write: memory tokens in front of and behind the text, inner ones first. view: asked by
    `Step.visible`. window: tokens in sight of a continuous memory.
    first: host position of a segment's first text token, behind what memories keep free before it. segment: its tokens.
    columns: the open segment's store of features; None where nothing is kept from call to call.
    buffers: tensors (B, ...) that the stream owns and the memory may change in place; None where there is no stream.
    writing: this is the second pass of a memory with `write_pass`. diagnosing: `Memory.diagnostics` will be asked.
    slot_factors: see `Step.slot_factors`, by the bank's name; empty but in analysis.
    attending: the layer whose attention runs, for hosts whose attention modules do not know theirs.

    What the step leaves: trace, written_trace (by layer, for `commit`), left (state), notes (for layers above), losses,
    hidden (B, T, d) after the host's final norm.
    """

    memory: Any
    state: Mapping[str, Tensor] = field(default_factory=dict)
    reads: Mapping[str, Tensor] = field(default_factory=dict)
    host: Any = None
    real: Tensor | None = None
    places: Tensor | None = None
    key_places: Tensor | None = None
    num_read: int = 0
    num_write: int = 0
    num_inner: int = 0
    view: Any = None
    window: int = 0
    first: int = 0
    segment: int = 0
    columns: Columns | None = None
    buffers: MutableMapping[str, Tensor] | None = None
    writing: bool = False
    training: bool = False
    diagnosing: bool = False
    slot_factors: Mapping[str, Tensor] = field(default_factory=dict)
    companion_logits: Tensor | None = None
    trace: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    written_trace: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    rotations: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    reached: set[tuple[str, int]] | None = None
    attending: int | None = None

    def at(self, layer: int) -> "Step":
        return Step(self, layer)


@dataclass(frozen=True, eq=False)
class Step:
    """A `Frame` at one layer, seen by one memory of a stack (`scope` is the prefix of its names)."""

    frame: Frame
    layer: int
    scope: str = ""

    @classmethod
    def alone(cls, memory: Any, layer: int = 0, **given: Any) -> "Step":
        """A step outside of any host; `given` are fields of `Frame`."""
        return cls(Frame(memory, **given), layer)

    def scoped(self, prefix: str) -> "Step":
        return Step(self.frame, self.layer, self.scope + prefix)

    # In

    @property
    def real(self) -> Tensor | None:
        return self.frame.real

    @property
    def places(self) -> Tensor:
        assert self.frame.places is not None
        return self.frame.places

    @property
    def host(self) -> Host:
        return self.frame.host

    @property
    def writing(self) -> bool:
        return self.frame.writing

    @property
    def training(self) -> bool:
        return self.frame.training

    @property
    def diagnosing(self) -> bool:
        """`Memory.diagnostics` will be asked: keep what it needs beyond the commit."""
        return self.frame.diagnosing

    @property
    def num_read(self) -> int:
        return self.frame.num_read

    @property
    def num_write(self) -> int:
        return self.frame.num_write

    @property
    def num_inner(self) -> int:
        """Inner memory tokens, which come behind the text although they stand in its midst."""
        return self.frame.num_inner

    @property
    def window(self) -> int:
        """With `Memory.continuous`: how many of the last tokens a token sees, itself counted and sinks not."""
        return self.frame.window

    @property
    def first(self) -> int:
        """Host position of a segment's first text token; 0 with `Memory.continuous`."""
        return self.frame.first

    @property
    def segment(self) -> int:
        """Tokens T of a complete segment."""
        return self.frame.segment

    @property
    def streaming(self) -> bool:
        """Something is kept for later calls; otherwise this step is all there is of its segment."""
        return self.frame.columns is not None

    def text(self, x: Tensor) -> Tensor:
        """The tokens of `x` (B, T, ...) that are text."""
        return x[:, self.num_read : x.shape[1] - self.num_inner - self.num_write]

    def key_positions(self) -> Tensor:
        """With `Memory.around_block`: host positions of all visible keys, (B or 1, K)."""
        view = self.frame.view
        return view.layout.position(view.keys()) + view.layout.offset

    def memory_keys(self) -> Tensor:
        """With `Memory.around_block`: which of the visible keys are memory tokens, their numbers (n,)."""
        view = self.frame.view
        keys, layout = view.keys()[0], view.layout
        return ((keys < layout.text) | layout.is_inner(keys)).nonzero().squeeze(1)

    def visible(self, queries: Tensor, keys: Tensor | None = None) -> Tensor:
        """With `Memory.around_block`: who sees whom in this layer, (B or 1, 1, q, k) bool, for some tokens of this step
        and some visible keys (all by default), given by their numbers (q,) and (k,)."""
        view = self.frame.view
        among = view.keys() if keys is None else view.keys()[:, keys]
        return view.visible(view.columns[:, queries], among, self.host.span(self.layer))[:, None]

    def state(self, name: str) -> Tensor:
        """A tensor of the state, as it entered the step."""
        return self.frame.state[self.scope + name]

    def read(self, name: str) -> Tensor:
        """A tensor that `prepare` or `fetch` made."""
        return self.frame.reads[self.scope + name]

    def running(self, name: str) -> Tensor:
        """This layer's tensor `name` of the state; in the state it is called "<layer>/<name>"."""
        return self.state(f"{self.layer}/{name}")

    def slot_factors(self, bank: str) -> Tensor | None:
        """Factors (B, N) on the odds with which tokens read the slots of a bank, or None for 1; a memory with
        `slot_use` applies them in its read."""
        return self.frame.slot_factors.get(self.scope + bank) if self.frame.slot_factors else None

    def note(self, name: str, layer: int) -> Tensor | None:
        """What `layer` noted in this step, or None."""
        return self.frame.notes.get(layer, {}).get(self.scope + name)

    def below(self, name: str) -> Tensor | None:
        """What the nearest layer below noted under `name`, or None."""
        name = self.scope + name
        earlier = [i for i, noted in self.frame.notes.items() if i < self.layer and name in noted]
        return self.frame.notes[max(earlier)][name] if earlier else None

    @property
    def companion_logits(self) -> Tensor:
        """What the memory's second model says of the same tokens, (B, n, vocabulary)."""
        assert self.frame.companion_logits is not None
        return self.frame.companion_logits

    # Out

    def keep(self, **tensors: Tensor) -> None:
        """Keep (B, T, ...) of this layer for the commit; `Segment.trace` has them over the segment's text."""
        self.frame.trace.setdefault(self.layer, {}).update({self.scope + n: t for n, t in tensors.items()})

    def keep_written(self, **tensors: Tensor) -> None:
        """Keep the write tokens' part of (B, T, ...) for the commit, where the step has any."""
        if n := self.num_write:
            kept = {self.scope + name: t[:, t.shape[1] - n :] for name, t in tensors.items()}
            self.frame.written_trace.setdefault(self.layer, {}).update(kept)

    def leave(self, **tensors: Tensor) -> None:
        """The state's "<layer>/<name>" after this step. Rows without real tokens must keep what they had."""
        self.frame.left.update({f"{self.scope}{self.layer}/{name}": t for name, t in tensors.items()})

    def add_note(self, **tensors: Tensor) -> None:
        """Leave something for the layers above, in this step only."""
        self.frame.notes.setdefault(self.layer, {}).update({self.scope + n: t for n, t in tensors.items()})

    def add_loss(self, name: str, value: Tensor) -> None:
        """A scalar that joins the training loss."""
        self.frame.losses[f"{self.scope}{self.layer}/{name}"] = value

    # Kept by the stream

    def features(self, name: str, new: Tensor) -> Tensor:
        """Per-token features beside keys and values: those of all visible tokens, (B, K, ...), in the keys' order."""
        if self.frame.columns is None:
            return new
        return self.frame.columns.features(f"{self.scope}{self.layer}/{name}", new)

    def buffer(self, name: str) -> Tensor | None:
        """A tensor (B, ...) that the stream owns, or None before the first `set_buffer`."""
        assert self.frame.buffers is not None
        return self.frame.buffers.get(f"{self.scope}{self.layer}/{name}")

    def set_buffer(self, name: str, value: Tensor) -> None:
        """Give the stream a tensor to own; from then on it may be changed in place. Needs `streaming`."""
        assert self.frame.buffers is not None
        self.frame.buffers[f"{self.scope}{self.layer}/{name}"] = value


@dataclass(eq=False)
class AttentionCall:
    """One layer's attention, between its projections and its output projection.

    query: (B, H, T, e), rotated. keys, values: (B, key-value heads, K, e), rotated, all visible columns with this
    step's own. mask: None for plain causal, or 4-D, bool or additive. scale: factor of the scores.
    new_keys, new_values: (B, key-value heads, T, e), this step's. rotation: cos and sin of this step's tokens.
    key_places: see `Frame`.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    scale: float
    new_keys: Tensor
    new_values: Tensor
    rotation: tuple[Tensor, Tensor] | None
    key_places: Tensor
    base: Callable[..., Tensor]
    softcap: float | None = None

    def plain(self, **changes: Any) -> Tensor:
        """The host's own attention, (B, T, H, e); `changes` replace query, keys, values or mask."""
        return self.base(*(changes.get(n, getattr(self, n)) for n in ("query", "keys", "values", "mask")))

    def after(self, keys: Tensor, values: Tensor, there: Tensor, step: Step) -> Tensor:
        """The host's attention over further keys and values in front of its own, (B, T, H, e).

        keys, values: (B, key-value heads, n, e), rotated. there: (B, n) bool, which of them a row has.
        """
        there = there[:, None, None]
        if step.streaming and self.softcap is None and not step.training:
            # The cache is not copied at each token.
            joined = with_columns(self.query, self.keys, self.values, self.mask, keys, values, there, self.scale)
            return joined.transpose(1, 2)
        text = self.bool_mask()
        mask = [there.expand(-1, -1, text.shape[2], -1), text.expand(len(there), -1, -1, -1)]
        return self.plain(
            keys=torch.cat([keys, self.keys], dim=2),
            values=torch.cat([values, self.values], dim=2),
            mask=torch.cat(mask, dim=3),
        )

    def free_query(self) -> Tensor:
        """The query free of position."""
        return self.query if self.rotation is None else unrotate(self.query, *self.rotation)

    def free_keys(self) -> Tensor:
        """This step's keys free of position."""
        return self.new_keys if self.rotation is None else unrotate(self.new_keys, *self.rotation)

    def bool_mask(self) -> Tensor:
        """`mask` as (B or 1, 1, T, K) bool."""
        if self.mask is None:
            queries, keys = self.query.shape[2], self.keys.shape[2]
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device)
            return ones.tril(keys - queries)[None, None]
        return self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min / 2
