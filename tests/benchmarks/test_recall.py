"""The recall toy task: layout, chance level, determinism, and what can be asked of it."""

import pytest
import torch

from mnemic.benchmarks import RecallTask
from mnemic.core import ConfigError, InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "pairs, where", [(1, 0), (1, 2), (1, -1), (1, None), (2, None), (3, [0, 1, 2]), (3, 0), (2, -1)]
)
@pytest.mark.parametrize("length", [8, 7, 16])
def test_layout(pairs, where, length):
    task = RecallTask(pairs=pairs, segment_length=length)
    batch = task.batch(64, seeded(), fact_segment=where)
    ids, labels = batch.input_ids, batch.labels
    assert ids.shape == labels.shape == (64, 3 * length)
    assert ids.dtype == labels.dtype == torch.int64
    assert (labels[:, :-1] == -100).all()
    assert (labels[:, -1] == ids[:, -1]).all()
    assert (ids[:, -3] == 0).all()
    assert ids.min() >= 0
    assert ids.max() < task.vocab_size
    is_key = (ids >= task.first_key) & (ids < task.first_value)
    assert (is_key.sum(1) == pairs + 1).all()
    for row, distance in zip(ids.tolist(), batch.distance.tolist(), strict=True):
        # The asked key stands once before the question, its value behind it, `distance` segments back.
        at = row.index(row[-2])
        assert row[at + 1] == row[-1]
        assert row[: len(row) - 2].count(row[-2]) == 1
        assert at // length == (at + 1) // length == 2 - distance
    if isinstance(where, int):
        assert (batch.distance == (2 - where) % 3).all() if where >= 0 else (batch.distance == 0).all()


def test_nothing_in_the_last_segment_gives_the_answer_away():
    task = RecallTask()
    batch = task.batch(4000, seeded(), fact_segment=0)
    last = batch.input_ids[:, -8:]
    assert ((last >= task.first_value).sum(1) == 1).all()  # only the answer itself
    assert ((last[:, :-2] >= task.first_key).sum() == 0).all()
    # Value and visible tokens are independent: the best guess from any one of them is near chance.
    value = last[:, -1] - task.first_value
    for column in range(7):
        table = torch.zeros(task.vocab_size, task.values)
        table.index_put_((last[:, column], value), torch.ones(4000), accumulate=True)
        assert table.max(1).values.sum() / 4000 < task.chance + 0.05
    counts = torch.bincount(value, minlength=8).float()
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # 0.1% bound, 7 degrees of freedom
    assert task.chance == 0.125


def test_random_segments_reach_every_distance():
    batch = RecallTask().batch(300, seeded(), segments=5, fact_segment=None)
    assert batch.input_ids.shape == (300, 40)
    assert batch.distance.unique().tolist() == [0, 1, 2, 3, 4]


def test_same_generator_same_rows():
    task = RecallTask(pairs=2)
    first, second = (task.batch(8, seeded(4), fact_segment=None) for _ in range(2))
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.distance, second.distance)
    assert not torch.equal(first.input_ids, task.batch(8, seeded(5), fact_segment=None).input_ids)


def test_rows_can_be_read():
    task = RecallTask(keys=10)
    row = task.batch(1, seeded()).input_ids[0]
    text = task.decode(row)
    key, value = text.split()[-2:]
    assert text.count(" | ") == 2
    assert f"{key} {value}" in text.split(" | ")[0]
    assert len(set(task.names())) == task.vocab_size == len(task.names())
    with pytest.raises(InputError, match="row"):
        task.decode([99])
    with pytest.raises(InputError, match="row"):
        task.decode(row[None])


@pytest.mark.parametrize(
    "sizes", [{"segment_length": 2}, {"pairs": 9}, {"values": 0}, {"keys": 1.5}, {"segments": True}]
)
def test_impossible_sizes(sizes):
    with pytest.raises(ConfigError):
        RecallTask(**sizes)


@pytest.mark.parametrize("options", [
    {"fact_segment": 3}, {"fact_segment": [0, 1]}, {"fact_segment": -1, "segments": 1}, {"fact_segment": None},
    {"segments": 0},
])  # fmt: skip
def test_impossible_batches(options):
    with pytest.raises(InputError):
        RecallTask(pairs=3).batch(2, seeded(), **options)


def test_batch_size():
    with pytest.raises(InputError):
        RecallTask().batch(0, seeded())
