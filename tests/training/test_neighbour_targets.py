"""Neighbour targets: against a brute-force loop in float64, and folders that must be refused."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mnemic
from mnemic.training import listed_tokenizer, neighbour_search
from mnemic.training.neighbour_targets import NeighbourTargets, feed_forward_inputs
from tests.tiny import VOCABULARY, random_ids, tiny_host

TEMPERATURE = 16.0


def tokenizer(first: str = "w0") -> Any:
    return listed_tokenizer([first, *(f"w{i}" for i in range(1, VOCABULARY))], pad_token=first)


def corpus() -> list[list[int]]:
    """Documents of several lengths; documents 1 and 4 are the same sentence."""
    documents = [random_ids(n, seed=n).tolist() for n in (9, 12, 7, 2, 12, 10)]
    documents[4] = list(documents[1])
    return documents


def build(folder: Any, **options: Any) -> NeighbourTargets:
    settings = {"neighbours": 8, "temperature": TEMPERATURE, "batch_size": 4, "progress": False, **options}
    model = settings.pop("model", None) or tiny_host()
    return NeighbourTargets.build(folder, model, tokenizer(), settings.pop("documents", corpus()), **settings)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> NeighbourTargets:
    return build(tmp_path_factory.mktemp("targets") / "store")


def brute_force(store: NeighbourTargets, n: int, k: int) -> tuple[Tensor, list[int]]:
    """Dense distribution of entry n, and its neighbours by rising distance, from the definition."""
    keys = np.array(store.keys, dtype=np.float64)
    ranked = sorted((float(((keys[n] - keys[j]) ** 2).sum()), j) for j in range(len(keys)) if j != n)[:k]
    dense = torch.zeros(VOCABULARY, dtype=torch.float64)
    least = ranked[0][0]
    for distance, j in ranked:
        dense[int(store.next_tokens[j])] += np.exp(-(distance - least) / TEMPERATURE)
    return dense / dense.sum(), [j for _, j in ranked]


def dense_target(store: NeighbourTargets, n: int) -> Tensor:
    begin, end = int(store.rows[n]), int(store.rows[n + 1])
    dense = torch.zeros(VOCABULARY, dtype=torch.float64)
    dense[store.tokens[begin:end].tolist()] = torch.from_numpy(store.probs[begin:end].astype(np.float64))
    return dense


def test_keys_are_the_inputs_of_the_last_feed_forward_block(built):
    model, n = tiny_host(), 0
    for document in corpus():
        with torch.no_grad():
            layers = model.model.layers
            states = model(torch.tensor([document]), output_hidden_states=True).hidden_states
            # The input of the last layer, through its attention, as a check by another way than the hook.
            x = states[-2]
            positions = model.model.rotary_emb(x, torch.arange(len(document))[None])
            causal = torch.full((len(document), len(document)), -1e9).triu(1)[None, None]
            attended = layers[-1].self_attn(layers[-1].input_layernorm(x), positions, causal)[0]
            expected = layers[-1].post_attention_layernorm(x + attended)[0]
        count = len(document) - 1
        torch.testing.assert_close(torch.from_numpy(np.array(built.keys[n : n + count])), expected[:-1])
        assert built.next_tokens[n : n + count].tolist() == document[1:]
        n += count
    assert n == len(built.keys) == len(built.next_tokens)


def test_targets_equal_brute_force(built):
    for n in range(len(built.keys)):
        expected, _ = brute_force(built, n, 8)
        torch.testing.assert_close(dense_target(built, n), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("k", [5, 1000])
def test_search_and_distribution_equal_brute_force(built, k, monkeypatch):
    # Blocks smaller than the corpus, so that merging is tested.
    monkeypatch.setattr(neighbour_search, "_KEYS", 7)
    total = len(built.keys)
    queries = torch.from_numpy(np.array(built.keys))
    distances, entries = built.nearest(queries, k, exclude=torch.arange(total))
    assert entries.shape == (total, min(k, total - 1))
    tokens, probs = built.distribution(distances, entries, TEMPERATURE)
    for n in range(total):
        expected, neighbours = brute_force(built, n, k)
        exact = (np.array(built.keys, dtype=np.float64)[n] - np.array(built.keys, dtype=np.float64)[neighbours]) ** 2
        torch.testing.assert_close(distances[n].double(), torch.from_numpy(exact.sum(-1)), rtol=0, atol=2e-4)
        dense = torch.zeros(VOCABULARY).index_add(0, tokens[n].long(), probs[n])
        torch.testing.assert_close(dense.double(), expected, rtol=0, atol=1e-6)


def test_the_own_entry_never_counts_but_its_duplicate_does(built):
    firsts = [int(built.starts[i]) - i for i in (1, 4)]
    queries = torch.from_numpy(np.array(built.keys))
    for own, twin in (firsts, firsts[::-1]):
        for step in range(11):
            exclude = torch.tensor([own + step])
            distances, entries = built.nearest(queries[own + step][None], 4, exclude)
            assert own + step not in entries
            assert entries[0, 0] == twin + step
            assert float(distances[0, 0]) < 1e-3
            assert dense_target(built, own + step)[int(built.next_tokens[twin + step])] > 0
    nearest = built.nearest(queries, 1)[1]
    others = [n for n in range(len(queries)) if not any(f <= n < f + 11 for f in firsts)]
    assert nearest[others, 0].tolist() == others


def test_examples_and_reopening(built):
    model = tiny_host()
    again = NeighbourTargets.open(built.folder, model=model, tokenizer=tokenizer())
    assert len(again) == len(corpus())
    n = 0
    for i, document in enumerate(corpus()):
        one, two = built[i], again[i]
        assert one["input_ids"].tolist() == document
        for name in ("input_ids", "tokens", "probs"):
            assert torch.equal(one[name], two[name])
        assert (one["tokens"].dtype, one["probs"].dtype) == (torch.int32, torch.float16)
        for t in range(len(document) - 1):
            dense = torch.zeros(VOCABULARY, dtype=torch.float64)
            dense.index_add_(0, one["tokens"][t].long(), one["probs"][t].double())
            assert torch.equal(dense, dense_target(built, n))
            n += 1
    assert torch.equal(built[-1]["tokens"], built[len(built) - 1]["tokens"])
    for name in ("keys", "next_tokens", "ids", "starts", "rows", "tokens", "probs"):
        assert np.array_equal(getattr(built, name), getattr(again, name))
    assert sorted(p.name for p in built.folder.parent.iterdir()) == ["store"]


def test_padding_and_batches_do_not_change_keys(built, tmp_path):
    alone = build(tmp_path / "alone", batch_size=1, neighbours=None)
    np.testing.assert_allclose(alone.keys, built.keys, atol=1e-5)
    assert not alone.has_targets
    with pytest.raises(mnemic.InputError, match="no targets"):
        alone[0]


def test_half_precision_models_store_half_precision_keys(built, tmp_path):
    store = build(tmp_path / "half", model=tiny_host().half(), neighbours=3)
    assert store.keys.dtype == np.float16
    assert store.keys.nbytes * 2 == built.keys.nbytes


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen3", "gemma2", "phi3", "qwen3_moe"])
def test_hosts_with_a_known_block(name):
    assert feed_forward_inputs(tiny_host(name), random_ids(2, 5)).shape == (2, 5, 32)


def test_hosts_without_are_refused():
    with pytest.raises(mnemic.HostError, match=r"no feed-forward block called mlp.*fc1"):
        feed_forward_inputs(tiny_host("opt"), random_ids(1, 5))
    with pytest.raises(mnemic.HostError, match="detach"):
        feed_forward_inputs(mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=2), random_ids(1, 5))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"documents": [[1]]}, mnemic.InputError, "Document 0 has 1 tokens"),
        ({"documents": [[5] * 129]}, mnemic.InputError, "expected 2 to 128"),
        ({"documents": [[5, VOCABULARY]]}, mnemic.InputError, "ids outside"),
        ({"documents": [[5, 6]]}, mnemic.InputError, "at least two positions"),
        ({"neighbours": 0}, mnemic.ConfigError, "must be positive"),
        ({"temperature": 0.0}, mnemic.ConfigError, "must be positive"),
        ({"search": "hnsw"}, mnemic.ConfigError, "expected 'exact' or 'faiss'"),
        ({"model": tiny_host("opt")}, mnemic.HostError, "feed-forward"),
    ],
)
def test_building_refuses_and_leaves_nothing(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        build(tmp_path / "store", **options)
    assert list(tmp_path.iterdir()) == []


def test_building_does_not_overwrite(built):
    with pytest.raises(mnemic.InputError, match="exists already"):
        build(built.folder)


def _edit_header(folder: Any, **changes: Any) -> None:
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, **changes}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f), "no folder"),
        (lambda f: (f / "header.json").unlink(), "half written"),
        (lambda f: (f / "header.json").write_text("{"), "damaged or foreign"),
        (lambda f: (f / "header.json").write_text("[]"), "damaged or foreign"),
        (lambda f: (f / "header.json").write_text('{"a": 1}'), "damaged or foreign"),
        (lambda f: _edit_header(f, kind="state"), "holds state"),
        (lambda f: _edit_header(f, temperature=1.0), "checksum"),
        (lambda f: _edit_header(f, format_version=2), "version 2"),
        (lambda f: (f / "probs.bin").unlink(), r"probs\.bin has 0 bytes"),
        (lambda f: (f / "keys.bin").write_bytes((f / "keys.bin").read_bytes()[:-4]), "half written or damaged"),
        (
            lambda f: (f / "tokens.bin").write_bytes(b"\x01" + (f / "tokens.bin").read_bytes()[1:-1] + b"\x01"),
            "checksum",
        ),
    ],
)
def test_damaged_folders_are_refused(built, tmp_path, damage, message):
    folder = shutil.copytree(built.folder, tmp_path / "copy")
    damage(folder)
    with pytest.raises(mnemic.FileFormatError, match=message):
        NeighbourTargets.open(folder)


def test_foreign_models_and_tokenizers_are_refused(built):
    with pytest.raises(mnemic.StateError, match="32 wide, the model is 64 wide"):
        NeighbourTargets.open(built.folder, model=tiny_host(hidden_size=64))
    with pytest.raises(mnemic.StateError, match="another architecture"):
        NeighbourTargets.open(built.folder, model=tiny_host("qwen3"))
    with pytest.raises(mnemic.StateError, match="other weights"):
        NeighbourTargets.open(built.folder, model=tiny_host(seed=1))
    with pytest.raises(mnemic.StateError, match="another tokenizer"):
        NeighbourTargets.open(built.folder, tokenizer=tokenizer("other"))


def test_without_faiss_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(mnemic.MissingExtraError, match=r"mnemic\[knn\]"):
        build(tmp_path / "store", search="faiss")


def test_faiss_finds_nearly_the_same(tmp_path):
    pytest.importorskip("faiss")
    documents = random_ids(40, 101, seed=3).tolist()
    fast = build(tmp_path / "faiss", documents=documents, search="faiss", neighbours=64, batch_size=40)
    exact = build(tmp_path / "exact", documents=documents, neighbours=64, batch_size=40)
    overlap = [torch.minimum(dense_target(fast, n), dense_target(exact, n)).sum() for n in range(0, 4000, 50)]
    assert float(torch.stack(overlap).mean()) > 0.7
