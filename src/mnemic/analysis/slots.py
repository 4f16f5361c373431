"""Slots: which tokens read and wrote each slot, which slots each token reads, and how evenly slots are used.

Slots' tokens are ranked by the mass that they have above what as many average tokens would have: by mass alone frequent
tokens come first everywhere, by the mean rare ones do.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import InputError
from .captures import Look


@dataclass(frozen=True)
class Share:
    """A token's part in a slot, or a slot's in a token's reads.

    number: token id or slot. mass: sum of weights. mean: mass over the occurrences.
    """

    number: int
    mass: float
    mean: float


@dataclass(frozen=True)
class Usage:
    """share: (N,) of all read mass. entropy: of the shares, over its maximum log N: 1 for even use, 0 for one slot.
    focus: mean over tokens of 1 minus the same entropy of their own reads: 0 where every token reads all slots alike.
    used: slots with at least half of an even share."""

    share: Tensor
    entropy: float
    focus: float
    used: int


@dataclass(frozen=True)
class SlotReport:
    """One block. readers, writers: for each slot its top tokens; writers are empty where nothing was written or the
    memory does not tell them. slots: for each token id its top slots, by mass."""

    block: int
    bank: str
    usage: Usage
    readers: tuple[tuple[Share, ...], ...]
    writers: tuple[tuple[Share, ...], ...]
    slots: dict[int, tuple[Share, ...]]

    def table(self, text: Callable[[int], str] = str) -> str:
        """As CSV: slot, share, readers, writers; `text` names token ids."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["slot", "share", "readers", "writers"])
        for slot, share in enumerate(self.usage.share.tolist()):
            kinds = [self.readers[slot], self.writers[slot] if self.writers else ()]
            writer.writerow([slot, f"{share:.6f}", *(" ".join(text(one.number) for one in kind) for kind in kinds)])
        return out.getvalue()


def slot_report(looks: Look | Sequence[Look], block: int, *, top: int = 5) -> SlotReport:
    """The report of one block over everything that was looked at, in one text or several.

    Raises:
        InputError: a block that reads no slots, or nothing to look at.
    """
    looks = [looks] if isinstance(looks, Look) else list(looks)
    if not looks or any(block not in one.reads for one in looks):
        known = sorted(looks[0].reads) if looks else []
        raise InputError(f"Block {block} reads no slots that it tells; those that do: {known or 'none'}.")
    reads, ids = joined_reads(looks, block), torch.cat([one.ids for one in looks])
    kinds, mass, counts = by_token(reads, ids)
    written = [(one.writes[block], one.ids, done) for one in looks if block in one.writes and (done := _done(one))]
    writes = torch.cat([weights[:done] for weights, _, done in written]) if written else None
    return SlotReport(
        block=block,
        bank=looks[0].banks[block],
        usage=usage(reads),
        readers=_top_tokens(kinds, mass, counts, top),
        writers=()
        if writes is None
        else _top_tokens(*by_token(writes, torch.cat([seen[:done] for _, seen, done in written])), top),
        slots=dict(zip(kinds.tolist(), _top_slots(mass, counts, top), strict=True)),
    )


def joined_reads(looks: Sequence[Look], block: int) -> Tensor:
    """Read weights of all tokens, (T, N)."""
    return torch.cat([one.reads[block] for one in looks])


def _done(look: Look) -> int:
    """Tokens that were written; the others take no part in writes."""
    return look.commits[-1] if look.commits else 0


def usage(reads: Tensor) -> Usage:
    """How evenly slots are read; reads (T, N), a token's weights sum to 1."""
    share = reads.sum(0) / reads.sum()
    most = max(math.log(reads.shape[1]), 1e-9)
    own = torch.special.entr(reads).sum(1) / most
    used = int((share >= 0.5 / reads.shape[1]).sum())
    return Usage(share, float(torch.special.entr(share).sum() / most), float(1 - own.mean()), used)


def by_token(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of weights (T, N) over the occurrences of each token: the ids that occur (K,), mass (K, N), counts (K,)."""
    kinds, place, counts = ids.unique(return_inverse=True, return_counts=True)
    return kinds, weights.new_zeros(len(kinds), weights.shape[1]).index_add(0, place, weights), counts


def _top_tokens(kinds: Tensor, mass: Tensor, counts: Tensor, top: int) -> tuple[tuple[Share, ...], ...]:
    """For each slot; see `by_token`."""
    mean = mass.sum(0) / counts.sum()
    best = (mass - counts[:, None] * mean).topk(min(top, len(kinds)), dim=0).indices.T
    return tuple(
        tuple(Share(int(kinds[k]), float(mass[k, slot]), float(mass[k, slot] / counts[k])) for k in row)
        for slot, row in enumerate(best.tolist())
    )


def _top_slots(mass: Tensor, counts: Tensor, top: int) -> list[tuple[Share, ...]]:
    """For each token; see `by_token`."""
    best = mass.topk(min(top, mass.shape[1]), dim=1).indices
    return [
        tuple(Share(slot, float(mass[k, slot]), float(mass[k, slot] / counts[k])) for slot in row)
        for k, row in enumerate(best.tolist())
    ]
