"""A stream is a thing one owns: saved, loaded, forked and joined, it goes on bit for bit."""

import pytest
import torch

import mnemic
from tests.contract.cases import LENGTH, SEGMENT, attached, build, pairs, parallel, random_ids

# At a border and behind it; slow: inside the first segment, one token before a border, and late.
POINTS = (16, 17, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 15, 29)))
MORE = 21


@pytest.mark.parametrize("point", POINTS)
@pairs(usual_hosts=("llama", "gpt2", "gemma2", "opt"))
def test_save_load_fork_go_on_bit_for_bit(case, host, point, tmp_path):
    model = attached(case, host)
    before, after = random_ids(1, point, seed=1), random_ids(1, MORE, seed=2)
    stream = model.stream().feed(before)
    path = tmp_path / "stream.mnemic"
    stream.save(path)
    loaded, fork = model.stream(load=path), stream.fork()
    expected = stream.feed(after, return_logits=True)
    for twin in (loaded, fork):
        assert torch.equal(twin.feed(after, return_logits=True), expected)
        assert twin.state.equal(stream.state)
        assert twin.tokens_seen == stream.tokens_seen == point + MORE
    torch.testing.assert_close(
        expected, parallel(model, torch.cat([before, after], 1)).logits[:, point:], atol=1e-4, rtol=0
    )


@pairs(usual_hosts=("llama", "gpt2"))
def test_a_fork_is_independent(case, host):
    model = attached(case, host)
    stream = model.stream().feed(random_ids(1, 13))
    fork = stream.fork()
    state = stream.state.clone()
    fork.feed(random_ids(1, 30, seed=5))
    assert stream.state.equal(state)
    assert stream.tokens_seen == 13
    alone = model.stream().feed(random_ids(1, 13))
    after = random_ids(1, 10, seed=6)
    assert torch.equal(stream.feed(after, return_logits=True), alone.feed(after, return_logits=True))


@pairs(usual_hosts=("llama", "gpt2"))
def test_rows_out_of_step_are_saved_and_loaded(case, host, tmp_path):
    model = attached(case, host)
    stream = model.stream(3).feed([random_ids(n, seed=n).tolist() for n in (19, 3, 8)])
    stream.feed([random_ids(n, seed=n).tolist() for n in (2, 9, 8)])
    stream.save(tmp_path / "rows.mnemic")
    loaded = model.stream(load=tmp_path / "rows.mnemic")
    after = random_ids(3, MORE, seed=7)
    assert loaded.tokens_seen == [21, 12, 16]
    assert torch.equal(loaded.feed(after, return_logits=True), stream.feed(after, return_logits=True))


@pairs(usual_hosts=("llama", "gpt2"))
def test_streams_are_joined_and_parted(case, host):
    model = attached(case, host)
    parts = [random_ids(1, n, seed=n) for n in (5, 16, 27)]
    after = random_ids(3, 20, seed=8)
    joined = mnemic.Stream.cat([model.stream().feed(p) for p in parts])
    logits = joined.feed(after, return_logits=True)
    for i, part in enumerate(parts):
        alone = model.stream().feed(part)
        expected = alone.feed(after[i : i + 1], return_logits=True)
        torch.testing.assert_close(logits[i : i + 1], expected, atol=1e-4, rtol=0)
    swapped = joined.select([2, 0, 2])
    more = random_ids(1, 9, seed=9).expand(3, -1)
    turned, straight = swapped.feed(more, return_logits=True), joined.feed(more, return_logits=True)
    torch.testing.assert_close(turned, straight[[2, 0, 2]], atol=1e-5, rtol=0)


@pairs(hosts=("llama", "gpt2"))
def test_a_stream_of_another_memory_is_refused(case, host, tmp_path):
    model = attached(case, host)
    model.stream().feed(random_ids(1, LENGTH)).save(tmp_path / "a.mnemic")
    other = build(case, host, segment=2 * SEGMENT) if case.id != "lm2_identity_route" else build(case, "qwen3")
    with pytest.raises(mnemic.StateError):
        other.stream(load=tmp_path / "a.mnemic")


@pairs(usual_hosts=("llama", "gpt2"))
def test_a_reset_stream_has_read_nothing(case, host):
    model = attached(case, host)
    stream = model.stream().feed(random_ids(1, LENGTH))
    ids = random_ids(1, 12, seed=3)
    assert torch.equal(stream.reset().feed(ids, return_logits=True), model.stream().feed(ids, return_logits=True))


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
@pairs(hosts=("llama", "gpt2"))
def test_a_saved_model_gives_the_same_logits(case, host, whole, tmp_path):
    from tests.tiny import tiny_host

    model = attached(case, host)
    mnemic.save(model, tmp_path / "model", whole=whole)
    loaded = mnemic.load(tmp_path / "model", **({} if whole else {"host": tiny_host(host)})).eval()
    ids = random_ids(2, LENGTH)
    assert torch.equal(parallel(loaded, ids).logits, parallel(model, ids).logits)
    model.stream().feed(ids[:1]).save(tmp_path / "s.mnemic")
    assert loaded.stream(load=tmp_path / "s.mnemic").tokens_seen == LENGTH
