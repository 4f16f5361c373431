"""Mixtures: shares of tokens, shuffled documents, positions; and the samples drawn from them."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

import mnemic
from mnemic.training import Collator, CorpusSamples, Mixture, SegmentLaw
from mnemic.training.mixture import Part, Turns, shuffled
from tests.training.shard_files import numbered, store

SEGMENT = 8
LENGTHS = (40, 3, 16, 100, 25, 8)


def mixture(folder, seed=0):
    one = store(folder / "one", numbered(*LENGTHS), vocabulary=2**16)
    two = store(folder / "two", numbered(*[20] * 9), vocabulary=2**16)
    return Mixture([Part(one, 3), Part(two, 1)], seed)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 100, 1000])
def test_an_order_is_a_permutation_of_its_own(count):
    orders = [tuple(shuffled(i, count, key) for i in range(count)) for key in ("a", "b", "c")]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 64 or len({*orders, tuple(range(count))}) == 4
    assert orders[0] == tuple(shuffled(i, count, "a") for i in range(count))


def test_orders_are_even():
    """Every place holds every entry about equally often: chi-square of 81 degrees of freedom, 5 deviations."""
    seen = Counter((i, shuffled(i, 10, str(key))) for key in range(4000) for i in range(10))
    statistic = sum((seen[i, j] - 400) ** 2 / 400 for i in range(10) for j in range(10))
    assert statistic < 81 + 5 * (2 * 81) ** 0.5


def test_shares_of_tokens_are_kept_within_a_document(tmp_path):
    mixed, taken = mixture(tmp_path), [0, 0]
    for part, document in islice(mixed.documents(), 500):
        taken[part] += mixed.parts[part].store.length(document)
        # Behind or ahead of the share by at most the longest document.
        assert abs(taken[0] / 3 - taken[1]) <= max(LENGTHS)
    assert all(taken)


def test_turns_follow_the_weights():
    turns, seen = Turns([2, 1, 1]), []
    for _ in range(8):
        seen.append(turns.next())
        turns.spend(seen[-1], 10)
    assert Counter(seen) == {0: 4, 1: 2, 2: 2}


def test_every_document_once_an_epoch_in_an_order_of_its_own(tmp_path):
    mixed = Mixture([Part(store(tmp_path, numbered(*range(5, 45)), vocabulary=2**16), 1)], seed=3)
    drawn = [document for _, document in islice(mixed.documents(), 120)]
    epochs = [drawn[i : i + 40] for i in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = Mixture(mixed.parts, seed=4).documents()
    assert [document for _, document in islice(again, 40)] != epochs[0]


def test_different_tokenizers_are_refused(tmp_path):
    one, two = store(tmp_path / "one", [[1]]), store(tmp_path / "two", [[1]], tokenizer="other")
    with pytest.raises(mnemic.DataError, match="different tokenizers"):
        Mixture([Part(one, 1), Part(two, 1)])


def test_files_and_pairs(tmp_path):
    mixture(tmp_path)
    (tmp_path / "mix.toml").write_text('[[part]]\nfolder = "one"\nweight = 3\n[[part]]\nfolder = "two"\nweight = 0.5\n')
    read = Mixture.open(tmp_path / "mix.toml", seed=5)
    parsed = Mixture.parse([f"{tmp_path}/one=3", f"{tmp_path}/two=0.5"], seed=5)
    for found in (read, parsed):
        assert [(p.store.folder.name, p.weight) for p in found.parts] == [("one", 3), ("two", 0.5)]
    assert read.fingerprint() == parsed.fingerprint() != Mixture(read.parts, seed=6).fingerprint()
    assert [p.store.folder.name for p in Mixture.open(tmp_path / "one").parts] == ["one"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[[part]]\nfolder = 1 2", "no valid TOML"),
        ("", "tables with folder and weight"),
        ('[[part]]\nfolder = "one"', "exactly the keys"),
        ('[[part]]\nfolder = "one"\nweight = 0', "positive"),
        ('[[part]]\nfolder = "one"\nweight = "much"', "positive"),
        ('[[part]]\nfolder = "missing"\nweight = 1', "does not exist"),
    ],
)
def test_bad_mixtures(tmp_path, text, message):
    mixture(tmp_path)
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(mnemic.MnemicError, match=message):
        Mixture.open(tmp_path / "mix.toml")
    with pytest.raises(mnemic.ConfigError, match="FOLDER=WEIGHT"):
        Mixture.parse(["one"])
    with pytest.raises(mnemic.DataError, match="prepared folder"):
        Mixture.open(tmp_path / "nothing")


# Samples


def samples(mixed, most=3, batch=2, **options):
    return CorpusSamples(mixed, SEGMENT, SegmentLaw(1, (most,), batch), **options)


def test_samples_are_stretches_of_one_document(tmp_path):
    mixed = mixture(tmp_path)
    taken = []
    for stretch, count in zip(islice(samples(mixed)._draws(), 400), SegmentLaw(1, (3,), 2).draw(0), strict=False):
        length = mixed.parts[stretch.part].store.length(stretch.document)
        assert stretch.stop - stretch.start == min(count * SEGMENT, length)
        assert stretch.start % SEGMENT == 0 or stretch.stop == length
        taken.append((stretch.part, stretch.document))
    # All documents, the short one of 3 tokens too; long ones more often.
    assert set(taken) == {(0, d) for d in range(len(LENGTHS))} | {(1, d) for d in range(9)}
    assert taken.count((0, 3)) > taken.count((0, 0)) > taken.count((0, 1))
    for example in islice(samples(mixed), 50):
        ids = example["input_ids"]
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert example["labels"] == ids


def test_loss_on_the_last_segments(tmp_path):
    for example in islice(samples(mixture(tmp_path), loss_segments=1), 60):
        ids, labels = example["input_ids"], example["labels"]
        last = -(-len(ids) // SEGMENT) * SEGMENT - SEGMENT
        assert labels == [-100] * last + ids[last:]


def test_short_documents_are_padded_or_refused(tmp_path):
    mixed = mixture(tmp_path)
    batch = Collator()([{"input_ids": [7, 8], "labels": [7, 8]}, {"input_ids": [1] * 8, "labels": [1] * 8}])
    assert batch["attention_mask"].sum(1).tolist() == [2, 8]
    with pytest.raises(mnemic.DataError, match="3 tokens, shorter than a segment of 8"):
        samples(mixed, short="refuse")
    with pytest.raises(mnemic.ConfigError, match="short"):
        samples(mixed, short="drop")


@pytest.mark.parametrize("at", [0, 1, 33])
def test_a_position_of_samples_is_found_again(tmp_path, at):
    mixed = mixture(tmp_path)
    whole = list(islice(samples(mixed), 60))
    first, later = samples(mixed), samples(mixed)
    assert len(list(islice(first, at))) == at
    assert first.state_dict()["samples"] == at
    later.load_state_dict(first.state_dict())
    assert list(islice(later, 60 - at)) == whole[at:]
    with pytest.raises(mnemic.DataError, match="other data"):
        samples(mixed, most=4).load_state_dict(first.state_dict())


def test_many_loader_workers_are_refused(tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("mnemic.training.positions.get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(mnemic.ConfigError, match="dataloader_num_workers"):
        next(iter(samples(mixture(tmp_path))))


def test_the_smollm_recipe_mixes_as_the_paper_says(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "data" / "smollm.toml"
    for name in ("cosmopedia-v2", "fineweb-edu-dedup"):
        store(tmp_path / name, numbered(*[10] * 50), vocabulary=2**16)
    (tmp_path / "mix.toml").write_text(recipe.read_text())
    mixed = Mixture.open(tmp_path / "mix.toml")
    drawn = Counter(mixed.parts[part].store.folder.name for part, _ in islice(mixed.documents(), 248))
    assert drawn == {"cosmopedia-v2": 28, "fineweb-edu-dedup": 220}
