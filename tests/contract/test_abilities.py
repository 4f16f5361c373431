"""What a memory declares about itself is true, and what it cannot do is refused in words."""

from functools import lru_cache

import pytest
import torch

import mnemic
from mnemic.hosts import MemoryCache
from tests.contract.cases import (
    LENGTH,
    SEGMENT,
    assert_states_close,
    attached,
    build,
    case,
    chunked,
    declares,
    pairs,
    parallel,
    random_ids,
)
from tests.tiny import tiny_host


def _positions_end(case, host):
    return case.kind == "continuous" and host in ("gpt2", "opt")


@pairs(usual_hosts=("llama", "gpt2", "gemma2"))
def test_constant_size(case, host):
    if not declares(case).constant_size:
        pytest.skip("declares a growing state")
    model = attached(case, host)
    long = 6 if _positions_end(case, host) else 20
    stream = model.stream().feed(random_ids(1, SEGMENT + 3))
    short = stream.state_bytes
    stream.feed(random_ids(1, (long - 1) * (SEGMENT + 3), seed=2))
    # At the same place in the segment: everything, not only the state.
    assert stream.tokens_seen == long * (SEGMENT + 3)
    assert stream.state_bytes == short
    assert torch.isfinite(stream.cache.last_logits).all()


@pairs(usual_hosts=("llama", "gpt2", "gemma2", "qwen3_moe"))
def test_reorder(case, host):
    """Rows of a cache in another order, some twice, read on as those rows."""
    model = attached(case, host)
    ids, after = random_ids(3, 21), random_ids(3, 14, seed=2)
    _, cache = chunked(model, ids, [21])
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    with torch.no_grad():
        logits = model(after, past_key_values=cache).logits
    whole = parallel(model, torch.cat([ids[order], after], dim=1))
    torch.testing.assert_close(logits, whole.logits[:, 21:], atol=1e-4, rtol=0)
    assert_states_close(cache.state, whole.memory_state)


@pairs(hosts=("llama",))
def test_repeat_select_and_reset(case, host):
    model = attached(case, host)
    ids = random_ids(2, 13)
    _, cache = chunked(model, ids, [13])
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.batch_select_indices(torch.tensor([0, 3]))
    after = random_ids(2, 9, seed=2)
    with torch.no_grad():
        logits = model(after, past_key_values=cache).logits
        torch.testing.assert_close(
            logits, parallel(model, torch.cat([ids, after], 1)).logits[:, 13:], atol=1e-4, rtol=0
        )
        cache.reset()
        again = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(again, parallel(model, ids).logits, atol=1e-4, rtol=0)


@pairs(hosts=("llama", "gpt2"))
def test_taking_tokens_back_is_refused(case, host):
    model = attached(case, host)
    ids = random_ids(1, 13)
    if declares(case).croppable:
        pytest.skip("declares that tokens can be taken back")
    _, cache = chunked(model, ids, [13])
    assert not cache.is_croppable
    with pytest.raises(mnemic.UnsupportedError, match="take tokens back"):
        cache.crop(5)
    with pytest.raises(mnemic.UnsupportedError, match="prompt_lookup_num_tokens"):
        model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=3)
    with pytest.raises(mnemic.UnsupportedError, match="assistant_model"):
        model.generate(ids, max_new_tokens=4, assistant_model=tiny_host(host))


