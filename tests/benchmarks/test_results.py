"""Scores and intervals out of logs."""

import itertools
import math

import pytest

from mnemic.benchmarks.log import Log
from mnemic.benchmarks.results import Evaluated, interval, summarise, wilson


def _exact(share, count):
    """Wilson's interval by bisection of the score equation |p - q| = z sqrt(q (1 - q) / n)."""

    def edge(inside, outside):
        for _ in range(80):
            middle = (inside + outside) / 2
            if abs(share - middle) <= 1.96 * math.sqrt(middle * (1 - middle) / count):
                inside = middle
            else:
                outside = middle
        return inside

    return edge(share, 0.0), edge(share, 1.0)


@pytest.mark.parametrize("right, count", [(0, 5), (5, 5), (1, 2), (37, 100), (999, 1000)])
def test_wilson_is_the_score_interval(right, count):
    assert wilson(right / count, count) == pytest.approx(_exact(right / count, count), abs=1e-9)


def test_scores_that_are_shares_get_a_bootstrap_interval():
    scores = [0.25, 0.5, 0.75, 1.0] * 25
    found = interval(scores)
    spread = math.sqrt(sum((s - 0.625) ** 2 for s in scores) / len(scores) / len(scores))
    assert found["mean"] == 0.625
    assert found["low"] == pytest.approx(0.625 - 1.96 * spread, abs=0.01)
    assert found["high"] == pytest.approx(0.625 + 1.96 * spread, abs=0.01)
    assert interval(scores) == found


def _record(official, fixed=None, **more):
    return {"official": official, "fixed": official if fixed is None else fixed, "tokens": 10, "truncated": 1, **more}


def _line(batch, records, seconds=2.0, peak=100, **name):
    cell = {"task": "qa1", "length": "1k", "seed": 1, "chance": None, **name}
    return {**cell, "batch": batch, "records": records, "seconds": seconds, "peak_bytes": peak}


LINES = [
    _line(0, [_record(1.0, 0.0, depth=0), _record(0.0, depth=50)]),
    _line(0, [_record(1.0)], length="2k", peak=None),
    _line(1, [_record(1.0, depth=50)], seconds=4.0, peak=300),
]


def test_cells_are_summed_in_any_order_of_their_batches(tmp_path):
    found = []
    for number, lines in enumerate((LINES, LINES[::-1])):
        with Log(tmp_path / str(number), {}) as log:
            for line in lines:
                log.append(line)
        scores = summarise([Evaluated("lm2", tmp_path / str(number), 7)])
        found.append([sorted(part, key=str) for part in (scores[0]["scores"], scores[0]["grouped"], scores[1])])
    assert found[0] == found[1]
    (long, short) = sorted(found[0][0], key=lambda s: s["count"])
    assert (short["count"], short["mean_tokens"], short["truncated"]) == (3, 10, 3)
    assert (short["model"], short["train_seed"], short["seed"]) == ("lm2", 7, 1)
    assert (short["official"]["mean"], short["fixed"]["mean"]) == (
        pytest.approx(2 / 3, abs=1e-6),
        pytest.approx(1 / 3, abs=1e-6),
    )
    assert (short["official"]["low"], short["official"]["high"]) == pytest.approx(wilson(2 / 3, 3), abs=1e-6)
    assert long["official"]["mean"] == 1.0
    assert [(g["value"], g["count"], g["official"], g["fixed"]) for g in found[0][1]] == [
        (0, 1, 1.0, 0.0),
        (50, 2, 0.5, 0.5),
    ]
    by_length = {cost["length"]: cost for cost in found[0][2]}
    assert (by_length["1k"]["seconds"], by_length["1k"]["tokens_per_second"]) == (6.0, 5.0)
    assert (by_length["1k"]["peak_bytes"], by_length["2k"]["peak_bytes"]) == (300, None)


def test_questions_of_one_sample_are_grouped_one_by_one(tmp_path):
    parts = [{"distance": d, "official": float(d == 1), "fixed": 1.0} for d in (1, 1, 2)]
    with Log(tmp_path / "log", {}) as log:
        log.append(_line(0, [_record(2 / 3, parts=parts)]))
    grouped = summarise([Evaluated("lm2", tmp_path / "log")])[0]["grouped"]
    assert [(g["by"], g["value"], g["count"], g["official"]) for g in grouped] == [
        ("distance", 1, 2, 1.0), ("distance", 2, 1, 0.0),
    ]  # fmt: skip


def test_boards_keep_equal_tasks_apart(tmp_path):
    runs = []
    for board, model in itertools.product(("a", "b"), ("lm2", "rmt")):
        with Log(tmp_path / f"{board}-{model}", {}) as log:
            log.append(LINES[0])
        runs.append(Evaluated(model, tmp_path / f"{board}-{model}", 0, board))
    assert {s["task"] for s in summarise(runs)[0]["scores"]} == {"a: qa1", "b: qa1"}
