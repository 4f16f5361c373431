"""Keeping streams: fork, select, join, save, load, and going on in another process."""

import json
import subprocess
import sys

import pytest
import torch

import mnemic
from mnemic import InputError, StateError, Stream
from tests.hosts.models import MEMORIES, SEGMENT, close, greedy, last, logits_of, tiny_model
from tests.tiny import random_ids

IDS = random_ids(1, 29, seed=5)
ROW = IDS[0].tolist()


def test_reset_forgets_everything(model):
    stream = model.stream().feed(random_ids(1, 50, seed=2))
    stream.reset()
    assert stream.tokens_seen == 0
    close(stream.feed(IDS, return_logits=True), logits_of(model, IDS))


def test_a_fork_is_independent(model):
    stream = model.stream().feed(IDS[:, :13])
    twin = stream.fork()
    twin.feed(random_ids(1, 20, seed=8))
    assert stream.tokens_seen == 13
    close(stream.feed(IDS[:, 13:], return_logits=True), logits_of(model, IDS)[:, 13:])
    third = twin.fork()
    stream.feed(ROW)
    both = [s.generate(max_new_tokens=5, return_ids=True) for s in (twin, third)]
    assert both[0] == both[1] == greedy(model, torch.cat([IDS[:, :13], random_ids(1, 20, seed=8)], 1), 5)


def test_select_copies_rows(model):
    rows = [ROW[:5], ROW[:19], ROW[3:]]
    batch = model.stream(3).feed(rows)
    chosen = batch.select([2, 0, 2])
    assert chosen.tokens_seen == [26, 5, 26]
    found = chosen.generate(max_new_tokens=5, return_ids=True)
    expected = [greedy(model, torch.tensor([r]), 5) for r in rows]
    assert found == [expected[2], expected[0], expected[2]]
    assert batch.tokens_seen == [5, 19, 26]
    assert batch.select(torch.tensor([1])).generate(max_new_tokens=5, return_ids=True) == expected[1]


def test_streams_at_different_places_join(model):
    # At a border, inside the first segment, inside a later one, and a batch that is itself not in step.
    parts = [model.stream().feed(ROW[:16]), model.stream().feed(ROW[:3]), model.stream().feed(ROW)]
    parts.append(model.stream(2).feed([ROW[:9], ROW[5:25]]))
    histories = [ROW[:16], ROW[:3], ROW, ROW[:9], ROW[5:25]]
    batch = Stream.cat(parts)
    assert batch.tokens_seen == [16, 3, 29, 9, 20]
    found = batch.generate(max_new_tokens=12, return_ids=True)
    assert found == [greedy(model, torch.tensor([h]), 12) for h in histories]
    assert [p.tokens_seen for p in parts] == [16, 3, 29, [9, 20]]
    assert parts[2].generate(max_new_tokens=12, return_ids=True) == found[2]
    # And apart again.
    again = batch.select([1]).generate(max_new_tokens=3, return_ids=True)
    assert again == greedy(model, torch.tensor([ROW[:3] + found[1]]), 3)


def test_joining_needs_streams_of_one_model_that_have_read(lm2):
    with pytest.raises(InputError, match="of one model"):
        Stream.cat([lm2.stream().feed(ROW), tiny_model("lm2").stream().feed(ROW)])
    with pytest.raises(InputError, match="at least one"):
        Stream.cat([])
    with pytest.raises(InputError, match="at least one token"):
        Stream.cat([lm2.stream().feed(ROW), lm2.stream()])


@pytest.mark.parametrize("count", [3, SEGMENT, 2 * SEGMENT, 29])
def test_save_and_load_are_exact(model, count, tmp_path):
    stream = model.stream().feed(IDS[:, :count])
    stream.save(tmp_path / "a.mnemic")
    loaded = model.stream(load=tmp_path / "a.mnemic")
    assert loaded.tokens_seen == count
    assert torch.equal(last(loaded), last(stream))
    assert loaded.state.equal(stream.state)
    more = random_ids(1, 21, seed=11)
    assert torch.equal(loaded.feed(more, return_logits=True), stream.feed(more, return_logits=True))
    assert loaded.generate(max_new_tokens=5, return_ids=True) == stream.generate(max_new_tokens=5, return_ids=True)