@pairs(hosts=("llama", "gpt2"))
def test_foreign_caches_are_refused(case, host):
    from transformers import DynamicCache

    model = attached(case, host)
    ids = random_ids(1, 13)
    for kind in ("static", "offloaded", "quantized"):
        with pytest.raises(mnemic.UnsupportedError, match="cache_implementation"):
            model.generate(ids, max_new_tokens=4, cache_implementation=kind)
    with pytest.raises(mnemic.InputError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(mnemic.InputError, match="DynamicCache"):
        model.generate(ids, max_new_tokens=4, past_key_values=DynamicCache())


@pairs(hosts=("llama",))
def test_states_of_the_wrong_shape_are_refused(case, host):
    model = attached(case, host)
    if not case.segmented:
        pytest.skip("has no state")
    state = parallel(model, random_ids(2, LENGTH)).memory_state
    with pytest.raises(mnemic.InputError, match="rows"):
        model(random_ids(3, 4), memory_state=state)
    with pytest.raises(mnemic.StateError):
        model(random_ids(2, 4), memory_state=state.map(lambda t: t[..., :-1]))
    cache = chunked(model, random_ids(2, 5), [5])[1]
    with pytest.raises(mnemic.InputError, match="either"):
        model(random_ids(2, 4), memory_state=state, past_key_values=cache)


@pairs(hosts=("llama", "gpt2"))
def test_deep_copies_and_dtypes(case, host):
    """A copy of a model is a model; bfloat16 runs and stays bfloat16."""
    import copy

    model = attached(case, host)
    ids = random_ids(1, LENGTH)
    twin = copy.deepcopy(model)
    assert torch.equal(parallel(twin, ids).logits, parallel(model, ids).logits)
    with torch.no_grad():
        for parameter in twin.memory.parameters():
            parameter.zero_()
    twin.to(torch.bfloat16)
    logits, cache = chunked(twin, ids, [5, 24])
    assert logits.dtype == torch.bfloat16
    # A running state may stay in float32; nothing else does.
    assert all(t.dtype in (torch.bfloat16, torch.float32) for t in cache.state.values() if t.is_floating_point())


@lru_cache
def _attention_is_one(host: str) -> bool:
    """Whether the plain host computes the same either way: transformers 5.17 takes SDPA for Gemma 2, whose soft cap it
    then leaves out."""
    ids = random_ids(1, LENGTH)
    usual, eager = tiny_host(host)(ids).logits, tiny_host(host, attn_implementation="eager")(ids).logits
    return torch.allclose(usual, eager, atol=1e-4, rtol=0)


@pairs(hosts=("llama", "gemma2", "gpt2"))
def test_eager_attention_equals_sdpa(case, host):
    if not _attention_is_one(host):
        pytest.skip(f"{host}: eager attention and SDPA differ without a memory, too")
    fast, slow = attached(case, host), build(case, host, attn_implementation="eager")
    assert slow.config._attn_implementation in ("eager", "mnemic_eager")
    ids, mask = random_ids(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :7], mask[1, 20:] = 0, 0
    expected = parallel(fast, ids, attention_mask=mask)
    got = parallel(slow, ids, attention_mask=mask)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=0)
    cached, cache = chunked(slow, ids, [5, 1, 9, 8, 6], mask)
    assert_states_close(got.memory_state, expected.memory_state)
    assert_states_close(cache.state, expected.memory_state)
    real = mask.bool()
    torch.testing.assert_close(cached[real], expected.logits[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("host", ["llama", "qwen3"])
def test_window_is_the_sliding_window_of_mistral(host):
    """Segment 8 on llama: the numbers of a mistral with the same weights and sliding_window = 8, over 100 tokens."""
    ids = random_ids(2, 100)
    model = attached(case("window"), host)
    if host == "llama":
        sliding = tiny_host("mistral", sliding_window=SEGMENT)
        sliding.load_state_dict(tiny_host("llama").state_dict())
    else:
        sliding = tiny_host("qwen3", use_sliding_window=True, sliding_window=SEGMENT, max_window_layers=0)
        assert set(sliding.config.layer_types) == {"sliding_attention"}
    with torch.no_grad():
        expected = sliding(ids, use_cache=False).logits
        full = tiny_host(host)(ids, use_cache=False).logits
    assert (full - expected).abs().max() > 1e-2
    torch.testing.assert_close(parallel(model, ids).logits, expected, atol=1e-4, rtol=0)
    cached, cache = chunked(model, ids, [1] * 20 + [13, 40, 27])
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=0)
    assert isinstance(cache, MemoryCache)
    assert (
        model.generate(ids[:, :30], max_new_tokens=20).tolist()
        == sliding.generate(ids[:, :30], max_new_tokens=20).tolist()
    )


@pytest.mark.parametrize("host", ["gpt2", "opt"])
def test_window_ends_with_the_table_of_positions(host):
    model = attached(case("window"), host)
    parallel(model, random_ids(1, 128))
    with pytest.raises(mnemic.InputError, match="128"):
        parallel(model, random_ids(1, 129))
    stream = model.stream().feed(random_ids(1, 120))
    with pytest.raises(mnemic.InputError, match="128"):
        stream.feed(random_ids(1, 9))
