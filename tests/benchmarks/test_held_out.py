"""Held-out text: losses against token-by-token sums."""

import math

import pytest
import torch

import mnemic
from mnemic.benchmarks.held_out import evaluate_text, summarise
from tests.tiny import random_ids, tiny_host

SEGMENT = 8


def by_hand(model, ids, carried):
    """The sum over tokens after the first of each segment, from one forward call each."""
    total, count = 0.0, 0
    for start in range(0, len(ids), SEGMENT):
        piece = ids[start : start + SEGMENT]
        given = ids[: start + SEGMENT] if carried else piece
        with torch.no_grad():
            logits = model(given[None], use_cache=False).logits[0, -len(piece) :]
        chosen = logits[:-1].log_softmax(-1).gather(1, piece[1:, None])
        total, count = total - float(chosen.sum()), count + len(piece) - 1
    return total, count


@pytest.mark.parametrize("name, options", [("rmt", {"num_tokens": 2}), ("window", {}), ("deltanet", {})])
def test_losses_are_sums_over_tokens(name, options):
    model = mnemic.attach(tiny_host(), name, segment=SEGMENT, **options).eval()
    documents = [random_ids(n, seed=n) for n in (27, 8, 1, 40, 9)]
    records = evaluate_text(model, documents, batch_size=3)
    assert len(records) == 4
    for record, ids in zip(records, [d for d in documents if len(d) > 1], strict=True):
        for kind in ("carried", "anew"):
            expected, count = by_hand(model, ids, kind == "carried")
            assert record["tokens"] == count
            assert record[kind] == pytest.approx(expected, rel=1e-4)


def test_summary():
    records = [{"tokens": 10, "carried": 20.0, "anew": 25.0}, {"tokens": 30, "carried": 30.0, "anew": 39.0}]
    found = summarise(records)
    assert [s["loss"] for s in found["scores"]] == [50 / 40, 64 / 40]
    assert found["scores"][0]["perplexity"] == pytest.approx(math.exp(1.25))
    gain = 14 / 40
    assert found["gain"] == pytest.approx(gain)
    assert found["interval"] == pytest.approx(1.96 * math.sqrt(2 * ((5 - 10 * gain) ** 2 + (9 - 30 * gain) ** 2)) / 40)
    assert summarise(records[:1])["interval"] is None


def test_nothing_to_predict():
    model = mnemic.attach(tiny_host(), "none", segment=SEGMENT)
    with pytest.raises(mnemic.InputError, match="two tokens"):
        evaluate_text(model, [[1], []])
