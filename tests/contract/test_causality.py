"""Strict causality, and that something is remembered at all."""

import pytest
import torch

from tests.contract.cases import LENGTH, SEGMENT, attached, chunked, pairs, parallel, random_ids
from tests.tiny import VOCABULARY


def _changed(ids, t):
    other = ids.clone()
    other[:, t] = 3 + (ids[:, t] - 3 + 7) % (VOCABULARY - 3)
    return other


@pairs()
def test_no_token_reaches_back(case, host):
    model = attached(case, host)
    ids = random_ids(1, LENGTH)
    places = (0, 3, 7, 8, 12, 15, 16, 23, 24, 28)
    # One after the other: rows of one batch round apart, by how much depends on the CPU.
    logits = parallel(model, ids).logits[0]
    for t in places:
        difference = (parallel(model, _changed(ids, t)).logits[0] - logits).abs().amax(-1)
        assert difference[:t].sum() <= t * 1e-6, f"token {t} changes logits at {difference[:t].nonzero().tolist()}"
        assert difference[t] > 1e-4


@pairs()
def test_no_token_reaches_back_through_a_cache(case, host):
    model = attached(case, host)
    ids = random_ids(1, LENGTH)
    places = (2, 7, 9, 20)
    logits, _ = chunked(model, ids, [5, 1, 9, 8, 6])
    for t in places:
        difference = (chunked(model, _changed(ids, t), [5, 1, 9, 8, 6])[0] - logits)[0].abs().amax(-1)
        assert difference[:t].sum() <= t * 1e-6
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
        # Experts of a host multiply as many rows as come to them: shapes, and so the last bit, may differ.
        assert later == 0 if case.memory == "none" else later < 1e-6
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
