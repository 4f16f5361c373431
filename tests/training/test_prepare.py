"""Preparing shards: every kind of source, bad rows, parallel and interrupted runs that come out the same."""

import gzip
import hashlib
import json

import pytest
from tokenizers import normalizers

import mnemic
from mnemic.training import Mixture, TokenStore, byte_tokenizer, word_tokenizer
from mnemic.training.prepare import Preparation, check, prepare
from mnemic.training.shards import MANIFEST, VALIDATION, load_tokenizer
from mnemic.training.sources import Faults, expand, texts
from mnemic.training.tokenizer import tokenizer_fingerprint
from mnemic.training.units import UNITS

ROWS = [f"Row {i} says: {'rain and sun, ' * (i % 5)}and ends – so." for i in range(20)]


def jsonl(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def read(*sources, column="text", on_error="stop"):
    faults = Faults(on_error)
    return [text for text, _ in texts(expand(str(s) for s in sources), column, faults)], faults


def files(folder):
    """Content of everything a prepared folder holds."""
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in found.items() if n != "prepare.json"}


def small(*sources, **options):
    return Preparation(sources=tuple(map(str, sources)), **{"train_tokenizer": 300, "unit_characters": 200, **options})


# Sources


def test_kinds_of_sources_give_the_same_documents(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [{"text": row, "n": i} for i, row in enumerate(ROWS)]
    for i, row in enumerate(ROWS):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i:02}.txt").write_text(row, encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.disable_progress_bars()
    sources = [
        tmp_path / "texts",
        tmp_path / "texts" / "*.txt",
        jsonl(tmp_path / "rows.jsonl", rows),
        jsonl(tmp_path / "rows.jsonl.gz", rows),
        tmp_path / "rows.parquet",
        tmp_path / "saved",
    ]
    for source in sources:
        assert read(source)[0] == ROWS
    renamed = jsonl(tmp_path / "other.jsonl", [{"body": row} for row in ROWS])
    assert read(renamed, column="body")[0] == ROWS


def test_marks_of_files_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\n\n{"text": "four"}')
    assert read(tmp_path)[0] == ["one\ntwo\n", "three", "four"]


