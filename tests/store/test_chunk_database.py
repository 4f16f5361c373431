"""The chunk database: what is found, what is left out, and every way in which a folder can be wrong."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnemic.core import ConfigError, FileFormatError, InputError, MissingExtraError, StateError
from mnemic.store import ChunkDatabase, build, build_index, chunk_search, headers, open_database, overlap

M, WIDTH = 4, 6


def embed(tokens: Tensor, mask: Tensor) -> Tensor:
    """Keys that depend on the real tokens alone."""
    table = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))
    return (table[tokens] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def texts(count=30, seed=0) -> list[list[int]]:
    make = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 23, (count,), generator=make).tolist()
    return [torch.randint(0, 100, (n,), generator=make).tolist() for n in lengths]


def made(folder: Path, documents=None, **options) -> ChunkDatabase:
    documents = texts() if documents is None else documents
    return build(folder, documents, embed, M, "tok", "emb", **{"batch": 8, "progress": False, **options})


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> ChunkDatabase:
    return made(tmp_path_factory.mktemp("store") / "db")


def expected_chunks(documents) -> list[tuple[int, list[int]]]:
    return [(d, ids[i : i + M]) for d, ids in enumerate(documents) for i in range(0, len(ids), M)]


@pytest.mark.parametrize("batch", [3, 5, 1000])
def test_chunks_keys_and_continuations(tmp_path, batch):
    database = made(tmp_path / "db", batch=batch)
    chunks = expected_chunks(texts())
    assert len(database) == len(chunks)
    assert database.num_documents == 30
    assert database.documents.tolist() == [d for d, _ in chunks]
    tokens, mask = database.neighbours(torch.arange(len(chunks))[:, None])
    assert (tokens.shape, tokens.dtype, mask.dtype) == ((len(chunks), 1, 2 * M), torch.int64, torch.bool)
    for i, (number, ids) in enumerate(chunks):
        follows = chunks[i + 1][1] if i + 1 < len(chunks) and chunks[i + 1][0] == number else []
        assert tokens[i, 0][mask[i, 0]].tolist() == ids + follows
        assert mask[i, 0].tolist() == [n < len(ids) for n in range(M)] + [n < len(follows) for n in range(M)]
        single = torch.tensor([ids])
        torch.testing.assert_close(database.keys[i : i + 1], embed(single, torch.ones_like(single).bool()))
    assert not bool(tokens[~mask].any())
    again = open_database(database.folder, chunk_length=M, width=WIDTH, tokenizer="tok", embedder="emb")
    assert torch.equal(again.keys, database.keys)


def test_no_neighbour_has_an_empty_mask(database):
    tokens, mask = database.neighbours(torch.tensor([[-1, 0]]))
    assert not bool(mask[0, 0].any() or tokens[0, 0].any())
    assert bool(mask[0, 1].any())
    for bad in (torch.tensor([[len(database)]]), torch.tensor([[-2]]), torch.tensor([[0.0]])):
        with pytest.raises(InputError, match="must be int64 from -1"):
            database.neighbours(bad)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 200), st.booleans(), st.sampled_from([64, 128, 2**24]), st.integers(0, 99))
def test_exact_search_equals_sorting_all_distances(database, n, k, exclude, scores, seed):
    """Also in many blocks, with more wanted than there is, and with documents left out."""
    make = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, WIDTH, generator=make)
    # Duplicates and hits: some queries are keys.
    queries[0] = database.keys[seed % len(database)]
    excluded = torch.randint(-1, 30, (n,), generator=make) if exclude else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_search, "_SCORES", scores)
        indices, distances = database.search(queries, k, excluded)
    assert (indices.shape, distances.shape) == ((n, k), (n, k))
    for row in range(n):
        all_of_them = (database.keys.double() - queries[row].double()).square().sum(-1).sqrt()
        if excluded is not None:
            all_of_them[database.documents == excluded[row]] = float("inf")
        order = all_of_them.argsort(stable=True)[:k]
        order = order[all_of_them[order] < float("inf")]
        count = len(order)
        assert indices[row, :count].tolist() == order.tolist()
        torch.testing.assert_close(distances[row, :count].double(), all_of_them[order], rtol=1e-5, atol=1e-6)
        assert indices[row, count:].tolist() == [-1] * (k - count)
        assert bool((distances[row, count:] == float("inf")).all())


@pytest.mark.parametrize("columns", [10, 640, 1000, 6401])
def test_the_selection_by_groups_is_exact(columns):
    scores = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    values, at = chunk_search._smallest(scores, 4)
    torch.testing.assert_close(values, scores.topk(4, largest=False).values, rtol=0, atol=0)
    assert torch.equal(scores.gather(1, at), values)


def test_equal_keys_come_in_the_order_of_the_text(tmp_path):
    database = made(tmp_path / "db", [[1, 2, 3, 4]] * 5)
    indices, distances = database.search(database.keys[:1], 3, torch.tensor([1]))
    assert indices.tolist() == [[0, 2, 3]]
    assert distances.tolist() == [[0.0, 0.0, 0.0]]


def test_a_search_without_queries(database):
    indices, distances = database.search(torch.zeros(0, WIDTH), 3)
    assert (indices.shape, distances.shape) == ((0, 3), (0, 3))


def test_queries_that_do_not_fit_are_refused(database):
    good = torch.zeros(2, WIDTH)
    for arguments, message in [
        ((torch.zeros(2, WIDTH + 1), 1), f"floats \\(n, {WIDTH}\\)"),
        ((good.long(), 1), "torch.int64"),
        ((good * float("nan"), 1), "not finite"),
        ((good, 0), "at least 1"),
        ((good, 1, torch.tensor([1])), "one document for each query"),
        ((good, 1, torch.tensor([1.0, 2.0])), "int64"),
    ]:
        with pytest.raises(InputError, match=message):
            database.search(*arguments)
    with pytest.raises(ConfigError, match="'exact' or 'faiss'"):
        database.search(good, 1, index="hnsw")


def test_documents_are_streamed(tmp_path):
    """When a chunk is embedded, no document after its batch has been asked for."""
    asked = 0

    def documents() -> Iterator[list[int]]:
        nonlocal asked
        for number in range(50):
            asked += 1
            yield [number] * M

    seen = []

    def watching(tokens, mask):
        seen.append((asked, int(tokens.max()), tokens.shape[0]))
        return embed(tokens, mask)

    build(tmp_path / "db", documents(), watching, M, "tok", "emb", batch=7, progress=False)
    assert all(asked == last + 1 and size <= 7 for asked, last, size in seen)
    assert len(seen) == 8


@pytest.mark.parametrize(
    "documents, message",
    [
        ([[1, 2], [0.5]], "Document 1 must be a list of token ids"),
        ([[1, -2]], "Document 0"),
        ([[2**31]], "Document 0"),
        (["text"], "Document 0"),
        ([[[1]]], "Document 0"),
        ([[], []], "None of the 2 documents has a token"),
        ([], "None of the 0 documents"),
    ],
)
def test_bad_documents_leave_nothing_behind(tmp_path, documents, message):
    with pytest.raises(InputError, match=message):
        made(tmp_path / "db", documents)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda t, m: torch.zeros(t.shape[0], WIDTH, 1), "must return"),
        (lambda t, m: torch.zeros(1, WIDTH), "must return"),
        (lambda t, m: torch.zeros(t.shape[0], t.shape[0]), "the same width each time"),
        (lambda t, m: torch.full((t.shape[0], 2), float("inf")), "not finite"),
        (lambda t, m: torch.full((t.shape[0], 2), 1e30), "not finite"),
    ],
)
def test_bad_embedders_leave_nothing_behind(tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        build(tmp_path / "db", [[1] * 9, [2] * 3], wrong, M, "tok", "emb", batch=3, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_nothing_behind(tmp_path):
    def documents() -> Iterator[list[int]]:
        yield [1] * 100
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "db", documents())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "db").mkdir()
    with pytest.raises(InputError, match="exists already"):
        made(tmp_path / "db")
    with pytest.raises(InputError, match="Cannot write"):
        made(tmp_path / "missing" / "db")
    with pytest.raises(ConfigError, match="at least 1"):
        made(tmp_path / "other", batch=0)


def test_progress_goes_to_stderr(tmp_path, capsys):
    made(tmp_path / "db", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Building db" in captured.err
    assert "chunks" in captured.err


@pytest.mark.parametrize(
    "expectation", [{"chunk_length": 64}, {"width": 7}, {"tokenizer": "another"}, {"embedder": "another"}]
)
def test_another_reader_is_refused(database, expectation):
    (name, value) = next(iter(expectation.items()))
    with pytest.raises(StateError, match=f"was built with {name.replace('_', ' ')} .*{value!r} is expected"):
        open_database(database.folder, **expectation)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    # A new file: cutting one short that an open database maps would end the process.
    path.unlink()
    path.write_bytes(bytes(data))


def test_what_is_missing_or_half_written_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="does not exist"):
        open_database(tmp_path / "none")
    with pytest.raises(FileFormatError, match="is no chunk database"):
        open_database(tmp_path)
    folder = made(tmp_path / "db").folder
    (folder / "header.json").unlink()
    with pytest.raises(FileFormatError, match="did not finish"):
        open_database(folder)


@pytest.mark.parametrize("name", ["keys.bin", "tokens.bin", "documents.bin", "header.json"])
def test_damage_anywhere_is_found(tmp_path, name):
    folder = made(tmp_path / "db").folder
    flip(folder / name)
    with pytest.raises(FileFormatError, match=f"{name} is damaged"):
        open_database(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_arrays_of_another_size_are_refused_before_they_are_mapped(tmp_path, verify):
    folder = made(tmp_path / "db").folder
    (folder / "keys.bin").write_bytes((folder / "keys.bin").read_bytes()[:-4])
    with pytest.raises(FileFormatError, match="missing or not of"):
        open_database(folder, verify=verify)
    (folder / "keys.bin").unlink()
    with pytest.raises(FileFormatError, match="missing or not of"):
        open_database(folder, verify=verify)


def test_foreign_and_newer_headers_are_refused(tmp_path, monkeypatch):
    folder = made(tmp_path / "db").folder
    header = json.loads((folder / "header.json").read_text())
    for text in ("{}", "[]", "no json", json.dumps({**header, "num_chunks": 3})):
        (folder / "header.json").write_text(text)
        with pytest.raises(FileFormatError, match=r"header\.json is damaged"):
            open_database(folder)
    (folder / "header.json").write_text(headers.header_text("cookbook", {}))
    with pytest.raises(FileFormatError, match="header of a cookbook"):
        open_database(folder)
    monkeypatch.setattr(headers, "FORMAT_VERSION", 2)
    newer = made(tmp_path / "newer").folder
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match="format version 2"):
        open_database(newer)


def test_writing_to_an_open_database_does_not_reach_the_disk(tmp_path):
    database = made(tmp_path / "db")
    database.keys.zero_()
    assert bool(open_database(database.folder).keys.any())


def test_faiss_that_is_not_installed_is_named(database, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (
        lambda: build_index(database.folder),
        lambda: database.search(torch.zeros(1, WIDTH), 1, index="faiss"),
    ):
        with pytest.raises(MissingExtraError, match="pip install faiss-cpu"):
            call()


def test_faiss_finds_what_exact_search_finds(tmp_path):
    pytest.importorskip("faiss")
    documents = texts(300)
    database = made(tmp_path / "db", documents)
    queries = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(1))
    with pytest.raises(FileFormatError, match="no faiss index"):
        database.search(queries, 3, index="faiss")
    build_index(database.folder)
    with pytest.raises(ConfigError, match="already"):
        build_index(database.folder)
    exact, distances = database.search(queries, 3)
    near, also = database.search(queries, 3, index="faiss")
    recall = (near[:, :, None] == exact[:, None]).any(-1).float().mean()
    assert float(recall) > 0.8
    same = near == exact
    assert torch.equal(also[same], distances[same])
    # The documents of the nearest are left out, however many chunks they have.
    excluded = database.documents[exact[:, 0]]
    left, _ = database.search(queries, 3, excluded, index="faiss")
    assert not bool((database.documents[left] == excluded[:, None]).any())
    assert bool((left >= 0).all())


def test_faiss_asks_until_enough_are_left_and_refuses_damage(tmp_path):
    pytest.importorskip("faiss")
    documents = [[7, 8, 9, 10] * 40] + [[i, i + 1, i + 2, i + 3] for i in range(20)]
    database = made(tmp_path / "db", documents)
    build_index(database.folder)
    near, _ = database.search(database.keys[:1], 5, torch.tensor([0]), index="faiss")
    exact, _ = database.search(database.keys[:1], 5, torch.tensor([0]))
    assert torch.equal(near, exact)
    flip(database.folder / "faiss.bin")
    with pytest.raises(FileFormatError, match=r"faiss\.bin is missing or damaged"):
        open_database(database.folder).search(database.keys[:1], 1, index="faiss")
    other = made(tmp_path / "other")
    (other.folder / "faiss.json").write_text((database.folder / "faiss.json").read_text())
    with pytest.raises(FileFormatError, match="made of other keys"):
        other.search(database.keys[:1], 1, index="faiss")


def test_overlap_is_the_longest_common_run():
    chunk = torch.tensor([1, 2, 3, 4])
    for neighbour, expected in [
        ([1, 2, 3, 4], 1.0),
        ([9, 2, 3, 9, 4, 1], 0.5),
        ([4, 3, 2, 1], 0.25),
        ([9, 9, 9, 9], 0.0),
        ([0, 0, 1, 2, 3, 4, 0], 1.0),
    ]:
        assert float(overlap(chunk, torch.tensor(neighbour))) == expected
    neighbour = torch.tensor([1, 2, 3, 4, 1, 2])
    assert float(overlap(chunk, neighbour, torch.tensor([True, True, False, True, True, True]))) == 0.5


def test_overlap_equals_a_search_for_substrings():
    make = torch.Generator().manual_seed(0)
    chunks = torch.randint(0, 3, (5, 1, 6), generator=make)
    neighbours = torch.randint(0, 3, (5, 4, 12), generator=make)
    found = overlap(chunks, neighbours)
    assert found.shape == (5, 4)
    for i in range(5):
        for j in range(4):
            text = "".join(map(str, neighbours[i, j].tolist()))
            part = "".join(map(str, chunks[i, 0].tolist()))
            runs = [b - a for a in range(6) for b in range(a + 1, 7) if part[a:b] in text]
            assert float(found[i, j]) == pytest.approx(max(runs, default=0) / 6)
