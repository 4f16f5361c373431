"""Held-out text as cells: losses against the language benchmark, intervals by hand, reports."""

import csv
import io
import json
import math

import pytest
import torch
from rich.console import Console

import mnemic
from mnemic.benchmarks.background import named
from mnemic.benchmarks.building import build, examples
from mnemic.benchmarks.catalog import open_cell
from mnemic.benchmarks.experiment import Experiment
from mnemic.benchmarks.language import gain, token_losses
from mnemic.benchmarks.report import page, print_report, write_report
from mnemic.benchmarks.results import perplexity, perplexity_change
from mnemic.core.errors import ConfigError, InputError
from mnemic.training import word_tokenizer
from tests.benchmarks.report_cases import model, results, score
from tests.tiny import tiny_host

SEGMENT = 8


@pytest.fixture(scope="module")
def words():
    return word_tokenizer([document.text for document in named("prose", "train", None)], 64)


def _cell(words, length="24", **options):
    return open_cell("text", length, options.pop("seed", 1), tokenizer=words, segment=SEGMENT, **options)


def test_pieces_are_of_the_held_out_text_each_once(no_data, words):
    cell, other = _cell(words), _cell(words, seed=2)
    pieces = list(cell.samples())
    ids = [i for d in named("prose", "test", None) for i in words(d.text)["input_ids"]]
    assert {len(piece) for piece in pieces} == {24}
    assert len(pieces) == len(ids) // 24
    joined = " ".join(map(str, ids))
    assert all(" ".join(map(str, piece)) in joined for piece in pieces[:20])
    assert pieces == list(cell.samples())
    assert pieces != list(other.samples())
    with pytest.raises(InputError, match="shorter length"):
        _cell(words, "1000000")
    with pytest.raises(InputError, match="2 tokens"):
        _cell(words, "1")
    with pytest.raises(InputError, match="no tokenizer"):
        _cell(None)
    with pytest.raises(ConfigError, match="read whole"):
        _cell(words, prompt="truncated:8")


