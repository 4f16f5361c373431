"""The study of which layers need the long memory: its text, its schedules, and a run of one step."""

import argparse
import json
import sys

import pytest
import torch

from benchmarks import transformer_xl_study as study
from mnemic.core.errors import InputError


def test_copies_repeat_what_stood_200_characters_before():
    characters, copied = study.text(3000, seed=4)
    assert (len(characters), len(copied)) == (3000, 3000)
    assert set(characters) == set(study.ALPHABET)
    assert not any(copied[: study.DISTANCE])
    same = [i >= study.DISTANCE and characters[i] == characters[i - study.DISTANCE] for i in range(3000)]
    assert all(s for s, c in zip(same, copied, strict=True) if c)
    fresh = [s for s, c in zip(same[study.DISTANCE :], copied[study.DISTANCE :], strict=True) if not c]
    assert sum(fresh) < 0.25 * len(fresh)
    assert 0.45 < sum(copied) / len(copied) < 0.7
    assert study.text(3000, seed=4) == (characters, copied)
    assert study.text(1000, seed=4) == (characters[:1000], copied[:1000])
    assert study.text(3000, seed=5)[0] != characters


def test_batches_are_rows_of_seeds_one_after_another():
    ids, copied = study.batch(3, 500, seed=7)
    for row in range(3):
        characters, flags = study.text(500, seed=7 + row)
        assert "".join(study.ALPHABET[i] for i in ids[row].tolist()) == characters
        assert copied[row].tolist() == flags


def test_only_long_memories_reach_a_copy():
    layers = study.SIZES["layers"]
    found = study.schedules(layers)
    # From any character of a segment to the one that it copies; short memories together, even through all layers.
    assert study.LONG >= study.DISTANCE - 1
    assert layers * study.SHORT + study.SEGMENT - 1 < study.DISTANCE - 1
    long = {name: [i for i, m in enumerate(o["memory_lengths"]) if m == study.LONG] for name, o in found.items()}
    assert long == {
        "all long": list(range(8)),
        "2 interleaved": [3, 7],
        "last 2": [6, 7],
        "first 2": [0, 1],
        "all short": [],
        "low half in range": [4, 5, 6, 7],
    }
    assert all(set(o["memory_lengths"]) <= {study.LONG, study.SHORT} for o in found.values())
    assert found["low half in range"]["ranges"] == (16,) * 4 + (None,) * 4


def test_what_is_out_of_range_need_not_be_stored():
    """Logits of a layer limited to the last 16 tokens are the same with 224 stored."""
    sizes = argparse.Namespace(layers=2, width=16, heads=2)
    options = study.schedules(2)["low half in range"]
    ids, _ = study.batch(2, 300, seed=1)
    small, large = (
        study.build(sizes, 0, **(options | {"memory_lengths": lengths}))
        for lengths in (options["memory_lengths"], (study.LONG,) * 2)
    )
    with torch.no_grad():
        torch.testing.assert_close(*(study.bits(model, ids)[0] for model in (small, large)), atol=1e-4, rtol=0)


def test_carried_states_are_one_long_text():
    sizes = argparse.Namespace(layers=2, width=16, heads=2)
    model = study.build(sizes, 0, **study.schedules(2)["all long"])
    ids, _ = study.batch(2, 5 * study.SEGMENT + 1, seed=1)
    with torch.no_grad():
        whole, _ = study.bits(model, ids)
        parts, state = [], None
        for start in range(0, 5 * study.SEGMENT, study.SEGMENT):
            cost, state = study.bits(model, ids[:, start : start + study.SEGMENT + 1], state)
            parts.append(cost)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


def run(folder, monkeypatch, *more: str, steps: int = 1):
    sizes = {"layers": 2, "width": 16, "heads": 2, "rows": 1, "steps": steps, "held-out": 260}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    paths = ["--output", str(folder / "results" / "study.json"), "--image", str(folder / "study.png")]
    monkeypatch.setattr(sys, "argv", ["study", *words, *paths, *more])
    study.main()
    return json.loads((folder / "results" / "study.json").read_text())


def test_a_run_writes_a_row_for_each_schedule_and_the_figure(tmp_path, monkeypatch):
    names = ["2 interleaved", "low half in range"]
    found = run(tmp_path, monkeypatch, "--seeds", "3", "--schedules", *names)
    assert [row["schedule"] for row in found["rows"]] == names
    assert found["settings"]["steps"] == 1
    share = study.batch(1, 260, study.HELD_OUT)[1][:, 1:].float().mean().item()
    for row in found["rows"]:
        assert row["seed"] == 3
        assert row["state_bytes"] == sum(row["memory_lengths"]) * 16 * 4 + 8
        assert len(row["curve"]["bits"]) == 1
        cost = row["bits"]
        assert cost["all"] == pytest.approx(share * cost["copied"] + (1 - share) * cost["fresh"], abs=1e-4)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    first = run(tmp_path, monkeypatch, "--seeds", "3", "--schedules", "all short")
    assert [(row["schedule"], row["seed"]) for row in first["rows"]] == [("all short", 3)]
    more = run(tmp_path, monkeypatch, "--add", "--seeds", "3", "4", "--schedules", "all short")
    assert [(row["schedule"], row["seed"]) for row in more["rows"]] == [("all short", 3), ("all short", 4)]
    assert more["rows"][0] == first["rows"][0]
    assert more["rows"][1]["bits"] != first["rows"][0]["bits"]
    with pytest.raises(InputError, match="other settings"):
        run(tmp_path, monkeypatch, "--add", "--seeds", "3", "--schedules", "all short", steps=2)


def test_means_are_over_the_seeds():
    rows = [
        {"schedule": name, "state_bytes": 8, "bits": {"all": x, "copied": 2 * x, "fresh": 0.0}}
        for name, x in (("a", 1.0), ("b", 5.0), ("a", 2.0))
    ]
    first, second = study.means(rows)
    assert first == {"schedule": "a", "state_bytes": 8, "all": 1.5, "copied": 3.0, "fresh": 0.0, "seeds": [1.0, 2.0]}
    assert second["seeds"] == [5.0]
