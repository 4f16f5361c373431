"""One segment through an encoder that has a memory, for encoders and for the encoder of an encoder-decoder.

A row's input is `[before ; memory ; between ; text ; after]`, padding last. Attention is two-way, so the read tokens
are the write tokens too: their last hidden states reach `commit` as `written`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError, StateError, UnsupportedError
from ..core.memory import Memory, Segment
from ..core.state import State
from ..core.step import Frame
from .frame import current, running


@dataclass(frozen=True)
class EncodedSegment:
    """What a segment gave.

    output: what `call` returned. hidden: last hidden states of the whole input (B, Q, d). mask: (B, Q) bool, False for
    padding. first: column of the first text token. state: after the commit. frame: the step's, for `Memory.encoded`
    and its losses. segment: what the commit got.
    """

    output: Any
    hidden: Tensor
    mask: Tensor
    first: int
    state: State
    frame: Frame
    segment: Segment


class EncodedHook:
    """Forward hook of the module that runs the encoder's layers: keeps its last hidden state in the frame."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        frame = current()
        if frame is not None:
            frame.hidden = output[0]


def encode_segment(
    memory: Memory,
    state: State,
    access: Any,
    call: Callable[..., Any],
    embeds: Tensor,
    real: Tensor,
    *,
    before: Tensor | None = None,
    between: Tensor | None = None,
    after: Tensor | None = None,
    start: Tensor | None = None,
    segment: int = 0,
    training: bool = False,
) -> EncodedSegment:
    """Run the host on one segment of every row, and commit.

    Args:
        access: see `core.step.Host`. call: the host, called with `inputs_embeds` (B, Q, d) and `attention_mask` (B, Q)
            int64; a module under it has an `EncodedHook`.
        embeds: the text's input embeddings (B, T, d). real: (B, T) bool, True for text; the tokens of a row stand next
            to each other from the first column on. Rows without any keep their state, bit for bit.
        before, between, after: special tokens (1, n, d) in front of the memory tokens, behind them, behind the text.
        start: (B,) int64, tokens of each row before this segment; 0 by default. segment: tokens of a complete one.
        training: the host is in training mode.
    """
    rows, tokens, width = embeds.shape
    nothing = embeds.new_zeros(1, 0, width)
    before, between, after = (nothing if part is None else part for part in (before, between, after))
    slots = nothing
    if memory.num_read_tokens:
        slots = memory.tokens(state)[0].to(embeds.dtype)
    ahead, behind = before.shape[1] + slots.shape[1] + between.shape[1], after.shape[1]
    parts = [part.expand(rows, -1, -1) for part in (before, slots, between, embeds, after)]
    lengths = real.sum(1)
    given = torch.cat(parts, dim=1)
    columns = torch.arange(given.shape[1], device=embeds.device)
    whole = bool(real.all())
    if behind and not whole:
        given = _closed_up(given, columns, ahead + lengths[:, None], ahead + tokens, behind)
    mask = columns < ahead + lengths[:, None] + behind
    if not ahead + behind:
        # A row without any key has no attention; what it gives counts for nothing.
        mask = mask | ((lengths == 0)[:, None] & (columns == 0))
    frame = _frame(memory, state, access, embeds, real, start, ahead, behind, segment, training)
    with running(frame):
        output = call(inputs_embeds=given, attention_mask=mask.long())
    hidden = frame.hidden
    assert hidden is not None
    if memory.keeps_hidden:
        frame.trace.setdefault(-1, {})["hidden"] = hidden
    text = slice(ahead, ahead + tokens)
    trace = {i: {n: t[:, text] for n, t in layer.items()} for i, layer in frame.trace.items()}
    if memory.keeps_embeddings:
        trace.setdefault(-1, {})["embeddings"] = embeds
    first = before.shape[1]
    written = hidden[:, first : first + memory.num_read_tokens] if memory.num_read_tokens else None
    padding = None if whole else real
    done = Segment(trace, written, mask=padding, start=_start(rows, start, embeds.device))
    after_left = State({**state, **frame.left})
    committed = memory.commit(after_left, done)
    if done.losses:
        raise UnsupportedError(
            f"The memory {memory.name!r} adds to the training loss when it commits, which is of decoder hosts alone."
        )
    idle = lengths == 0
    if bool(idle.any()):
        committed = committed if memory.masked_commits else committed.where(idle, state)
    return EncodedSegment(output, hidden, mask, ahead, committed, frame, done)


