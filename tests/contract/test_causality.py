"""Strict causality, and that something is remembered at all."""

import pytest
import torch

from tests.contract.cases import LENGTH, SEGMENT, attached, chunked, pairs, parallel, random_ids
from tests.tiny import VOCABULARY

ROUNDING = 4e-6
"""A few bits of float32 logits: rows of one batch round apart, by how much depends on the CPU."""


def _changed(ids, t):
    other = ids.clone()
    other[:, t] = 3 + (ids[:, t] - 3 + 7) % (VOCABULARY - 3)
    return other


@pairs()
def test_no_token_reaches_back(case, host):
    model = attached(case, host)
    ids = random_ids(1, LENGTH)
    places = (0, 3, 7, 8, 12, 15, 16, 23, 24, 28)
    batch = torch.cat([ids, *[_changed(ids, t) for t in places]])
    logits = parallel(model, batch).logits
    for row, t in enumerate(places, start=1):
        difference = (logits[row] - logits[0]).abs().amax(-1)
        assert difference[:t].sum() <= t * ROUNDING, f"token {t} changes logits at {difference[:t].nonzero().tolist()}"
        assert difference[t] > 1e-4


@pairs()
def test_no_token_reaches_back_through_a_cache(case, host):
    model = attached(case, host)
    ids = random_ids(1, LENGTH)
    places = (2, 7, 9, 20)
    batch = torch.cat([ids, *[_changed(ids, t) for t in places]])
    logits, _ = chunked(model, batch, [5, 1, 9, 8, 6])
    for row, t in enumerate(places, start=1):
        difference = (logits[row] - logits[0]).abs().amax(-1)
        assert difference[:t].sum() <= t * ROUNDING
        assert difference[t] > 1e-4


@pairs()
def test_the_past_beyond_the_segment_is_remembered(case, host):
    """A token of the first segment is felt two segments later by a memory, and not at all without one."""
    case.needs("memory across segments")
    model = attached(case, host)
    ids = random_ids(1, LENGTH)
    # One after the other: rows side by side round apart.
    one, other = (parallel(model, x).logits[0] for x in (ids, _changed(ids, 3)))
    later = (other - one)[2 * SEGMENT + 1 :].abs().max()
    if case.kind == "stateless":
        assert later == 0
    elif case.segmented:
        assert later > 1e-5


@pytest.mark.parametrize("t", [1, 6])
@pairs(hosts=("llama",))
def test_padding_columns_do_not_leak(case, host, t):
    """What stands in a padding column is never read."""
    model = attached(case, host)
    ids = random_ids(1, LENGTH)
    mask = torch.ones_like(ids)
    mask[:, t] = 0
    one, other = (parallel(model, x, attention_mask=mask) for x in (ids, _changed(ids, t)))
    assert torch.equal(one.logits, other.logits)
    assert one.memory_state.equal(other.memory_state)
