"""Replay: gradients through any number of segments with the activations of one.

Each segment runs inside activation checkpointing as a function of the state that enters it, and gives the next state
and its own part of the loss. Between segments only states are kept; the backward pass runs one segment after another
again, the last first. Gradients are those of the whole, and there is one backward call, so nothing around it changes.

Source: memory replay back-propagation, Memformer (2020, arXiv 2010.06891).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import InputError, UnsupportedError
from ..core.state import State
from .cache import MemoryCache
from .segments import Aligned, Piece, Reading

if TYPE_CHECKING:
    from .host import MemoryHost

IGNORED = -100


class Targets:
    """The tokens to predict, by the place in its row of the token that predicts each: the usual shift by one, across
    the borders of segments.

    Args:
        labels: (B, Q), -100 to ignore. keep: how many of the last columns have logits; 0 for all.

    Raises:
        InputError: labels of another shape than the input.
    """

    def __init__(self, aligned: Aligned, labels: Tensor, keep: int):
        if labels.shape != aligned.tokens.shape[:2]:
            expected = tuple(aligned.tokens.shape[:2])
            raise InputError(f"labels of shape {tuple(labels.shape)}, expected {expected}: one for each token.")
        labels = labels.cpu()
        rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        kept = columns >= (labels.shape[1] - keep if keep else 0)
        rows, columns = rows[kept], columns[kept]
        # Padding predicts with the row's last real token before it; -1 where there is none.
        place = columns if aligned.before is None else aligned.before[rows, columns] - 1
        self.place, order = place.sort(stable=True)
        self.rows, self.labels = rows[order], labels[rows, columns + 1][order]

    def __len__(self) -> int:
        return len(self.place)

    def within(self, piece: Piece) -> Tensor:
        """Indices of the targets that the piece predicts; its first piece also takes those that nothing predicts."""
        active = piece.take > 0
        low = -1 if self._first(piece) else int(piece.offset[active].min())
        high = int((piece.offset + piece.take).max())
        near = torch.arange(*torch.searchsorted(self.place, torch.tensor([low, high])).tolist())
        rows, place = self.rows[near], self.place[near]
        mine = (place >= piece.offset[rows]) & (place < (piece.offset + piece.take)[rows]) | (place < 0)
        return near[mine]

    def first_needed(self, piece: Piece) -> int | None:
        """First text position of the piece whose logits are wanted in any row, or None."""
        here = self.within(piece)
        if not len(here):
            # A call without any target has the loss that the host's own function gives it.
            return piece.width - 1 if self._first(piece) else None
        return int((self.place[here] - piece.offset[self.rows[here]]).clamp_min(0).min())

    def pick(self, logits: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """Logits of the piece, (B, n, V) up to its last column -> (1, N + 1, V) and labels (1, N + 1), to be shifted
        as every causal loss does: the last logits predict nothing."""
        here = self.within(piece)
        rows, place = self.rows[here], self.place[here]
        local = (place - piece.offset[rows] - (piece.width - logits.shape[1])).clamp_min(0)
        index = [torch.cat([i, i.new_tensor([last])]).to(logits.device) for i, last in ((rows, 0), (local, -1))]
        picked = logits[index[0], index[1]]
        if bool((place < 0).any()):
            blank = torch.cat([place < 0, torch.tensor([False])])
            picked = picked.masked_fill(blank.to(logits.device)[:, None], 0.0)
        return picked[None], torch.cat([self.labels.new_tensor([IGNORED]), self.labels[here]]).to(logits.device)[None]

    @staticmethod
    def _first(piece: Piece) -> bool:
        return not bool(piece.offset.any())


def check_replay(
    host: "MemoryHost", labels: Tensor | None, logits_to_keep: int | Tensor, persistent: bool
) -> tuple[Tensor, int]:
    """Whether a call can be replayed. Returns its labels, and how many of the last columns count (0: all).

    Raises:
        UnsupportedError: a memory without segments, or a cache that is kept. InputError: no labels, or logits chosen by
        a tensor.
    """
    if host.mnemic.layout.continuous:
        raise UnsupportedError(
            f"replay=True: the memory {host.memory.name!r} reads without segments, so a call is one piece and there is "
            "no border to replay from. Save activations by layer instead, with gradient_checkpointing=True and "
            "gradient_checkpointing_kwargs={'use_reentrant': False} in TrainingArguments."
        )
    if persistent:
        raise UnsupportedError(
            "replay=True keeps states only, no cache of keys and values: leave past_key_values out and set "
            "use_cache=False; memory_state carries the state from call to call."
        )
    if labels is None:
        raise InputError(
            "replay=True takes the loss segment by segment and keeps no logits: give labels. Losses made outside of "
            "the model (label smoothing, compute_loss_func) need replay=False."
        )
    if not isinstance(logits_to_keep, int):
        raise InputError("replay=True keeps no logits to choose from: logits_to_keep must be a number of last columns.")
    return labels, logits_to_keep


def read_replayed(host: "MemoryHost", cache: MemoryCache, call: Reading, labels: Tensor, keep: int, **kwargs: Any):
    """Read a whole call, segment by segment.

    Args:
        labels, keep: see `Targets`. kwargs: for the host's loss.

    Returns: the host's loss, as over all segments joined, and the losses of the memory summed, or None. `cache` and
    `call` have moved on to the end.

    Raises:
        InputError: labels that do not fit the input.
    """
    targets = Targets(call.aligned, labels, keep)
    if kwargs.get("num_items_in_batch") is None:
        kwargs["num_items_in_batch"] = len(targets)
    losses: list[Tensor] = []
    extra: list[Tensor] = []
    while call.unread:
        assert cache.state is not None
        segment = _Segment(host, cache, call, targets, kwargs)
        loss, more, state = checkpoint(
            segment,
            call.aligned.tokens,
            *cache.state.values(),
            use_reentrant=False,
            preserve_rng_state=True,
            context_fn=lambda: (nullcontext(), _buffers_kept(host.memory)),
        )
        losses += [] if loss is None else [loss]
        extra += [] if more is None else [more]
        cache.state, cache.reads = state, None
        cache.open, cache.seen = segment.open, segment.seen
        call.offset, call.commits = segment.offset, segment.commits
        call.found += segment.found
    return torch.stack(losses).sum(), torch.stack(extra).sum() if extra else None


class _Segment:
    """One segment of every row, from the state that enters it: what is run, and run again."""

    def __init__(self, host: "MemoryHost", cache: MemoryCache, call: Reading, targets: Targets, kwargs: dict[str, Any]):
        assert cache.state is not None
        self.host, self.targets, self.kwargs = host, targets, kwargs
        self.names, self.finished = list(cache.state), cache.finished
        self.before = replace(call, found=[], losses=[]), cache.open, cache.seen
        self.passed = False

    def __call__(self, tokens: Tensor, *tensors: Tensor) -> tuple[Tensor | None, Tensor | None, State]:
        """Tokens and the tensors of the state, which stand here for the devices whose random numbers are kept -> the
        host's loss, the memory's, the next state."""
        (before, opened, seen), cache = self.before, MemoryCache(self.before[0].layout)
        call = replace(before, found=[], losses=[])
        cache.start(State(dict(zip(self.names, tensors, strict=True))), tokens.shape[0])
        cache.open, cache.seen, cache.finished = opened, seen, self.finished
        losses: list[Tensor] = []
        while True:
            piece, logits = self.host._read_on(cache, call, self.targets.first_needed)
            if logits is not None:
                picked, labels = self.targets.pick(logits, piece)
                losses.append(self.host._loss(picked, labels, **self.kwargs))
            if not bool((cache.open * (call.offset < call.aligned.lengths)).any()):
                break
        if not self.passed:
            # What the first run leaves; the second must not leave it again.
            self.passed, self.open, self.seen = True, cache.open, cache.seen
            self.offset, self.commits, self.found = call.offset, call.commits, call.found
        assert cache.state is not None
        return _sum(losses), _sum(call.losses), cache.state.map(_alone)


def _sum(losses: list[Tensor]) -> Tensor | None:
    return torch.stack(losses).sum() if losses else None


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without the larger one that it may be a part of, which would be kept with it."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Undo what a second run does to buffers (running statistics): the first run did it already."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            # Around the version counter: the graph holds on to statistics whose values it does not use.
            buffer.data.copy_(before)
