"""The cache of a stream: its state, its open segment, and each row's place in it.

`MemoryCache` is what `generate()` carries between steps and what a stream saves. Inside one step the host sees a
`SegmentKV`, a view of the open segment's keys and values at the rows' own columns.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..core.errors import InputError, UnsupportedError
from ..core.memory import Segment
from ..core.state import Rows, State
from .attention import routed
from .frame import current
from .layout import Layout


class KeyValues:
    """Keys and values of one layer over the columns of the layout, each (B, columns, heads, head width)."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def map(self, function) -> "KeyValues":
        return KeyValues(function(self.keys), function(self.values))


class SegmentKV(Cache):
    """What the host's attention sees in one step: new keys go to each row's columns, all up to `limit` come back.

    `new` has, by layer, what this step brought. `features` does the same for what a memory keeps beside them.
    """

    def __init__(
        self, cache: "MemoryCache", layout: Layout, columns: Tensor, start: int | None, limit: int, base: int = 0
    ):
        super().__init__(layers=[])
        self.stored, self.kept = cache.keys_values, cache.features
        self.layout, self.columns, self.start, self.limit, self.base = layout, columns, start, limit, base
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, Q, e) in; those of the visible columns, (B, heads, limit, e), out."""
        frame = current()
        if frame is not None:
            key_states, value_states = routed(frame, layer_idx, key_states, value_states)
            self.new[layer_idx] = (key_states, value_states)
            if self.layout.own and layer_idx in frame.memory.layers:
                return key_states, value_states
        layer = self.base + layer_idx
        stored = self.stored.get(layer)
        keys = self._write(None if stored is None else stored.keys, key_states.transpose(1, 2))
        values = self._write(None if stored is None else stored.values, value_states.transpose(1, 2))
        self.stored[layer] = KeyValues(keys, values)
        return keys[:, : self.limit].transpose(1, 2), values[:, : self.limit].transpose(1, 2)

    def features(self, name: str, new: Tensor) -> Tensor:
        self.kept[name] = self._write(self.kept.get(name), new)
        return self.kept[name][:, : self.limit]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, *args, **kwargs) -> tuple[int, int]:
        # Hosts that get here would build their own mask and lose the rows' places.
        raise UnsupportedError("This host builds its attention mask itself although one was given to it.")

    def _write(self, stored: Tensor | None, new: Tensor) -> Tensor:
        """`new` (B, Q, ...) at the rows' columns of `stored` (B, columns, ...)."""
        if stored is None:
            stored = new.new_zeros(new.shape[0], self.layout.columns, *new.shape[2:])
        rows = torch.arange(new.shape[0], device=new.device)[:, None]
        if torch.is_grad_enabled() and (new.requires_grad or stored.requires_grad):
            return stored.index_put((rows, self.columns), new)
        if self.start is not None:
            stored[:, self.start : self.start + new.shape[1]] = new
        else:
            stored[rows, self.columns] = new
        return stored