def check_state(memory: Memory, state: State) -> None:
    """Raises `StateError` unless `state` has the tensors that this memory's states have."""
    first = memory.initial_state(1)
    if memory.constant_size:
        first._check_same(state)
    mine, theirs = ({n: (t.dim(), t.dtype) for n, t in one.items()} for one in (first, state))
    if mine != theirs:
        raise StateError(f"A state of the memory {memory.name!r} has {mine}; got {theirs}.")


def first_state(
    memory: Memory, batch: int, memory_state: State | None, memory_reset: Tensor | None
) -> tuple[State, Tensor]:
    """The state that a call of `batch` rows starts from, and the rows (B,) bool, on the CPU, that carry `memory_state`
    on.

    Raises:
        InputError: rows that do not fit. StateError: the state of another memory or width. UnsupportedError: several
            rows for a memory that reads one.
    """
    anew = torch.full((batch,), memory_state is None) if memory_reset is None else memory_reset.cpu()
    if anew.shape != (batch,) or anew.dtype != torch.bool or (memory_state is None and not bool(anew.all())):
        raise InputError(
            f"memory_reset {anew.tolist()}: expected ({batch},) bool, true wherever there is no memory_state to start "
            "from."
        )
    if batch > 1 and not memory.batch_safe:
        raise UnsupportedError(f"The memory {memory.name!r} reads one row at a time; got {batch}.")
    first = memory.initial_state(batch)
    if memory_state is not None:
        check_state(memory, memory_state)
        if memory_state.batch_size not in (None, batch):
            raise InputError(f"memory_state has {memory_state.batch_size} rows, the input {batch}.")
        if bool(anew.any()) and not memory.constant_size:
            raise UnsupportedError(
                f"The state of the memory {memory.name!r} grows, so rows cannot start anew beside others: give "
                "memory_state or memory_reset for the whole batch."
            )
        first = memory_state if not bool(anew.any()) else memory_state.where(anew, first)
    return first, ~anew


def _closed_up(given: Tensor, columns: Tensor, ends: Tensor, close: int, behind: int) -> Tensor:
    """The input with the `behind` tokens at `close` moved to each row's end of text, `ends` (B, 1), padding last."""
    inside = columns - ends
    source = torch.where(inside < 0, columns, torch.where(inside < behind, close + inside, columns - behind))
    return given.gather(1, source[:, :, None].expand(-1, -1, given.shape[2]))


def _frame(
    memory: Memory,
    state: State,
    access: Any,
    embeds: Tensor,
    real: Tensor,
    start: Tensor | None,
    ahead: int,
    behind: int,
    segment: int,
    training: bool,
) -> Frame:
    """The step's frame; every token that is no text stands outside of the stream."""
    origin = _start(embeds.shape[0], start, embeds.device)
    places = torch.where(real, origin[:, None] + real.cumsum(1) - 1, -1)
    frame = Frame(
        memory,
        state=state,
        host=access,
        real=nn.functional.pad(real, (ahead, behind), value=False),
        places=nn.functional.pad(places, (ahead, behind), value=-1),
        num_read=ahead,
        num_write=behind,
        segment=segment,
        training=training,
        reached=set(),
    )
    with running(frame):
        frame.reads = memory.prepare(state, access)
        if memory.uses("fetch"):
            frame.reads = {**frame.reads, **memory.fetch(state, embeds, frame.at(-1))}
    if not (ahead or behind) and bool(real.all()):
        frame.real = None
    return frame


def _start(rows: int, start: Tensor | None, device: torch.device) -> Tensor:
    return torch.zeros(rows, dtype=torch.long, device=device) if start is None else start.to(device)