BAD = [
    ("bad.txt", b"good\nba\xffd", "bad.txt, line 2: no UTF-8 (byte 0xff)"),
    ("empty.txt", b"", "empty.txt: the text is empty"),
    ("empty.jsonl", b"\n", "empty.jsonl: no rows"),
    ("a.jsonl", b'{"text": "x"}\n{"text": 7}\n', "a.jsonl, line 2: column 'text' holds int"),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl, line 1: column 'text' holds null"),
    ("a.jsonl", b'\n{"body": "x"}\n', "a.jsonl, line 2: no column 'text' (there are: body)"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: no JSON"),
    ("a.jsonl", b'["x"]\n', "a.jsonl, line 1: a JSON list"),
    ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: no UTF-8 (byte 0xff)"),
    ("a.jsonl", b'{"text": "x\\ud800"}\n', "a.jsonl, line 1: half a surrogate pair at character 1"),
]


@pytest.mark.parametrize("name, content, message", BAD)
def test_bad_rows_are_named_or_counted(tmp_path, name, content, message):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(mnemic.DataError) as raised:
        read(tmp_path)
    assert message in str(raised.value)
    assert "--on-error skip" in str(raised.value)
    found, faults = read(tmp_path, on_error="skip")
    assert "good" in found
    assert faults.count == 1
    assert message in faults.first


def test_bad_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(mnemic.DataError, match=r"n\.parquet, row 1: column 'text' holds int"):
        read(tmp_path / "n.parquet")
    with pytest.raises(mnemic.DataError, match="no column 'body'"):
        read(tmp_path / "n.parquet", column="body")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(mnemic.DataError, match=r"d\.parquet is damaged or no parquet file"):
        read(tmp_path / "d.parquet")


def test_damaged_gzip_is_never_skipped(tmp_path):
    path = jsonl(tmp_path / "a.jsonl.gz", [{"text": row} for row in ROWS])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(mnemic.DataError, match="damaged after line"):
        read(path, on_error="skip")


def test_sources_that_lead_nowhere(tmp_path, monkeypatch):
    (tmp_path / "image.png").touch()
    (tmp_path / "a.txt").write_text("x")
    for sources, message in (
        ([tmp_path / "missing"], "does not exist"),
        ([tmp_path / "*.jsonl"], "does not exist"),
        ([tmp_path / "image.png"], "expected a file that ends in"),
        ([], "No sources"),
        ([tmp_path / "a.txt", tmp_path / "*.txt"], "given twice"),
    ):
        with pytest.raises(mnemic.DataError, match=message):
            read(*sources)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(mnemic.DataError, match="holds no file"):
        read(tmp_path)
    with pytest.raises(mnemic.ConfigError, match="on_error"):
        Faults("ignore")


def test_the_hub_without_a_connection(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(mnemic.DataError, match=r"no route to the hub.*without a connection, give local files"):
        read("hf:someone/something")


def test_the_hub_is_streamed(monkeypatch):
    import datasets

    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hf:a/b")[0] == read("hf:a/b:c")[0] == read("hf:a/b:c:test")[0] == ["one", "two"]
    assert asked == [("a/b", None, "train", True), ("a/b", "c", "train", True), ("a/b", "c", "test", True)]


# Tokenizers


def test_a_byte_tokenizer_reads_everything():
    made = byte_tokenizer(ROWS, 300)
    strange = "naïve 日本 \x00 🙂\n\n  x"
    assert made.decode(made(strange)["input_ids"]) == strange
    assert len(made) <= 300
    assert len(made(ROWS[4])["input_ids"]) < len(ROWS[4].encode()) / 2
    assert tokenizer_fingerprint(made) == tokenizer_fingerprint(byte_tokenizer(ROWS, 300))
    assert tokenizer_fingerprint(made) != tokenizer_fingerprint(byte_tokenizer(ROWS, 290))
    with pytest.raises(mnemic.ConfigError, match="at least 259"):
        byte_tokenizer(ROWS, 258)


# Shards


def test_documents_are_tokenised_once(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in ROWS])
    manifest = prepare(small(source, validation_fraction=0.25), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    expected = [[*tokenizer(row)["input_ids"], tokenizer.eos_token_id] for row in ROWS]
    train, held = (TokenStore(tmp_path / "out", s, verify=True) for s in ("train", VALIDATION))
    # Number n is held out where floor((n + 1) / 4) exceeds floor(n / 4).
    assert [d.tolist() for d in held] == expected[3::4]
    assert [d.tolist() for d in train] == [e for i, e in enumerate(expected) if i % 4 != 3]
    assert len(train.shards) > 2
    assert manifest["documents"] == 20
    assert manifest["tokens"] == train.tokens + held.tokens == sum(map(len, expected))
    assert manifest["tokenizer"] == tokenizer_fingerprint(tokenizer) == train.fingerprint
    assert check(tmp_path / "out") == manifest
    assert not (tmp_path / "out" / UNITS).exists()
    assert len(Mixture.open(tmp_path / "out").tokenizer()) == manifest["vocabulary"]


def test_a_tokenizer_from_a_folder(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in ROWS])
    words = word_tokenizer(ROWS, 200)
    words.save_pretrained(tmp_path / "words")
    prepare(small(source, train_tokenizer=None, tokenizer=str(tmp_path / "words")), tmp_path / "out")
    assert TokenStore(tmp_path / "out").fingerprint == tokenizer_fingerprint(words)
    with pytest.raises(mnemic.DataError, match="No tokenizer in"):
        prepare(small(source, train_tokenizer=None, tokenizer=str(tmp_path)), tmp_path / "other")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 5, 9, 14])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, after):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in ROWS])
    preparation = small(source, validation_fraction=0.1)
    prepare(preparation, tmp_path / "whole")
    from mnemic.training import shards

    calls, replace = [], shards.replace_atomically

    def dying(path, write):
        if len(calls) == after:
            raise Killed
        calls.append(path)
        replace(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "replace_atomically", dying)
        with pytest.raises(Killed):
            prepare(preparation, tmp_path / "out")
    with pytest.raises(mnemic.DataError, match="run the same mnemic prepare again"):
        TokenStore(tmp_path / "out")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tokens")}
    half = tmp_path / "out" / ".train-000003.tokens.tmp-x"
    half.mkdir()
    (half / "train-000003.tokens").write_bytes(b"half")
    recorded = len(list((tmp_path / "out" / UNITS).glob("*.json")))
    prepare(preparation, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    unchanged = sum(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert unchanged >= recorded


def test_sources_may_change_before_the_end_and_not_after(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": row} for row in ROWS]
    jsonl(path, [*rows, {"text": 7}])
    words = word_tokenizer(ROWS, 200)
    words.save_pretrained(tmp_path / "words")
    preparation = small(path, train_tokenizer=None, tokenizer=str(tmp_path / "words"))
    with pytest.raises(mnemic.DataError, match="line 21"):
        prepare(preparation, tmp_path / "out")
    made = list((tmp_path / "out").glob("*.tokens"))
    assert len(made) > 3
    jsonl(path, rows[:8])
    prepare(preparation, tmp_path / "out")
    prepare(preparation, tmp_path / "fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert len(list((tmp_path / "out").glob("*.tokens"))) < len(made)
    before = files(tmp_path / "out")
    prepare(preparation, tmp_path / "out")
    assert files(tmp_path / "out") == before
    jsonl(path, rows)
    with pytest.raises(mnemic.InputError, match="prepared with bytes"):
        prepare(preparation, tmp_path / "out")
    with pytest.raises(mnemic.InputError, match="prepared with column"):
        prepare(small(path, column="body", train_tokenizer=None, tokenizer=preparation.tokenizer), tmp_path / "out")


def test_bad_rows_are_skipped_and_counted(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": ROWS[0]}, {"text": 7}, {"body": ""}, {"text": ROWS[1]}])
    with pytest.raises(mnemic.DataError, match="line 2"):
        prepare(small(source), tmp_path / "out")
    manifest = prepare(small(source, on_error="skip"), tmp_path / "out")
    assert (manifest["documents"], manifest["skipped"]) == (2, 2)
    assert "line 2" in manifest["first_skipped"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation_fraction": 0.04}, "holds out none of 20 documents; give at least 0.05"),
        ({"column": "body", "on_error": "skip"}, "hold no documents; 20 rows were skipped"),
        ({"train_tokenizer": None}, "Give a tokenizer"),
        ({"tokenizer": "x"}, "not both"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"on_error": "never"}, "on_error"),
        ({"unit_characters": 0}, "unit_characters"),
    ],
)
def test_preparations_that_cannot_be(tmp_path, options, message):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in ROWS])
    with pytest.raises(mnemic.MnemicError, match=message):
        prepare(small(source, **options), tmp_path / "out")


def test_a_text_without_tokens_is_refused(tmp_path):
    """A word-level tokenizer without an end token makes nothing of a mark that its normaliser takes away."""
    words = word_tokenizer(ROWS, 100)
    words.eos_token = None
    words.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    words.save_pretrained(tmp_path / "words")
    source = jsonl(tmp_path / "rows.jsonl", [{"text": ROWS[0]}, {"text": "~"}])
    with pytest.raises(mnemic.DataError, match="no token of '~'"):
        prepare(small(source, train_tokenizer=None, tokenizer=str(tmp_path / "words")), tmp_path / "out")


def test_other_folders_are_not_touched(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in ROWS])
    with pytest.raises(mnemic.InputError, match="did not write"):
        prepare(small(source), tmp_path)
    with pytest.raises(mnemic.InputError, match="is a file"):
        prepare(small(source), source)
    with pytest.raises(mnemic.ConfigError, match="0 workers"):
        prepare(small(source), tmp_path / "out", workers=0)


def test_a_foreign_tokenizer_in_the_folder_is_told(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in ROWS])
    prepare(small(source), tmp_path / "out")
    byte_tokenizer(ROWS, 280).save_pretrained(tmp_path / "out" / "tokenizer")
    with pytest.raises(mnemic.DataError, match="not the one"):
        check(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["version"] == 1


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in ROWS])
    preparation = small(source, validation_fraction=0.1)
    prepare(preparation, tmp_path / "one")
    prepare(preparation, tmp_path / "two", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
