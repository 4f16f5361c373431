"""Segments are semantics, chunks are not: how the input is cut into calls changes neither logits nor state."""

import pytest
import torch

import mnemic
from mnemic.core.registry import memory_class
from tests.contract.cases import (
    CASES,
    CHUNKINGS,
    EXCLUDED,
    LENGTH,
    assert_states_close,
    attached,
    chunked,
    pairs,
    parallel,
    random_ids,
)


def test_every_registered_memory_has_a_case():
    covered = {c.memory for c in CASES} | set(EXCLUDED)
    assert {n for n in mnemic.memory_names() if "decoder" in memory_class(n).hosts} <= covered


@pairs()
def test_chunks_change_nothing(case, host):
    model = attached(case, host)
    ids = random_ids(2, LENGTH)
    whole = parallel(model, ids)
    for name, chunks in CHUNKINGS.items():
        logits, cache = chunked(model, ids, chunks)
        torch.testing.assert_close(logits, whole.logits, atol=1e-4, rtol=0, msg=lambda m, n=name: f"chunks {n}: {m}")
        assert_states_close(cache.state, whole.memory_state)
        assert cache.seen.tolist() == [LENGTH] * 2


@pairs(hosts=("llama",))
@pytest.mark.parametrize("seed", range(3))
def test_random_chunks_of_a_long_sequence(case, host, seed):
    model = attached(case, host)
    ids = random_ids(1, 75, seed=seed)
    chunks, generator = [], torch.Generator().manual_seed(seed)
    while sum(chunks) < 75:
        size = int(torch.randint(1, 21, (), generator=generator))
        chunks.append(min(size, 75 - sum(chunks)))
    whole = parallel(model, ids)
    logits, cache = chunked(model, ids, chunks)
    torch.testing.assert_close(logits, whole.logits, atol=1e-4, rtol=0)
    assert_states_close(cache.state, whole.memory_state)


@pairs(usual_hosts=("llama", "gpt2"))
def test_embeddings_instead_of_ids(case, host):
    case.needs("input embeddings")
    model = attached(case, host)
    ids = random_ids(2, LENGTH)
    whole = parallel(model, ids)
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        given = model(inputs_embeds=embeds, use_cache=False)
    torch.testing.assert_close(given.logits, whole.logits, atol=1e-5, rtol=0)
    assert_states_close(given.memory_state, whole.memory_state, atol=1e-5)


@pairs(usual_hosts=("llama", "gpt2"))
def test_logits_to_keep(case, host):
    model = attached(case, host)
    ids = random_ids(2, LENGTH)
    whole = parallel(model, ids).logits
    for keep in (1, 6, 20, LENGTH + 4):
        torch.testing.assert_close(
            parallel(model, ids, logits_to_keep=keep).logits, whole[:, -keep:], atol=1e-5, rtol=0
        )
    chosen = torch.tensor([3, 17, 28])
    torch.testing.assert_close(parallel(model, ids, logits_to_keep=chosen).logits, whole[:, chosen], atol=1e-5, rtol=0)


@pairs(usual_hosts=("llama", "gpt2"))
def test_carried_state_continues(case, host):
    """Two calls at a border, joined by `memory_state` alone, are one call (a window also needs its cache)."""
    # The past of a continuous memory is its cache, not its state.
    case.skip_unless("segmented", "stateless")
    model = attached(case, host)
    ids = random_ids(2, LENGTH)
    whole = parallel(model, ids)
    first = parallel(model, ids[:, :16])
    second = parallel(model, ids[:, 16:], memory_state=first.memory_state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, atol=1e-5, rtol=0)
    assert_states_close(second.memory_state, whole.memory_state, atol=1e-5)
