"""The interval of a margin against the delta method."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mnemic.benchmarks.jobs import ANSWERS
from mnemic.benchmarks.log import Log
from mnemic.benchmarks.reproduction.margin_interval import margin_interval
from mnemic.core.errors import InputError

COUNT = 400


def _job(folder, entry, seed, scores, targets="abc"):
    """A finished job that answered two lengths, two batches each; scores: length -> of each question."""
    job = SimpleNamespace(entry=entry, folder=Path(entry) / str(seed), evaluations=(None,))
    (folder / job.folder).mkdir(parents=True)
    with Log(folder / job.folder / ANSWERS, {}) as log:
        for length, given in scores.items():
            records = [{"official": score, "targets": [targets[i % 3]]} for i, score in enumerate(given)]
            halves = records[: len(records) // 2], records[len(records) // 2 :]
            for batch in (1, 0):
                log.append({"task": "qa1", "length": length, "seed": 1, "batch": batch, "records": halves[batch]})
    return job


@pytest.fixture
def drawn():
    """Two training seeds of a model that is right where another one is, and at times where it is not."""
    rng = np.random.default_rng(0)
    theirs = {length: (rng.random(COUNT) < share).astype(float) for length, share in (("1k", 0.6), ("2k", 0.4))}
    ours = [{n: np.maximum(t, rng.random(COUNT) < 0.3) for n, t in theirs.items()} for _ in range(2)]
    return theirs, ours


def test_it_is_that_of_the_delta_method_on_paired_questions(drawn, tmp_path):
    theirs, ours = drawn
    jobs = [_job(tmp_path, "b", 0, theirs), *(_job(tmp_path, "a", seed, one) for seed, one in enumerate(ours))]
    low, high = margin_interval(tmp_path, jobs, "a", "b", ["1k", "2k", "4k"])
    above, below = ({n: (x[0][n] + x[-1][n]) / 2 for n in theirs} for x in (ours, [theirs]))
    ratio = sum(v.mean() for v in above.values()) / sum(v.mean() for v in below.values())
    # The variance of a ratio of sums is that of the sum of above - ratio * below, over the square of the sum below.
    spread = math.sqrt(sum((above[n] - ratio * below[n]).var() / COUNT for n in theirs))
    half = 196 * spread / sum(v.mean() for v in below.values())
    assert low == pytest.approx(100 * (ratio - 1) - half, abs=1.0)
    assert high == pytest.approx(100 * (ratio - 1) + half, abs=1.0)
    assert high - low > 5
    assert margin_interval(tmp_path, jobs, "a", "b", ["1k", "2k"]) == [low, high]


def test_models_that_cannot_be_compared(drawn, tmp_path):
    theirs, ours = drawn
    jobs = [
        _job(tmp_path, "a", 0, ours[0]), _job(tmp_path, "none right", 0, {"1k": np.zeros(COUNT)}),
        _job(tmp_path, "others", 0, theirs, targets="xyz"),
    ]  # fmt: skip
    assert margin_interval(tmp_path, jobs, "a", "none right", ["1k"]) is None
    assert margin_interval(tmp_path, jobs, "a", "none right", ["2k"]) is None
    assert margin_interval(tmp_path, jobs, "a", "missing", ["1k"]) is None
    with pytest.raises(InputError, match="asked different questions: qa1 at length 1k"):
        margin_interval(tmp_path, jobs, "a", "others", ["1k"])
