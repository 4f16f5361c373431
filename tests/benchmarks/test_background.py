"""Background texts: sentences, books, prose, PG-19."""

import gzip
import json
import sys
import types

import pytest

from mnemic.benchmarks import books, pg19, prose
from mnemic.benchmarks.babi import SPLITS
from mnemic.benchmarks.background import named, sentence_spans
from mnemic.core import DataError, MissingExtraError, UnknownNameError


def sentences(text):
    return [text[a:b] for a, b in sentence_spans(text)]


@pytest.mark.parametrize("text, expected", [
    ("One is here. Two is\nthere!  Three?", ["One is here.", "Two is\nthere!", "Three?"]),
    ("Mr. Smith met Dr. J. Watson. They left.", ["Mr. Smith met Dr. J. Watson.", "They left."]),
    ('"Go!" said he. "Why?" She went.', ['"Go!" said he.', '"Why?"', "She went."]),
    ("It cost 3.5 pounds, i.e. much. So.", ["It cost 3.5 pounds, i.e. much.", "So."]),
    ("Neither did I. He slept.", ["Neither did I.", "He slept."]),
    ("", []), ("  \n ", []), ("no end", ["no end"]),
])  # fmt: skip
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_sentences_cover_all_but_white_space():
    text = prose("train")[0].text
    assert "".join(sentences(text)).split() != []
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_prose_is_english_and_its_splits_share_nothing():
    paragraphs = {split: {p for d in prose(split) for p in d.text.split("\n\n")} for split in SPLITS}
    assert not paragraphs["train"] & paragraphs["test"]
    assert not paragraphs["train"] & paragraphs["validation"]
    assert not paragraphs["validation"] & paragraphs["test"]
    for split in SPLITS:
        text = "\n\n".join(d.text for d in prose(split))
        assert len(text.split()) > 1000
        for mark in (">>>", "::=", "+--", "   ", "New in version"):
            assert mark not in text
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    assert all(d.provenance.startswith(version) for d in prose("test"))


def test_prose_missing(monkeypatch):
    from mnemic.benchmarks import background

    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    background._prose.cache_clear()
    with pytest.raises(DataError, match="pydoc_data"):
        prose("train")


def test_books(tmp_path):
    folder = tmp_path / "gutenberg-books"
    folder.mkdir()
    rows = [{"id": i, "title": f"T{i}", "author": "A", "year": 1900, "text": f"Text {i}."} for i in range(3)]
    for part in ("train", "test"):
        with gzip.open(folder / f"books_{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    assert [d.name for d in books(tmp_path, "train")] == ["T0", "T1"]
    assert [d.name for d in books(folder, "validation")] == ["T2"]
    assert [d.text for d in books(folder, "test")] == ["Text 0.", "Text 1.", "Text 2."]
    assert "Project Gutenberg 2" in books(folder, "test")[2].provenance
    (folder / "books_test.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"books_test.*get the file again"):
        books(folder, "test")
    with pytest.raises(DataError, match=r'does not exist.*background="prose"'):
        books(tmp_path / "nowhere")


def test_books_of_the_data_folder(data):
    assert len(books(data, "train")) == 6
    assert len(books(data, "validation")) == 1
    assert len(books(data, "test")) == 3
    assert sum(len(d.text) for d in books(data, "test")) == pytest.approx(1.5e6, rel=0.01)


def test_pg19(monkeypatch):
    def load(repository, split, streaming):
        assert streaming
        yield from ({"short_book_title": f"B{i}", "text": "Some text."} for i in range(100))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    assert [d.name for d in pg19("test", limit=2)] == ["B0", "B1"]

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(DataError, match=r"no route.*prose"):
        pg19("test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        named("pg19", "test", None)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="background"):
        named("poems", "test", None)
    with pytest.raises(UnknownNameError, match="split"):
        prose("dev")
    with pytest.raises(DataError, match="MNEMIC_DATA"):
        named("books", "test", None)
