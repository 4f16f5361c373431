"""The log-probability of given tokens: rows of any length, read segment by segment from a new state, never cut.

Many ways to go on from one row share its reading. Only the logits of the scored positions are kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..hosts import base_model
from ..hosts.inputs import check_vocabulary

_UNSCORED_SEGMENTS = 16

Scores = tuple[Tensor, Tensor]
"""Log-probabilities (m,) float64 in nats, and whether each token is the likeliest one, (m,) bool."""


@torch.no_grad()
def score_ends(
    model: Any, rows: Sequence[Sequence[int]], ends: Sequence[Sequence[Sequence[int]]], *, batch_size: int = 1
) -> Iterator[tuple[int, list[Scores]]]:
    """What the model thinks of ways to go on.

    Every row begins with a new state; nothing is kept from one to the next. Batches hold rows of similar length.

    Args:
        model: an attached model.
        rows: token ids that are read.
        ends: for each row one or more sequences of m tokens; token j of m is predicted after the first n - m + j + 1
            of the row's n tokens. So a text t is scored from its second token on by the row t[:-1] and the end t[1:].
        batch_size: rows side by side.

    Yields: index of a row and the scores of its ends; every row once, the longest first.

    Raises:
        InputError: an empty row, an end that is empty or longer than its row, or ids outside the vocabulary.
    """
    base = base_model(model)
    base.eval()
    vocabulary = base.get_input_embeddings().weight.shape[0]
    for i, (row, given) in enumerate(zip(rows, ends, strict=True)):
        if not len(row) or not len(given) or not all(1 <= len(end) <= len(row) for end in given):
            raise InputError(
                f"Row {i} of {len(row)} tokens with ends of {[len(end) for end in given]}: expected ends of 1 to as "
                "many tokens as the row has; put a start token before a text whose first token is to be scored."
            )
        check_vocabulary(torch.tensor([*row, *(token for end in given for token in end)]), vocabulary)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), tuple(rows[i])))
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        yield from zip(group, _scores(base, [rows[i] for i in group], [ends[i] for i in group]), strict=True)


def _scores(
    base: Any, rows: Sequence[Sequence[int]], ends: Sequence[Sequence[Sequence[int]]]
) -> Iterator[list[Scores]]:
    # Right-padded: the rows' segments then begin in the same columns.
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    first = lengths - torch.tensor([max(len(end) for end in given) for given in ends])
    # One row of targets for each end, aligned with the positions that predict them; -1 where there is none.
    owner = [i for i, given in enumerate(ends) for _ in given]
    targets = torch.full((len(owner), ids.shape[1]), -1)
    for target, row, end in zip(targets, owner, (end for given in ends for end in given), strict=True):
        target[lengths[row] - len(end) : lengths[row]] = torch.tensor(list(end))
    parts: list[list[Scores]] = [[] for _ in owner]
    cache, start = None, 0
    for stop in _stops(base.mnemic.layout.segment, int(first.min()), ids.shape[1]):
        mask = torch.arange(start, stop) < lengths[:, None]
        scored = bool((targets[:, start:stop] >= 0).any())
        output = base(
            ids[:, start:stop].to(base.device),
            attention_mask=mask.long().to(base.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if scored else 1,
        )
        cache = output.past_key_values
        for k, row in enumerate(owner):
            places = (targets[k, start:stop] >= 0).nonzero().squeeze(1)
            if len(places):
                chosen = targets[k, start + places].to(base.device)
                logits = output.logits[row, places.to(base.device)]
                log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                likeliest = log_probs.argmax(-1) == chosen
                parts[k].append((log_probs.gather(1, chosen[:, None])[:, 0].double().cpu(), likeliest.cpu()))
        start = stop
    joined = [(torch.cat([a for a, _ in part]), torch.cat([b for _, b in part])) for part in parts]
    for i in range(len(rows)):
        yield [one for one, row in zip(joined, owner, strict=True) if row == i]


def _stops(segment: int, first: int, width: int) -> Iterator[int]:
    """Where the calls end: one segment each from the first scored column on, many before it."""
    unscored, far = first // segment * segment, _UNSCORED_SEGMENTS * segment
    yield from range(far, unscored, far)
    if unscored:
        yield unscored
    yield from (min(stop, width) for stop in range(unscored + segment, width + segment, segment))
