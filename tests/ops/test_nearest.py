"""Nearest keys: blocked exact search against loops over keys; faiss against exact search; its files."""

import builtins
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnemic.ops import nearest
from mnemic.ops.nearest import FaissIndex, better, exact, recall

few = settings(max_examples=12, deadline=None, derandomize=True)


def naive(query: Tensor, keys: Tensor, visible: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Sorting the keys of every query; visible (B, Hkv, N) bool."""
    groups = query.shape[1] // keys.shape[1]
    scores = torch.full((*query.shape[:3], k), -math.inf, dtype=query.dtype)
    indices = torch.full((*query.shape[:3], k), -1)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).view(-1, 3).tolist():
        q, found = query[b, h, t], []
        for n in range(keys.shape[2]):
            key = keys[b, h // groups, n]
            score = (q * key).sum() if metric == "dot" else -(q - key).square().sum()
            if visible[b, h // groups, n]:
                found.append((score.item(), n))
        for place, (score, n) in enumerate(sorted(found, reverse=True)[:k]):
            scores[b, h, t, place], indices[b, h, t, place] = score, n
    return scores, indices


@few
@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 7),
    st.integers(1, 4),
    st.sampled_from(["all", "int", "count", "rows", "heads"]),
    st.sampled_from(["dot", "l2"]),
    st.integers(0, 1000),
)
def test_exact_equals_loops_in_any_block(key_heads, groups, stored, k, kind, metric, seed):
    make = torch.Generator().manual_seed(seed)
    query = torch.randn(2, key_heads * groups, 3, 4, generator=make, dtype=torch.float64)
    keys = torch.randn(2, key_heads, stored, 4, generator=make, dtype=torch.float64)
    visible = torch.rand(2, key_heads, stored, generator=make) < 0.6
    count = torch.tensor([stored, max(stored - 2, 0)])
    valid, dense = {
        "all": (None, torch.ones_like(visible)),
        "int": (2, (torch.arange(stored) < 2).expand_as(visible)),
        "count": (count, (torch.arange(stored) < count[:, None])[:, None].expand_as(visible)),
        "rows": (visible[:, 0], visible[:, :1].expand_as(visible)),
        "heads": (visible, visible),
    }[kind]
    expected = naive(query, keys, dense, k, metric)
    for block in (None, 1, 3):
        scores, indices = exact(query, keys, valid, k, metric, block)
        torch.testing.assert_close(scores, expected[0], rtol=0, atol=1e-10)
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("stored", [1024, 1024 + 37])
def test_buckets_and_parts_of_the_queries_find_what_one_topk_finds(stored, monkeypatch):
    make = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 4, 9, 8, generator=make), torch.randn(2, 2, stored, 8, generator=make)
    expected = (query @ keys.repeat_interleave(2, dim=1).mT).topk(3)
    # Room for the scores of two queries at a time.
    monkeypatch.setattr(nearest, "_SCORE_BYTES", 2 * 4 * stored * 4)
    scores, indices = exact(query, keys, None, 3)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(indices, expected.indices)
    calls, _exact = [], nearest._exact
    monkeypatch.setattr(nearest, "_exact", lambda *a: calls.append(a[0].shape[2]) or _exact(*a))
    assert torch.equal(exact(query, keys, None, 3)[1], indices)
    assert calls == [2] * 9


def test_half_precision_keys_give_float32_scores_without_a_graph():
    query = torch.randn(1, 1, 2, 4, requires_grad=True)
    scores, _ = exact(query, torch.randn(1, 1, 5, 4).bfloat16(), None, 2)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_better_merges_and_recall_counts_true_indices_found():
    merged = better((torch.tensor([3.0, 1.0]), torch.tensor([0, 1])), (torch.tensor([2.0]), torch.tensor([7])), 2)
    assert [part.tolist() for part in merged] == [[3.0, 2.0], [0, 7]]
    truth = torch.tensor([[1, 2, -1], [3, 4, 5]])
    assert recall(torch.tensor([[2, 1, -1], [9, 9, 4]]), truth) == pytest.approx(3 / 5)
    assert recall(truth, torch.full((2, 3), -1)) == 1.0


def test_without_faiss_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'mnemic\[knn\]'"):
        FaissIndex(4)


def test_unknown_metrics_kinds_and_head_counts_are_refused():
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="Unknown metric 'cosine'"):
        exact(x, x, None, 1, "cosine")
    with pytest.raises(ValueError, match="multiple of the key heads: 1, 2"):
        exact(x[:, :1], x, None, 1)
    with pytest.raises(ValueError, match="Unknown kind of index 'tree'"):
        FaissIndex(4, "dot", "tree")


@pytest.fixture(scope="module")
def vectors() -> tuple[Tensor, Tensor]:
    """Keys in clusters, (2000, 8), and queries near them, (20, 8)."""
    make = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 8, generator=make) * 3
    keys = centres.repeat_interleave(100, dim=0) + torch.randn(2000, 8, generator=make)
    return keys, centres + torch.randn(20, 8, generator=make)


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("kind,least", [("flat", 1.0), ("ivf", 0.9), ("hnsw", 0.9)])
def test_faiss_finds_what_exact_search_finds_also_from_its_file(metric, kind, least, vectors, tmp_path):
    pytest.importorskip("faiss")
    keys, queries = vectors
    truth_scores, truth = (part[0, 0] for part in exact(queries[None, None], keys[None, None], None, 10, metric))
    index = FaissIndex(8, metric, kind, nprobe=None if kind == "hnsw" else 8)
    index.add(keys[:1500])
    index.add(keys[1500:])
    assert len(index) == 2000
    scores, found = index.search(queries, 10)
    assert recall(found, truth) >= least
    if kind == "flat":
        torch.testing.assert_close(scores, truth_scores, rtol=1e-4, atol=1e-4)
    index.write(tmp_path / "keys.index")
    again = FaissIndex.read(tmp_path / "keys.index", width=8)
    assert (again.kind, again.metric, again.nprobe, len(again)) == (kind, metric, index.nprobe, 2000)
    assert all(torch.equal(a, b) for a, b in zip(again.search(queries, 10), (scores, found), strict=True))
    again.add(queries)
    assert len(again) == 2020
    assert [p.name for p in tmp_path.iterdir()] == ["keys.index"]


def test_missing_results_are_marked_and_shapes_checked(vectors):
    pytest.importorskip("faiss")
    for kind in ("flat", "ivf"):
        index = FaissIndex(8, "l2", kind, nlist=1)
        assert index.search(vectors[1], 2)[1].tolist() == [[-1, -1]] * 20
        index.add(vectors[0][:1])
        scores, found = index.search(vectors[1], 2)
        assert torch.equal(found, torch.tensor([[0, -1]]).expand(20, 2))
        assert bool((scores[:, 1] == -math.inf).all())
    with pytest.raises(ValueError, match=r"shape \(N, 8\)"):
        index.add(torch.randn(3, 7))
    with pytest.raises(ValueError, match="30 cells"):
        FaissIndex(8, "dot", "ivf", nlist=30).add(vectors[0][:20])


def test_files_that_are_missing_damaged_or_of_another_width_are_refused(vectors, tmp_path):
    pytest.importorskip("faiss")
    path = tmp_path / "keys.index"
    with pytest.raises(FileNotFoundError, match=r"keys\.index"):
        FaissIndex.read(path)
    with pytest.raises(ValueError, match="nothing to write"):
        FaissIndex(8, "dot", "ivf").write(path)
    index = FaissIndex(8)
    index.add(vectors[0])
    index.write(path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="width 8, not 16"):
        FaissIndex.read(path, width=16)
    for broken in (b"", b"text", whole[:-100], whole[:-1]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is no index"):
            FaissIndex.read(path)
    for place in (3, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            FaissIndex.read(path)


def test_a_failed_write_leaves_the_old_file(vectors, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    index = FaissIndex(8)
    index.add(vectors[0])
    index.write(tmp_path / "keys.index")
    index.add(vectors[0])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(nearest.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        index.write(tmp_path / "keys.index")
    assert len(FaissIndex.read(tmp_path / "keys.index")) == 2000
    assert [p.name for p in tmp_path.iterdir()] == ["keys.index"]
