"""Rows of a batch: joining in the place of those that left, and taking back a step that failed."""

import pytest
import torch

from mnemic.hosts.cache import MemoryCache
from mnemic.serving.requests import Work
from mnemic.serving.rows import Batch, Job, Undo, put_rows
from tests.serving.serving_models import served_model
from tests.tiny import random_ids


def streams(model, lengths):
    return [model.stream().feed([random_ids(n, seed=i).tolist()]) for i, n in enumerate(lengths)]


def job(stream):
    found = Job(Work(prompt=[]), torch.zeros(0, dtype=torch.long), None, None, lambda event: None)
    found.cache = stream.cache.fork()
    return found


def step(model, cache, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)[:, None], past_key_values=cache, logits_to_keep=1).logits[:, 0]


@pytest.mark.parametrize("memory", ["lm2", "rmt", "window", "titans", "gated-deltanet", "dmc"])
def test_rows_put_in_the_place_of_others_read_on_as_they_would_alone(memory):
    model = served_model(memory)
    # Borders of segments, rows of which nothing is open, and more than one segment.
    parts = streams(model, [3, 8, 13, 17, 21, 5, 16, 30])
    batch = Batch.cat([Batch.of(job(s)) for s in parts[:5]])
    left = [batch.jobs[i] for i in (1, 3)]
    batch.leave([1, 3])
    assert len(batch) == 3
    step(model, batch.cache, [4, 5, 6, 7, 8])
    for i, token in ((0, 4), (2, 6), (4, 8)):
        parts[i].feed([[token]])
    joined = Batch.cat([batch, *(Batch.of(job(s)) for s in parts[5:7])])
    assert all(one not in joined.jobs for one in left)
    order = [0, 5, 2, 6, 4] if joined is batch else [0, 2, 4, 5, 6]
    for number in range(12):
        tokens = [3 + (number + i) % 50 for i in order]
        found = step(model, joined.cache, tokens)
        for row, (i, token) in enumerate(zip(order, tokens, strict=True)):
            parts[i].feed([[token]])
            torch.testing.assert_close(found[row], parts[i].cache.last_logits[0], atol=1e-9, rtol=0)
    seen = [parts[i].tokens_seen for i in order]
    assert joined.cache.seen.tolist() == seen


def test_rows_that_fit_are_put_in_place():
    model = served_model("lm2")
    parts = streams(model, [3, 11, 13])
    cache = MemoryCache.cat([s.cache for s in parts[:2]])
    keys = cache.keys_values[0].keys
    assert put_rows(cache, [1], parts[2].cache)
    assert cache.keys_values[0].keys is keys
    assert cache.seen.tolist() == [3, 13]


def test_rows_that_do_not_fit_change_nothing():
    model = served_model("dmc")
    short, long = streams(model, [3, 200])
    cache = MemoryCache.cat([short.cache, short.cache])
    before = {name: t.clone() for name, t in cache.buffers.items()}
    assert not put_rows(cache, [0], long.cache)
    assert all(torch.equal(t, before[name]) for name, t in cache.buffers.items())
    assert cache.seen.tolist() == [3, 3]


@pytest.mark.parametrize("memory", ["lm2", "dmc", "titans"])
@pytest.mark.parametrize("length", [5, 7])
def test_a_step_taken_back_leaves_no_trace(memory, length):
    """7: the step that is taken back completes a segment and commits."""
    model = served_model(memory)
    stream = streams(model, [length])[0]
    cache, undo = stream.cache.fork(), None
    undo = Undo(cache)
    step(model, cache, [50])
    assert undo.usable
    undo.run()
    for token in (4, 5, 6, 7):
        stream.feed([[token]])
        torch.testing.assert_close(step(model, cache, [token])[0], stream.cache.last_logits[0], atol=1e-9, rtol=0)


def test_a_window_that_has_moved_cannot_be_taken_back():
    model = served_model("window")
    stream = streams(model, [7])[0]
    undo = Undo(stream.cache)
    step(model, stream.cache, [4])
    assert not undo.usable