class MemoryCache(Cache):
    """State, open segment and counters of B streams.

    state: what the memory remembers; None until the first call tells the batch size.
    reads: `Memory.prepare` of that state, recomputed when absent.
    open, seen: (B,) int64 on the CPU: tokens in the open segment, tokens read in all.
    keys_values: per layer, the open segment's.
    features: by name, what the memory keeps beside them, (B, columns, ...).
    trace: per layer, what the memory keeps of the tokens since the last commit, (B, every, ...).
    buffers: tensors (B, ...) that the memory changes in place.
    finished: (B,) bool on the CPU: rows that take no more tokens (ended during generation).
    last_logits: (B, vocabulary) of each row's last token; lets generation start without a prompt.
    watch: called at each commit with the state before it, what happened in the segment, the state after it, and the
    memory's diagnostics. slot_factors: see `Step.slot_factors`. Both are for analysis, and no copy has them.
    """

    def __init__(self, layout: Layout):
        super().__init__(layers=[])
        self.layout = layout
        self.state: State | None = None
        self.reads: State | None = None
        self.open = self.seen = torch.zeros(0, dtype=torch.long)
        self.finished = torch.zeros(0, dtype=torch.bool)
        self.keys_values: dict[int, KeyValues] = {}
        self.features: dict[str, Tensor] = {}
        self.trace: dict[int, State] = {}
        self.buffers: dict[str, Tensor] = {}
        self.last_logits: Tensor | None = None
        self.columns_given = 0
        self.replay = False
        self.watch: Callable[[State, Segment, State, dict[str, Tensor]], object] | None = None
        self.slot_factors: dict[str, Tensor] = {}

    def start(self, state: State, batch_size: int) -> None:
        self.state = state
        self.open, self.seen = (torch.zeros(batch_size, dtype=torch.long) for _ in range(2))
        self.finished = torch.zeros(batch_size, dtype=torch.bool)

    @property
    def started(self) -> bool:
        return self.state is not None

    @property
    def batch_size(self) -> int:
        return len(self.open)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is carried from call to call."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    # What transformers asks of a cache

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input ids that the current `generate()` has given, padding included."""
        return self.columns_given

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, *args, **kwargs) -> None:
        raise UnsupportedError(
            "A stream with memory cannot take tokens back: a commit may have used them. Fork the stream before trying "
            "something, and drop the fork."
        )

    def activate_past_recording(self) -> None:
        self.crop()

    def reset(self) -> None:
        """Forget everything: the next call starts new streams."""
        self.__init__(self.layout)

    # Rows

    def select(self, rows: Rows) -> "MemoryCache":
        """A new cache with copies of the given rows, in that order."""
        if not self.started:
            return self.fork()
        # Picking rows copies every tensor already.
        twin = MemoryCache(self.layout)
        twin.__dict__.update(self.__dict__)
        twin.watch, twin.slot_factors = None, {}
        twin._select(rows)
        return twin

    def fork(self) -> "MemoryCache":
        """An independent copy; nothing it reads changes this one."""
        twin = MemoryCache(self.layout)
        twin.__dict__.update(self.__dict__)
        twin.watch, twin.slot_factors = None, {}
        twin.keys_values = {i: kv.map(Tensor.clone) for i, kv in self.keys_values.items()}
        twin.trace = {i: t.clone() for i, t in self.trace.items()}
        twin.features = {n: t.clone() for n, t in self.features.items()}
        twin.buffers = {n: t.clone() for n, t in self.buffers.items()}
        twin.finished = self.finished.clone()
        return twin

    @staticmethod
    def cat(caches: list["MemoryCache"]) -> "MemoryCache":
        """The rows of several caches of one model, one after another.

        Raises:
            InputError: nothing to join, or a cache that has not read anything.
        """
        if not caches or not all(c.started and c.last_logits is not None for c in caches):
            raise InputError("Join streams that have each read at least one token.")
        joined = MemoryCache(caches[0].layout)
        joined.state = State.cat([c.state for c in caches if c.state is not None])
        for name in ("open", "seen", "finished", "last_logits"):
            setattr(joined, name, torch.cat([getattr(c, name) for c in caches]))
        # A cache without an entry (all its rows stand at a border) contributes zeros: no column of them is visible.
        for i in sorted({i for c in caches for i in c.keys_values}):
            like = next(c.keys_values[i] for c in caches if i in c.keys_values)
            parts = [c.keys_values.get(i) or like.map(_zeros(c.batch_size)) for c in caches]
            joined.keys_values[i] = KeyValues(torch.cat([p.keys for p in parts]), torch.cat([p.values for p in parts]))
        for i in sorted({i for c in caches for i in c.trace}):
            like = next(c.trace[i] for c in caches if i in c.trace)
            joined.trace[i] = State.cat([c.trace.get(i) or like.map(_zeros(c.batch_size)) for c in caches])
        for kind in ("features", "buffers"):
            held = [getattr(c, kind) for c in caches]
            for name in sorted({n for one in held for n in one}):
                like = next(one[name] for one in held if name in one)
                parts = [
                    one[name] if name in one else _zeros(c.batch_size)(like)
                    for one, c in zip(held, caches, strict=True)
                ]
                getattr(joined, kind)[name] = _stacked(parts)
        return joined

    def _select(self, rows: Rows) -> None:
        index = torch.as_tensor(rows, dtype=torch.long)
        pick = lambda t: t.index_select(0, index.to(t.device))  # noqa: E731
        if not self.started:
            return
        assert self.state is not None
        self.state = self.state.select(index)
        self.reads = self.reads.select(index) if self.reads is not None else None
        self.open, self.seen, self.finished = pick(self.open), pick(self.seen), pick(self.finished)
        self.keys_values = {i: kv.map(pick) for i, kv in self.keys_values.items()}
        self.trace = {i: t.select(index) for i, t in self.trace.items()}
        self.features = {n: pick(t) for n, t in self.features.items()}
        self.buffers = {n: pick(t) for n, t in self.buffers.items()}
        self.last_logits = None if self.last_logits is None else pick(self.last_logits)

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self.state or {}).values()
        for kv in self.keys_values.values():
            yield from (kv.keys, kv.values)
        for trace in self.trace.values():
            yield from trace.values()
        yield from self.features.values()
        yield from self.buffers.values()
        if self.last_logits is not None:
            yield self.last_logits


def _zeros(batch_size: int):
    return lambda t: t.new_zeros(batch_size, *t.shape[1:])


def _stacked(parts: list[Tensor]) -> Tensor:
    """Rows of all, with zeros where a buffer has grown less than another."""
    shape = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    full = parts[0].new_zeros(sum(p.shape[0] for p in parts), *shape)
    start = 0
    for part in parts:
        full[(slice(start, start + part.shape[0]), *(slice(n) for n in part.shape[1:]))] = part
        start += part.shape[0]
    return full
