"""What a stream remembers, as numbers to look at: sizes, norms, and how far they moved since an earlier commit.

Made from the names and shapes of what the stream carries, so every memory has it. Norms only: numbers that stand for
tokens or counts are not shown, so no text can be read from it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.memory import Segment, SlotUse
from ..hosts.stream import Stream

MOST_ROWS, MOST_COLUMNS = 64, 128
"""Of a map; more are drawn together."""

_BLOCK = re.compile(r"(?:(.*)/)?(\d+)/([^/]+)")


@torch.no_grad()
def memory_view(stream: Stream, before: Stream | None = None) -> dict[str, Any]:
    """
    Args:
        stream: of one row; it is not changed. before: the same stream at an earlier commit, to compare with.

    Returns: for JSON:
        memory: its name. tokens_open: tokens read since it was last written; None for one that writes at every token.
        bytes: of the state; of buffers that it changes as it reads; of all else that is carried (open segment, last
        logits).
        tensors: of state and buffers, without the batch: name, shape, dtype, bytes, norm, and change, the norm of the
        difference; None where a tensor holds no floating-point numbers, or had another shape.
        maps: norms and changes by row and column. A tensor (n, d) is one row of n vectors; one with more dimensions
        has its first two as rows and columns; tensors "<block>/name" of one shape are joined, a row for each block
        (`blocks`).
        `each`: how many rows and columns one number stands for.
        reads: by block, the share of its attention that each slot got from the tokens read since the last write; empty
        for memories without slots, and for those that keep what this needs only while they are diagnosed.
        diagnostics: gates and what else the memory tells of itself, as if it were written now; empty where only a whole
        segment can be written.
        Both are empty where no token has been read since the last write, and where the memory writes with tokens or a
        pass of its own behind a segment.
    """
    now, then = _tensors(stream), {} if before is None else _tensors(before)
    cache, state = stream.cache, stream.state
    opened = _open_segment(stream)
    told = {} if opened is None else _diagnostics(stream, opened)
    used = {} if opened is None else _slot_use(stream, opened)
    buffers = sum(t.numel() * t.element_size() for t in cache.buffers.values())
    return {
        "memory": stream.base.memory.name,
        "tokens_open": int(cache.open[0] % cache.layout.every) if stream.base.memory.uses("commit") else None,
        "bytes": {"state": state.nbytes, "buffers": buffers, "other": cache.nbytes - state.nbytes - buffers},
        "tensors": [_described(name, t, then.get(name)) for name, t in now.items()],
        "maps": [found for name, group in _groups(now) if (found := _map(name, group, now, then)) is not None],
        "reads": [
            {"block": block, "each": _each(use.read.shape[2], MOST_COLUMNS), "shares": _numbers(_shares(use.read))}
            for block, use in used.items()
        ],
        "diagnostics": {name: _number(value) for name, value in sorted(told.items())},
    }


def _tensors(stream: Stream) -> dict[str, Tensor]:
    held = {**stream.state, **{f"buffers/{name}": t for name, t in stream.cache.buffers.items()}}
    return {name: t[0] for name, t in held.items()}


def _open_segment(stream: Stream) -> Segment | None:
    """What a commit would get now, as far as it is the text's."""
    memory, cache, layout = stream.base.memory, stream.cache, stream.cache.layout
    count = int(cache.open[0] % layout.every)
    if not count or layout.continuous or layout.write or memory.write_pass:
        return None
    trace = {i: {name: t[:, :count] for name, t in kept.items()} for i, kept in cache.trace.items()}
    return Segment(trace, start=(cache.seen - cache.open).to(stream.base.device))


def _diagnostics(stream: Stream, segment: Segment) -> dict[str, Tensor]:
    try:
        return stream.base.memory.diagnostics(stream.state, segment)
    except ValueError:
        # LM2's identity routing needs a token for every slot.
        return {}


def _slot_use(stream: Stream, segment: Segment) -> dict[int, SlotUse]:
    try:
        return stream.base.memory.slot_use(stream.state, segment)
    except KeyError:
        # A tensor of the trace that `Step.diagnosing` alone makes a memory keep.
        return {}


def _described(name: str, tensor: Tensor, before: Tensor | None) -> dict[str, Any]:
    moved = _difference(tensor, before)
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bytes": tensor.numel() * tensor.element_size(),
        "norm": _number(_wide(tensor).norm()) if tensor.is_floating_point() else None,
        "change": None if moved is None else _number(moved.norm()),
    }


def _groups(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, dict[int | None, str]]]:
    """Names of maps, and the tensors that each joins, by block; None for a tensor of no block."""
    groups: dict[tuple[Any, ...], dict[int | None, str]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        found = _BLOCK.fullmatch(name)
        if found is None:
            groups[name, tensor.shape] = {None: name}
        else:
            scope = "" if found[1] is None else f"{found[1]}/"
            groups.setdefault((f"{scope}{found[3]}", tensor.shape), {})[int(found[2])] = name
    return ((key[0], group) for key, group in groups.items())


def _map(
    name: str, group: Mapping[int | None, str], now: Mapping[str, Tensor], then: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    norms = _grid([now[n] for n in group.values()], blocks=None not in group)
    if norms.numel() < 2:
        return None
    moved = [_difference(now[n], then.get(n)) for n in group.values()]
    known = [m for m in moved if m is not None]
    changes = _grid(known, blocks=None not in group) if len(known) == len(moved) else None
    each = [_each(norms.shape[0], MOST_ROWS), _each(norms.shape[1], MOST_COLUMNS)]
    labels = list(group) if None not in group else list(range(norms.shape[0]))
    return {
        "name": name,
        "blocks": None not in group,
        "rows": labels[:: each[0]],
        "each": each,
        "norms": _numbers(_joined(norms, each)),
        "changes": None if changes is None else _numbers(_joined(changes, each)),
    }


def _grid(tensors: list[Tensor], blocks: bool) -> Tensor:
    """(rows, columns)"""
    rows = [_wide(t) for t in tensors]
    if blocks:
        return torch.stack([t.norm()[None] if t.dim() < 2 else t.flatten(1).norm(dim=-1) for t in rows])
    tensor = rows[0]
    if tensor.dim() < 2:
        return tensor.norm()[None, None]
    return tensor.norm(dim=-1)[None] if tensor.dim() == 2 else tensor.flatten(2).norm(dim=-1)


def _joined(grid: Tensor, each: list[int]) -> Tensor:
    """Norms of so many neighbours together."""
    for dim, count in enumerate(each):
        grid = torch.stack([part.square().sum(dim) for part in grid.split(count, dim)], dim).sqrt()
    return grid


def _shares(read: Tensor) -> Tensor:
    """Of the attention of one row's tokens, (1, tokens, slots)."""
    shares = _wide(read[0]).mean(0)
    return torch.stack([part.sum() for part in shares.split(_each(len(shares), MOST_COLUMNS))])


def _each(size: int, most: int) -> int:
    return -(-size // most)


def _difference(tensor: Tensor, before: Tensor | None) -> Tensor | None:
    if before is None or before.shape != tensor.shape or not tensor.is_floating_point():
        return None
    return _wide(tensor) - _wide(before)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _numbers(tensor: Tensor) -> list[Any]:
    if tensor.dim() > 1:
        return [_numbers(row) for row in tensor]
    return [_number(value) for value in tensor.tolist()]


def _number(value: Tensor | float) -> float | None:
    """Six digits are enough to look at; JSON has no infinity."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None
