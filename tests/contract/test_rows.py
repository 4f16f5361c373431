"""Rows are independent and need not be in step: padding, neighbours and the order of rows change nothing."""

import pytest
import torch

import mnemic
from tests.contract.cases import LENGTH, assert_states_close, attached, chunked, pairs, parallel, random_ids, trimmed

LENGTHS = (29, 17, 5, 8)


def _rows():
    return [random_ids(1, n, seed=i) for i, n in enumerate(LENGTHS)]


def _places(how: str, width: int) -> list[torch.Tensor]:
    """Columns of each row's tokens in a padded batch."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for n in LENGTHS:
        start = {"left": width - n, "right": 0, "holes": None}[how]
        if start is None:
            found.append(torch.randperm(width, generator=generator)[:n].sort().values)
        else:
            found.append(torch.arange(start, start + n))
    return found


def _batch(how: str):
    width = LENGTH + (5 if how == "holes" else 2)
    places = _places(how, width)
    # Padding holds ordinary tokens: whatever stands there must not matter.
    ids, mask = random_ids(len(LENGTHS), width, seed=9), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for i, (row, place) in enumerate(zip(_rows(), places, strict=True)):
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask, places


@pytest.mark.parametrize("how", ["left", "right", "holes"])
@pairs()
def test_padded_rows_equal_rows_alone(case, host, how):
    model = attached(case, host)
    ids, mask, places = _batch(how)
    alone = [parallel(model, row) for row in _rows()]
    whole = parallel(model, ids, attention_mask=mask)
    cached, cache = chunked(model, ids, [ids.shape[1]], mask)
    for i, place in enumerate(places):
        for logits, state in ((whole.logits, whole.memory_state), (cached, cache.state)):
            torch.testing.assert_close(logits[i, place], alone[i].logits[0], atol=1e-4, rtol=0)
            assert_states_close(state.select([i]), alone[i].memory_state)
    assert cache.seen.tolist() == list(LENGTHS)
    if how == "left":
        torch.testing.assert_close(whole.logits[:, -1], torch.cat([a.logits[:, -1] for a in alone]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["left", "holes"])
@pairs()
def test_padded_rows_in_chunks(case, host, how):
    model = attached(case, host)
    ids, mask, places = _batch(how)
    # The first call holds at least one real token of some row.
    chunks = [3, 11, 1, ids.shape[1] - 15]
    logits, cache = chunked(model, ids, chunks, mask)
    for i, (row, place) in enumerate(zip(_rows(), places, strict=True)):
        alone = parallel(model, row)
        torch.testing.assert_close(logits[i, place], alone.logits[0], atol=1e-4, rtol=0)
        assert_states_close(cache.state.select([i]), alone.memory_state)


@pairs()
def test_rows_out_of_step_over_many_calls(case, host):
    """Each row brings any number of tokens, none included, to each call, on either side of the padding."""
    model = attached(case, host)
    generator = torch.Generator().manual_seed(3)
    rows = [random_ids(1, 40, seed=i)[0] for i in range(3)]
    done, kept, cache = [0] * 3, [[] for _ in rows], None
    with torch.no_grad():
        for call in range(12):
            takes = torch.randint(0, 6, (3,), generator=generator).tolist()
            takes = [min(n, 40 - d) for n, d in zip(takes, done, strict=True)]
            takes[call % 3] = max(takes[call % 3], 1) if done[call % 3] < 40 else 0
            width = max(takes)
            ids, mask = torch.full((3, width), 4), torch.zeros(3, width, dtype=torch.long)
            columns = []
            for i, n in enumerate(takes):
                start = (width - n) if call % 2 else 0
                ids[i, start : start + n] = rows[i][done[i] : done[i] + n]
                mask[i, start : start + n] = 1
                columns.append(slice(start, start + n))
                done[i] += n
            output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            for i, where in enumerate(columns):
                kept[i].append(output.logits[i, where])
    assert cache.seen.tolist() == done
    assert len({d // 8 for d in done}) > 1, "the rows should stand in different segments"
    for i, n in enumerate(done):
        alone = parallel(model, rows[i][None, :n])
        torch.testing.assert_close(torch.cat(kept[i]), alone.logits[0], atol=1e-4, rtol=0)
        assert_states_close(cache.state.select([i]), alone.memory_state)


@pairs(usual_hosts=("llama", "gpt2", "gemma2", "qwen3_moe"))
def test_neighbours_change_nothing(case, host):
    model = attached(case, host)
    row = random_ids(1, LENGTH, seed=1)
    calm, wild = random_ids(2, LENGTH, seed=2), random_ids(2, LENGTH, seed=3)
    one, other = (parallel(model, torch.cat([n[:1], row, n[1:]])) for n in (calm, wild))
    torch.testing.assert_close(one.logits[1], other.logits[1], atol=1e-5, rtol=0)
    assert_states_close(one.memory_state.select([1]), other.memory_state.select([1]), atol=1e-5)
    order = torch.tensor([2, 0, 1])
    batch = torch.cat([calm, row])
    straight, turned = parallel(model, batch), parallel(model, batch[order])
    torch.testing.assert_close(turned.logits, straight.logits[order], atol=1e-5, rtol=0)
    assert_states_close(turned.memory_state, straight.memory_state.select(order), atol=1e-5)


@pairs(usual_hosts=("llama", "gpt2"))
def test_an_ended_row_keeps_its_state(case, host):
    """Row 1 ends in an open segment; row 0 reads on over several borders."""
    model = attached(case, host)
    ids = random_ids(2, 45)
    with torch.no_grad():
        cache = model(ids[:, :13], use_cache=True).past_key_values
        state, opened = cache.state.select([1]), cache.open[1].item()
        last = cache.last_logits[1].clone()
        for start, stop in ((13, 14), (14, 33), (33, 40)):
            mask = torch.ones(2, stop, dtype=torch.long)
            mask[1, 13:] = 0
            cache = model(ids[:, start:stop], attention_mask=mask, past_key_values=cache).past_key_values
        assert trimmed(cache.state.select([1]), state).equal(state)
        assert (cache.open[1].item(), cache.seen.tolist()) == (opened, [40, 13])
        assert torch.equal(cache.last_logits[1], last)
        # It can be taken up again, as if nothing had happened in between.
        mask = torch.ones(2, 5, dtype=torch.long)
        resumed = model(torch.stack([ids[0, 40:45], ids[1, 13:18]]), attention_mask=mask, past_key_values=cache).logits
    for i, stop in ((0, 45), (1, 18)):
        alone = parallel(model, ids[i : i + 1, :stop]).logits[0, -5:]
        torch.testing.assert_close(resumed[i], alone, atol=1e-4, rtol=0)


@pairs(hosts=("llama",))
def test_a_call_without_any_token_is_refused(case, host):
    with pytest.raises(mnemic.InputError, match="padding"):
        attached(case, host)(random_ids(2, 5), attention_mask=torch.zeros(2, 5, dtype=torch.long))
