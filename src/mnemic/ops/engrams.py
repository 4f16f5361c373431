"""A store of engrams: vectors that live for a while, are linked by firing together, and are found along these links.

Each row has M slots. A slot is empty or holds an engram of working, short-term or long-term memory. Every function
gives a new store, treats each row by itself, and carries no gradient. Source: Memoria (arXiv 2310.03052).

Shapes: B rows, M slots, d width. data (B, M, d), zero where empty. kind (B, M) int64, one of `EMPTY`, `WORKING`,
`SHORT`, `LONG`. lifespan (B, M), above 0 where not empty. born (B, M) int64, an engram's number in its row, -1 where
empty: ids and age at once. counts (B, M, M) int32: how often two engrams fired together, on the diagonal how often one
fired; symmetric, zero where empty. made (B,) int64: engrams made so far.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EMPTY, WORKING, SHORT, LONG = range(4)


class Engrams(NamedTuple):
    data: Tensor
    kind: Tensor
    lifespan: Tensor
    born: Tensor
    counts: Tensor
    made: Tensor


def empty(batch: int, slots: int, width: int, dtype: torch.dtype, device: torch.device) -> Engrams:
    """A store without engrams; dtype is that of data and lifespan."""
    whole = {"dtype": torch.int64, "device": device}
    return Engrams(
        torch.zeros(batch, slots, width, dtype=dtype, device=device),
        torch.zeros(batch, slots, **whole),
        torch.zeros(batch, slots, dtype=dtype, device=device),
        torch.full((batch, slots), -1, **whole),
        torch.zeros(batch, slots, slots, dtype=torch.int32, device=device),
        torch.zeros(batch, **whole),
    )


@torch.no_grad()
def add(store: Engrams, new: Tensor, lifespan: float) -> Engrams:
    """New working engrams (B, N, d), N <= M. Where no slot is free they take those of the shortest lifespan, the oldest
    first."""
    count = new.shape[1]
    by_age = store.born.argsort(dim=1, stable=True)
    order = by_age.gather(1, store.lifespan.gather(1, by_age).argsort(dim=1, stable=True))
    slots = order[:, :count]
    taken = torch.zeros_like(store.kind, dtype=torch.bool).scatter(1, slots, True)
    born = store.made[:, None] + torch.arange(count, device=new.device)
    return Engrams(
        store.data.scatter(1, slots[..., None].expand(-1, -1, new.shape[2]), new.to(store.data.dtype)),
        store.kind.masked_fill(taken, WORKING),
        store.lifespan.masked_fill(taken, lifespan),
        store.born.scatter(1, slots, born),
        _cleared(store.counts, taken),
        store.made + count,
    )


@torch.no_grad()
def recall(store: Engrams, num_short: int, num_long: int, depth: int) -> Tensor:
    """Slots of the engrams that the working ones call back, (B, num_short + num_long) int64, -1 for none.

    Short: those with the largest mean over working engrams of -|w - s|^2. Long: from each of these to the long-term
    engram that it fired with most often (ties by a hash of the engrams' numbers and of how many were made), then
    `depth` times on to the one most often fired with that nobody has been at (ties: the oldest); of all that were found
    those with the largest sum of -|w - l|^2. Engrams that never fired together are linked with a count of 0.

    Mean and sum are ranked by |w_mean - s|^2, from which they differ by what no s changes.
    """
    working = (store.kind == WORKING).to(store.data.dtype)
    mean = (working[:, None] @ store.data) / working.sum(1).clamp_min(1)[:, None, None]
    distance = (store.data - mean).square().sum(-1)
    short = _nearest(distance, store.kind == SHORT, num_short)
    found = _walked(store, short, depth)
    return torch.cat([short, _nearest(distance, found, num_long)], dim=1)


@torch.no_grad()
def fire(store: Engrams, recalled: Tensor) -> Engrams:
    """All pairs of working and recalled engrams, each with itself too, fire once more; recalled as of `recall`."""
    fired = ((store.kind == WORKING) | _marked(recalled, store.kind)).to(store.counts.dtype)
    return store._replace(counts=store.counts + fired[:, :, None] * fired[:, None, :])


@torch.no_grad()
def age(store: Engrams, recalled: Tensor, gain: Tensor, capacity: int) -> Engrams:
    """After a step: recalled engrams (B, R) live longer by `gain` (B, R); all age by 1; working memory becomes
    short-term memory, of which the newest `capacity` stay and the others become long-term; what has no life left goes.
    """
    slots = store.kind.shape[1]
    gained = torch.zeros_like(store.lifespan[:, :1]).expand(-1, slots + 1)
    gained = gained.scatter_add(1, recalled.where(recalled >= 0, slots), gain.to(store.lifespan.dtype))[:, :slots]
    lifespan = store.lifespan + gained - 1
    kind = store.kind.masked_fill(store.kind == WORKING, SHORT)
    newest = store.born.where(kind == SHORT, -1).topk(min(capacity, slots), dim=1).values[:, -1:]
    kind = kind.masked_fill((kind == SHORT) & (store.born < newest), LONG)
    gone = (kind == EMPTY) | (lifespan <= 0)
    return Engrams(
        store.data.masked_fill(gone[..., None], 0),
        kind.masked_fill(gone, EMPTY),
        lifespan.masked_fill(gone, 0),
        store.born.masked_fill(gone, -1),
        _cleared(store.counts, gone),
        store.made,
    )


def _walked(store: Engrams, short: Tensor, depth: int) -> Tensor:
    """Long-term engrams that are reached from `short` (B, S), as (B, M) bool."""
    long = store.kind == LONG
    ties = _hash(store.born.gather(1, short.clamp_min(0))[..., None], store.born[:, None], store.made[:, None, None])
    here = _best(store.counts, short, long, ties)
    seen = _marked(here, store.kind)
    oldest = (1 << 40) - 1 - store.born[:, None]
    for _ in range(depth):
        here = _best(store.counts, here, long & ~seen, oldest)
        seen = seen | _marked(here, store.kind)
        # Asking is free on the CPU; elsewhere it would wait for the device.
        if here.device.type == "cpu" and not bool((here >= 0).any()):
            break
    return seen


def _best(counts: Tensor, sources: Tensor, among: Tensor, ties: Tensor) -> Tensor:
    """For each source (B, S) the slot of `among` (B, M) with the largest count, (B, S); of equal ones that with the
    largest of `ties` (B, S or 1, M), whole numbers in [0, 2^40). -1 without a source or a target."""
    rows = torch.arange(len(counts), device=counts.device)[:, None]
    score = (counts[rows, sources.clamp_min(0)].long() << 40) + ties
    score, slot = score.masked_fill(~among[:, None], -1).max(-1)
    return slot.masked_fill((score < 0) | (sources < 0), -1)


def _hash(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Numbers in [0, 2^40) that look random; the product wraps around."""
    x = a * 0x1E3779B97F4A7C15 + b * 0x3F58476D1CE4E5B9 + c * 0x14D049BB133111EB
    x = (x ^ (x >> 29)) * 0x2545F4914F6CDD1D
    return (x ^ (x >> 31)) & ((1 << 40) - 1)


def _nearest(distance: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` slots of `among` (B, M) with the smallest distance, (B, count), -1 where there are fewer."""
    k = min(count, distance.shape[1])
    found, slot = distance.masked_fill(~among, float("inf")).topk(k, dim=1, largest=False)
    slot = slot.masked_fill(found.isinf(), -1)
    return torch.nn.functional.pad(slot, (0, count - k), value=-1)


def _marked(chosen: Tensor, like: Tensor) -> Tensor:
    """Slots (B, R), -1 for none, as a mask (B, M)."""
    slots = like.shape[1]
    mask = torch.zeros(len(like), slots + 1, dtype=torch.bool, device=like.device)
    return mask.scatter(1, chosen.where(chosen >= 0, slots), True)[:, :slots]


def _cleared(counts: Tensor, slots: Tensor) -> Tensor:
    """Counts without those of `slots` (B, M) bool."""
    return counts.masked_fill(slots[:, :, None] | slots[:, None, :], 0)