@pytest.mark.parametrize("name, options", [("rmt", {"num_tokens": 2}), ("none", {})])
def test_records_are_sums_over_tokens(no_data, words, name, options):
    attached = mnemic.attach(tiny_host(vocab_size=len(words)), name, segment=SEGMENT, **options).eval()
    cell = _cell(words)
    samples = [piece for piece, _ in zip(cell.samples(), range(3), strict=False)]
    records = cell.answer(attached, samples)
    ids = torch.tensor(samples)
    with torch.no_grad():
        carried = -attached(ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        rows = ids.unflatten(1, (-1, SEGMENT)).flatten(0, 1)
        anew = -attached(rows, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    anew = anew.unflatten(0, (3, -1)).sum((1, 2))
    both = torch.ones(23, dtype=torch.bool)
    both[SEGMENT - 1 :: SEGMENT] = False
    for i, record in enumerate(records):
        assert (record["predicted"], record["compared"], record["tokens"]) == (23, 21, 48)
        assert record["carried"] == pytest.approx(float(carried[i].sum()), rel=1e-5)
        assert record["gained"] == pytest.approx(float(anew[i] - carried[i][both].sum()), abs=1e-3)
    if name == "none":
        assert all(abs(record["gained"]) < 1e-3 for record in records)
    found = perplexity(records)
    losses = token_losses(attached, samples), token_losses(attached, samples, "segment")
    assert found["perplexity"]["mean"] == pytest.approx(math.exp(float(carried.mean())), rel=1e-5)
    assert found["gain"]["mean"] == pytest.approx(gain(*losses)["gain"], abs=1e-5)


def test_intervals_are_of_resampled_pieces():
    alike = {"predicted": 10, "carried": 20.0, "compared": 8, "gained": 4.0}
    same = perplexity([alike] * 5)
    assert same["perplexity"] == dict.fromkeys(("mean", "low", "high"), pytest.approx(math.exp(2), abs=1e-6))
    assert same["gain"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    # Two pieces are drawn (1, 1), (1, 2) or (2, 2): a quarter, a half, a quarter of the time.
    found = perplexity([alike, {**alike, "carried": 40.0, "gained": -4.0}])
    assert found["perplexity"]["low"] == pytest.approx(math.exp(2), abs=1e-6)
    assert found["perplexity"]["mean"] == pytest.approx(math.exp(3), abs=1e-6)
    assert found["perplexity"]["high"] == pytest.approx(math.exp(4), abs=1e-6)
    assert found["gain"] == {"mean": 0.0, "low": -0.5, "high": 0.5}
    with pytest.raises(InputError, match="one token"):
        perplexity([{**alike, "compared": 0}])


def test_text_without_data_is_prose_and_with_books_is_books(no_data, tmp_path, monkeypatch):
    import gzip

    from mnemic.benchmarks import background

    settings = {"task": "text", "memory": "none", "segment": 4, "vocabulary": 32, "host_options": {"hidden_size": 16}}
    folder = tmp_path / "gutenberg-books"
    folder.mkdir()
    with gzip.open(folder / "books_train.jsonl.gz", "wt") as file:
        for i in range(3):
            book = {
                "id": i,
                "title": f"b{i}",
                "author": "a",
                "year": 1900,
                "text": f"ship{i} sails far away today " * 9,
            }
            file.write(json.dumps(book) + "\n")
    background._read_books.cache_clear()

    def vocabulary(**more):
        attached, tokenizer = build(Experiment.from_dict({**settings, **more}))
        next(iter(examples(Experiment.from_dict({**settings, **more}), attached, tokenizer)))
        return set(tokenizer.get_vocab())

    assert "ship0" not in vocabulary()
    # The last book is kept for validation.
    assert {"ship0", "ship1"} < vocabulary(data=str(tmp_path))
    assert "ship2" not in vocabulary(data=str(tmp_path))
    monkeypatch.setenv("MNEMIC_DATA", str(tmp_path))
    assert "ship0" in vocabulary()


def _text(name, length, mean, **changes):
    between = {"mean": mean, "low": mean - 1, "high": mean + 1}
    run = {"model": name, "task": "text", "length": length, "train_seed": 0, "seed": 1, "count": 8, "predicted": 99}
    return {**run, "perplexity": between, "gain": {"mean": 0.125, "low": 0.1, "high": 0.15}, **changes}


def _printed(data):
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    print_report(data, [], console)
    return console.file.getvalue()


@pytest.mark.parametrize("scores", [(), (score("lm2", "qa1", "1k", 0.5),)])
def test_text_is_in_every_report(tmp_path, scores):
    data = results(*scores, models=(model("none"), model("lm2")), settings={"a": 1})
    data["text"] = [_text("none", "64", 40.0), _text("lm2", "64", 30.0), _text("lm2", "128", 20.0)]
    shown = _printed(data)
    assert "* 30.00" in shown
    assert "29.00–31.00" in shown
    assert "0.1250" in shown
    assert "* 40.00" not in shown
    assert "pieces of 128 tokens" in shown
    html = page(data, [])
    assert "<strong>30.00</strong>" in html
    assert "<strong>20.00</strong>" not in html
    assert ('id="leaderboard"' in html) == bool(scores)
    written = {path.name: path for path in write_report(data, [], tmp_path)}
    rows = list(csv.DictReader(written["text.csv"].read_text().splitlines()))
    assert [(r["model"], r["length"], float(r["perplexity"]), float(r["gain_low"])) for r in rows] == [
        ("none", "64", 40.0, 0.1), ("lm2", "64", 30.0, 0.1), ("lm2", "128", 20.0, 0.1),
    ]  # fmt: skip
    assert json.loads(written["report.json"].read_text())["text"] == data["text"]


def test_several_runs_have_their_range():
    data = results(models=(model("lm2"),))
    data["text"] = [_text("lm2", "64", 30.0), _text("lm2", "64", 34.0, train_seed=1)]
    assert "32.00" in _printed(data)
    assert "30.00–34.00 (2)" in _printed(data)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": "lm3"}, "no such model"),
        ({"perplexity": {"mean": 0.5, "low": 0.4, "high": 0.6}}, "1 or more"),
        ({"gain": {"mean": math.nan, "low": 0.0, "high": 0.0}}, "finite"),
    ],
)
def test_bad_text_is_refused(tmp_path, change, said):
    data = results(models=(model("lm2"),))
    data["text"] = [{**_text("lm2", "64", 30.0), **change}]
    with pytest.raises(InputError, match=said):
        write_report(data, [], tmp_path / "report")
    data["text"] = [_text("lm2", "64", 30.0)] * 2
    with pytest.raises(InputError, match="given twice"):
        _printed(data)
    del (lacking := dict(data["text"][0]))["gain"]
    with pytest.raises(InputError, match="no 'gain'"):
        _printed({**data, "text": [lacking]})


def test_two_perplexities_are_compared_piece_by_piece():
    pieces = [{"tokens": 9, "predicted": 8, "carried": nats} for nats in (10.0, 40.0, 25.0, 30.0, 12.0, 8.0)]
    worse = [{**piece, "carried": piece["carried"] + 0.8} for piece in pieces]
    found = perplexity_change(worse, pieces)
    # Each piece is worse by 0.1 nats a token: no doubt is left, however much the pieces differ.
    assert found == pytest.approx({key: 100 * math.expm1(0.1) for key in ("mean", "low", "high")}, abs=1e-5)
    noisy = [{**p, "carried": p["carried"] + by} for p, by in zip(pieces, (-2, 3, 1, -1, 2, 0), strict=True)]
    found = perplexity_change(noisy, pieces)
    assert found["mean"] == pytest.approx(100 * math.expm1(3 / 48), abs=1e-5)
    assert found["low"] < 0 < found["mean"] < found["high"]
    with pytest.raises(InputError, match="same pieces"):
        perplexity_change(pieces[1:], pieces)
    with pytest.raises(InputError, match="same pieces"):
        perplexity_change([{**p, "predicted": 7} for p in pieces], pieces)
