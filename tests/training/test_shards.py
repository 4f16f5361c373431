"""Token shards: what was written is read back, and damage is told by name."""

import json
import pickle

import numpy as np
import pytest

import mnemic
from mnemic.training.shards import MANIFEST, VALIDATION, TokenStore, check_ids, token_type
from tests.training.shard_files import numbered, store

LENGTHS = (7, 1, 30, 4, 12, 9, 2)


@pytest.mark.parametrize("vocabulary, width", [(2**16, 2), (2**16 + 1, 4)])
def test_documents_come_back(tmp_path, vocabulary, width):
    documents = numbered(*LENGTHS)
    found = store(tmp_path, documents, vocabulary=vocabulary)
    assert token_type(vocabulary).itemsize == width
    assert len(found) == len(LENGTHS)
    assert [d.tolist() for d in found] == documents
    assert [found.length(i) for i in range(len(found))] == list(LENGTHS)
    assert (found.tokens, found.shortest) == (sum(LENGTHS), 1)
    flat = [(d, i) for d, length in enumerate(LENGTHS) for i in range(length)]
    assert [found.at(token) for token in range(found.tokens)] == flat
    assert not found[0].flags.writeable
    assert (tmp_path / "train-000000.tokens").stat().st_size == width * sum(LENGTHS[:3])
    for outside in (-1, len(LENGTHS)):
        with pytest.raises(IndexError):
            found[outside]
    with pytest.raises(IndexError):
        found.at(found.tokens)


def test_files_are_little_endian(tmp_path):
    store(tmp_path, [[1, 258]])
    assert (tmp_path / "train-000000.tokens").read_bytes() == b"\x01\x00\x02\x01"
    assert (tmp_path / "train-000000.index").read_bytes() == bytes(8) + b"\x02" + bytes(7)


def test_a_store_goes_to_another_process(tmp_path):
    found = store(tmp_path, numbered(*LENGTHS))
    first = found[2].tolist()
    assert pickle.loads(pickle.dumps(found))[2].tolist() == first
    assert b"memmap" not in pickle.dumps(found)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train-000001.tokens", "train-000001.index"])
def test_a_wrong_checksum_is_found_when_asked(tmp_path, name):
    store(tmp_path, numbered(*LENGTHS))
    TokenStore(tmp_path, verify=True)
    flipped(tmp_path / name)
    with pytest.raises(mnemic.DataError, match=f"{name} is damaged: its checksum"):
        TokenStore(tmp_path, verify=True)
    TokenStore(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def remove(path):
    path.unlink()


def foreign(path):
    path.write_text('{"kind": "something else", "version": 1}')


def newer(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))


def broken(path):
    path.write_bytes(b"\xff{")


def emptied(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "splits": {"train": [{"name": "x"}]}}))


@pytest.mark.parametrize(
    "harm, name, message",
    [
        (cut, "train-000000.tokens", "bytes, the manifest says"),
        (cut, "train-000002.index", "bytes, the manifest says"),
        (remove, "train-000001.tokens", "is missing"),
        (remove, MANIFEST, "run the same mnemic prepare again"),
        (foreign, MANIFEST, "not written by mnemic prepare"),
        (newer, MANIFEST, "Upgrade mnemic"),
        (broken, MANIFEST, "cannot be read"),
        (emptied, MANIFEST, "is damaged"),
    ],
)
def test_harm_is_named(tmp_path, harm, name, message):
    store(tmp_path, numbered(*LENGTHS))
    harm(tmp_path / name)
    with pytest.raises(mnemic.DataError, match=message) as raised:
        TokenStore(tmp_path)
    assert name in str(raised.value)


def test_an_index_that_leads_nowhere_is_named(tmp_path):
    found = store(tmp_path, numbered(5, 6))
    np.array([0, 50, 11], "<i8").tofile(tmp_path / "train-000000.index")
    with pytest.raises(mnemic.DataError, match=r"train-000000\.index is damaged at document 0"):
        TokenStore(tmp_path)[0]
    assert found.folder == tmp_path


def test_a_split_that_is_not_there(tmp_path):
    store(tmp_path, numbered(5))
    with pytest.raises(mnemic.DataError, match="--validation-fraction"):
        TokenStore(tmp_path, VALIDATION)


def test_ids_outside_the_vocabulary_are_refused():
    check_ids(np.array([0, 9]), 10, "here")
    for ids in ([10], [-1]):
        with pytest.raises(mnemic.InputError, match="here"):
            check_ids(np.array(ids), 10, "here")