def test_a_batch_that_is_not_in_step_is_saved_and_loaded(model, tmp_path):
    rows = [ROW[:4], ROW[:16], ROW]
    batch = model.stream(3).feed(rows)
    batch.save(tmp_path / "b.mnemic")
    loaded = model.stream(load=str(tmp_path / "b.mnemic"))
    assert loaded.tokens_seen == [4, 16, 29]
    more = random_ids(3, 13, seed=12)
    assert torch.equal(loaded.feed(more, return_logits=True), batch.feed(more, return_logits=True))


def test_saving_over_a_file_replaces_it(lm2, tmp_path):
    stream = lm2.stream().feed(ROW[:5])
    stream.save(tmp_path / "a.mnemic")
    stream.feed(ROW[5:])
    stream.save(tmp_path / "a.mnemic")
    assert lm2.stream(load=tmp_path / "a.mnemic").tokens_seen == 29
    assert [p.name for p in tmp_path.iterdir()] == ["a.mnemic"]


def test_settings_that_json_spells_otherwise_are_still_the_same(tmp_path):
    model = tiny_model("lm2", memory_layers=(1,))
    model.stream().feed(ROW).save(tmp_path / "a.mnemic")
    assert model.stream(load=tmp_path / "a.mnemic").tokens_seen == 29
    with pytest.raises(StateError, match=r"memory_layers: \[1\] there, None here"):
        tiny_model("lm2").stream(load=tmp_path / "a.mnemic")


def test_an_empty_stream_is_not_saved(lm2, tmp_path):
    with pytest.raises(InputError, match="read nothing"):
        lm2.stream().save(tmp_path / "a.mnemic")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", MEMORIES)
def test_files_move_between_dtypes(memory, tmp_path):
    wide, narrow = tiny_model(memory), tiny_model(memory).to(torch.bfloat16)
    more = random_ids(1, 9, seed=4)
    wide.stream().feed(IDS).save(tmp_path / "wide.mnemic")
    stream = narrow.stream(load=tmp_path / "wide.mnemic")
    assert last(stream).dtype == torch.bfloat16
    found = stream.feed(more, return_logits=True).float()
    expected = logits_of(wide, torch.cat([IDS, more], 1))[:, 29:]
    # What the host itself loses in bfloat16 is the yardstick.
    yardstick = (narrow.stream().feed(torch.cat([IDS, more], 1), return_logits=True).float()[:, 29:] - expected).abs()
    assert (found - expected).abs().max() <= 1.5 * yardstick.max() + 0.02
    narrow.stream().feed(IDS).save(tmp_path / "narrow.mnemic")
    back = wide.stream(load=tmp_path / "narrow.mnemic")
    assert last(back).dtype == torch.float32
    assert (back.feed(more, return_logits=True) - expected).abs().max() <= 1.5 * yardstick.max() + 0.02


PROCESS = """
import json, sys
import mnemic
model = mnemic.load(sys.argv[1])
found = {}
for path in sys.argv[2:]:
    stream = model.stream(load=path)
    seen, answer = stream.tokens_seen, stream.generate(max_new_tokens=9, return_ids=True)
    found[path] = [seen, answer, stream.cache.last_logits.tolist()]
print(json.dumps(found))
"""


def test_a_new_process_gives_the_same_answer(lm2, tmp_path):
    mnemic.save(lm2, tmp_path / "model", whole=True)
    streams = {str(tmp_path / f"{n}.mnemic"): lm2.stream().feed(IDS[:, :n]) for n in (5, 16, 29)}
    for path, stream in streams.items():
        stream.save(path)
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path / "model"), *streams],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    for path, stream in streams.items():
        seen = stream.tokens_seen
        answer = stream.generate(max_new_tokens=9, return_ids=True)
        assert found[path] == [seen, answer, last(stream).tolist()]
