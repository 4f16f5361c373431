"""Capture: what a memory does while a stream reads, commit by commit.

Nothing is captured but inside the context; outside of it reading costs what it always does. Effective rank: Roy and
Vetterli, The effective rank, EUSIPCO 2007.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError, UnsupportedError
from ..core.memory import Memory, Segment, SlotUse
from ..core.state import State
from ..hosts import MemoryHost, Stream, base_model


@dataclass(frozen=True)
class Look:
    """What a memory did with T tokens. Tensors are float32 on the CPU; N slots.

    ids: (T,) int64. every: tokens between commits. commits: tokens of these read at each commit.
    reads: by block, the weights with which each token read the slots, (T, N). writes: by block, how much of each slot's
    write came from each token, (T, N), 0 for tokens not written yet; see `SlotUse`. banks: by block, the bank it uses.
    All empty for a memory without `slot_use`.
    diagnostics: of each commit, the memory's diagnostics. ranks: by bank, its effective rank before the first commit
    and after each.
    """

    ids: Tensor
    every: int
    commits: tuple[int, ...]
    reads: Mapping[int, Tensor]
    writes: Mapping[int, Tensor]
    banks: Mapping[int, str]
    diagnostics: tuple[Mapping[str, float], ...]
    ranks: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Stretch:
    """The tokens between two commits, with the state that they read and what was kept of them."""

    state: State
    segment: Segment
    tokens: int


class Capture:
    """What was captured so far; see `capture`. stretches: only if they are kept, those since the last commit behind."""

    def __init__(self, stream: Stream, keep: bool):
        self.memory: Memory = stream.base.memory
        self.stretches: list[Stretch] = []
        self.commits: list[int] = []
        self.diagnostics: list[dict[str, float]] = []
        self.ranks: dict[str, list[float]] = {}
        self._uses: list[dict[int, SlotUse]] = []
        self._stream, self._keep, self._begin = stream, keep, stream.tokens_seen
        self._rank(stream.state)

    def look(self, ids: Sequence[int] | Tensor) -> Look:
        """The whole as plain data; `ids` are all tokens read inside the context.

        Raises:
            InputError: another number of them.
        """
        given = torch.as_tensor(ids).flatten().cpu()
        last = self.commits[-1] if self.commits else 0
        read = sum(next(iter(use.values())).read.shape[1] for use in self._uses) if self._uses else len(given)
        if len(given) != read or len(given) < last:
            raise InputError(f"{len(given)} ids for {max(read, last)} captured tokens; give those read in the context.")
        layers = list(self._uses[0]) if self._uses else []
        return Look(
            ids=given,
            every=self._stream.cache.layout.every,
            commits=tuple(self.commits),
            reads={i: torch.cat([use[i].read[0] for use in self._uses]) for i in layers},
            writes={i: torch.cat([_written(use[i], last, n) for use, n in self._placed()]) for i in layers
                    if self._uses[0][i].written is not None},
            banks={i: self._uses[0][i].bank for i in layers},
            diagnostics=tuple(self.diagnostics),
            ranks={bank: tuple(ranks) for bank, ranks in self.ranks.items()},
        )  # fmt: skip

    def _placed(self) -> Iterator[tuple[dict[int, SlotUse], int]]:
        """Each use, with the tokens read at its end."""
        end = 0
        for use in self._uses:
            end += next(iter(use.values())).read.shape[1]
            yield use, end

    def _committed(self, before: State, segment: Segment, after: State, found: dict[str, Tensor]) -> None:
        self.commits.append(int(self._stream.cache.seen) - int(self._begin))  # pyright: ignore[reportArgumentType]
        self.diagnostics.append({name: float(value) for name, value in found.items()})
        self._rank(after)
        self._add(before, segment, self._stream.cache.layout.every)

    def _add(self, state: State, segment: Segment, tokens: int) -> None:
        with torch.no_grad():
            used = self.memory.slot_use(state, segment)
        if used:
            self._uses.append({i: _plain(use) for i, use in used.items()})
        if self._keep:
            # What a stream keeps of tokens is written over in place.
            kept = {i: {n: t.clone() for n, t in trace.items()} for i, trace in segment.trace.items()}
            self.stretches.append(Stretch(state, replace(segment, trace=kept), tokens))

    def _rank(self, state: State) -> None:
        for bank, slots in self.memory.banks(state).items():
            self.ranks.setdefault(bank, []).append(effective_rank(slots[0]))

    def _close(self) -> None:
        cache = self._stream.cache
        tokens = int(cache.open) % cache.layout.every
        if tokens and cache.trace:
            trace = {i: {n: t[:, :tokens] for n, t in kept.items()} for i, kept in cache.trace.items()}
            self._add(self._stream.state, Segment(trace, start=cache.seen - cache.open), tokens)


@contextmanager
def capture(stream: Stream, *, keep: bool = False) -> Iterator[Capture]:
    """Captures what the memory does while the stream reads inside the context.

    Args:
        stream: of one row, at a border between commits. keep: what memories keep of tokens too, for `read_maps`.

    Raises:
        InputError: several rows, a stream in the midst of a segment, or one that is captured already.
    """
    cache = stream.cache
    if stream.batch_size != 1:
        raise InputError(f"A capture is of one row; this stream has {stream.batch_size}. Take one: stream.select([0]).")
    if int(cache.open) % cache.layout.every:
        raise InputError(
            f"The stream stands {int(cache.open) % cache.layout.every} tokens behind a commit; captures begin at a "
            f"commit (every {cache.layout.every} tokens) or with a new stream."
        )
    if cache.watch is not None:
        raise InputError("This stream is captured already; captures cannot be nested.")
    captured = Capture(stream, keep)
    cache.watch = captured._committed
    try:
        yield captured
        captured._close()
    finally:
        cache.watch = None


def look(source: Any, ids: Sequence[int] | Tensor) -> Look:
    """Reads ids and captures what the memory does; source: an attached model, for a new stream, or a stream.

    Raises:
        InputError: see `capture` and `Stream.feed`. UnsupportedError: see `stream_of`.
    """
    stream = stream_of(source)
    with capture(stream) as captured:
        stream.feed(ids)
    return captured.look(ids)


def stream_of(source: Any) -> Stream:
    """A new stream of an attached model, or the stream that is given.

    Raises:
        UnsupportedError: an encoder or encoder-decoder, whose texts are no streams.
    """
    if isinstance(source, Stream):
        return source
    base = base_model(source)
    if not isinstance(base, MemoryHost):
        raise UnsupportedError(
            f"{base.mnemic.host_class.__name__} reads no streams; looking inside is for causal language models."
        )
    return Stream(base)


def effective_rank(slots: Tensor) -> float:
    """exp of the entropy of the singular values of (N, d), scaled to sum to 1: 1 to min(N, d), and 0 for zeros."""
    values = torch.linalg.svdvals(slots.detach().float().cpu())
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def _plain(use: SlotUse) -> SlotUse:
    written = None if use.written is None else use.written.detach().float().cpu()
    return SlotUse(use.bank, use.read.detach().float().cpu(), written)


def _written(use: SlotUse, last: int, end: int) -> Tensor:
    assert use.written is not None
    return use.written[0] if end <= last else torch.zeros_like(use.written[0])
