"""Prompts of the baselines: budgets kept, what is left out counted, and searches against their formulas."""

import copy
import importlib
import math
import sys
from itertools import pairwise

import numpy as np
import pytest

import mnemic
from mnemic.benchmarks import conversations
from mnemic.benchmarks.retrieval_baselines import (
    Bm25,
    Dense,
    best_at_both_ends,
    chunk_spans,
    full,
    retrieved,
    truncated,
)
from mnemic.benchmarks.task import Record

WORDS = ("apples", "bread", "cheese", "dates", "eggs", "figs")
FACTS = [f"Fact {i} is about {word}." for i, word in enumerate(WORDS)]
RECORD = Record("\n".join(FACTS), "Which fact is about cheese?", ("2",))


class Shared:
    """Cosine similarity by shared letters: deterministic vectors without a model."""

    def encode(self, texts):
        return np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], dtype=float)


@pytest.fixture
def starting(bpe):
    """The tokenizer with a start token."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(bpe)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_full_holds_everything_or_refuses(bpe):
    prompt = full(RECORD, bpe, None)
    assert bpe.decode(prompt.ids) == f"{RECORD.context}\n{RECORD.question}"
    assert prompt.dropped == 0
    assert full(RECORD, bpe, len(prompt.ids)).ids == prompt.ids
    with pytest.raises(mnemic.InputError, match="more than the budget"):
        full(RECORD, bpe, len(prompt.ids) - 1)


@pytest.mark.parametrize("keep", ["end", "middle out"])
def test_truncation_is_counted(starting, keep):
    whole = full(RECORD, starting, None).ids
    assert whole[0] == starting.bos_token_id
    question = len(starting(RECORD.question, add_special_tokens=False)["input_ids"])
    for budget in (question + 1, question + 12, len(whole) - 1, len(whole), len(whole) + 9):
        prompt = truncated(RECORD, starting, budget, keep=keep)
        assert len(prompt.ids) == min(budget, len(whole))
        assert prompt.dropped == len(whole) - len(prompt.ids)
        assert prompt.ids[0] == starting.bos_token_id
        assert prompt.ids[-question:] == whole[-question:]
        front = (len(prompt.ids) - 1 - question) // 2 if keep == "middle out" else 0
        assert prompt.ids[: 1 + front] == whole[: 1 + front]
        assert prompt.ids[1 + front :] == whole[len(whole) - len(prompt.ids) + 1 + front :]
    with pytest.raises(mnemic.InputError, match="question alone"):
        truncated(RECORD, starting, question)
    with pytest.raises(mnemic.ConfigError, match="keep"):
        truncated(RECORD, starting, 99, keep="start")


def test_chunks_are_whole_lines_or_sentences(bpe):
    text = "A short line.\nAnother one.\n\nA long line with a sentence. And with another sentence. And a third one."
    for size in (1, 8, 20, 1000):
        spans = chunk_spans(text, bpe, size)
        pieces = [text[a:b] for a, b in spans]
        assert "".join("".join(pieces).split()) == "".join(text.split())
        assert all(a < b for a, b in spans)
        assert all(b <= c for (_, b), (c, _) in pairwise(spans))
    assert [text[a:b] for a, b in chunk_spans(text, bpe, 1)][2:] == [
        "A long line with a sentence.", "And with another sentence.", "And a third one."
    ]  # fmt: skip
    assert len(chunk_spans(text, bpe, 1000)) == 1


@pytest.mark.parametrize("make", [Bm25, lambda: Dense(Shared())], ids=["bm25", "dense"])
def test_retrieval_finds_the_fact_within_the_budget(bpe, make):
    if make is Bm25:
        pytest.importorskip("bm25s", reason="bm25s is not installed: pip install 'mnemic[retrieval]'")
    context = len(bpe(RECORD.context + "\n")["input_ids"])
    for budget in (40, 60, 200):
        prompt = retrieved(RECORD, bpe, budget, make(), chunk_tokens=1, top_k=3)
        assert len(prompt.ids) <= budget
        assert 2 in prompt.chunks
        assert list(prompt.chunks) == sorted(prompt.chunks)
        lines = bpe.decode(prompt.ids).split("\n")
        assert lines == [*(FACTS[i] for i in prompt.chunks), RECORD.question]
        kept = sum(len(bpe(FACTS[i] + "\n")["input_ids"]) for i in prompt.chunks)
        assert prompt.dropped == context - kept
    assert len(prompt.chunks) == 3
    best = retrieved(RECORD, bpe, 200, make(), chunk_tokens=1, top_k=3, order="rank").chunks
    assert best[0] == 2
    ends = retrieved(RECORD, bpe, 200, make(), chunk_tokens=1, top_k=3, order="ends").chunks
    assert ends == (best[0], best[2], best[1])


def test_the_best_stand_at_both_ends():
    assert best_at_both_ends([1, 2, 3, 4, 5, 6, 7]) == [1, 3, 5, 7, 6, 4, 2]
    for k in range(8):
        placed = best_at_both_ends(range(1, k + 1))
        assert sorted(placed) == list(range(1, k + 1))
        assert placed[:1] == [1][:k]
        assert k < 2 or placed[-1] == 2


def test_bm25_is_the_formula():
    pytest.importorskip("bm25s", reason="bm25s is not installed: pip install 'mnemic[retrieval]'")
    chunks = ("the cat sat", "the dog sat on the cat", "nothing here", "cat cat cat")
    words = [chunk.split() for chunk in chunks]
    mean = sum(map(len, words)) / 4

    def expected(query):
        scores = []
        for chunk in words:
            total = 0.0
            for word in set(query.split()):
                holding = sum(word in other for other in words)
                idf = math.log(1 + (4 - holding + 0.5) / (holding + 0.5))
                count = chunk.count(word)
                total += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(chunk) / mean)) if holding else 0
            scores.append(total)
        return scores

    search = Bm25()
    for query in ("cat", "the dog", "unknown words", "the unknown cat"):
        # The library leaves out the constant factor k1 + 1, as Lucene does.
        np.testing.assert_allclose(search(chunks, query), expected(query), atol=1e-5)
    np.testing.assert_allclose(search(("other",), "cat"), [0.0])


def test_a_context_of_nothing_and_bad_sizes(bpe):
    empty = Record("", "Why?", ("x",))
    assert retrieved(empty, bpe, 50, Dense(Shared())).chunks == ()
    assert truncated(empty, bpe, 50).dropped == 0
    with pytest.raises(mnemic.ConfigError, match="order"):
        retrieved(RECORD, bpe, 50, Dense(Shared()), order="best")
    with pytest.raises(mnemic.ConfigError, match="top_k"):
        retrieved(RECORD, bpe, 50, Dense(Shared()), top_k=0)


def test_missing_packages_name_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(mnemic.MissingExtraError, match=r"mnemic\[retrieval\]"):
        Bm25()
    with pytest.raises(mnemic.MissingExtraError, match=r"mnemic\[retrieval\]"):
        Dense("some/model")
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "mnemic.benchmarks.harness", raising=False)
    with pytest.raises(mnemic.MissingExtraError, match=r"mnemic\[eval\]"):
        importlib.import_module("mnemic.benchmarks.harness")
    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    conversations._stemmer.cache_clear()
    conversations._stem.cache_clear()
    with pytest.raises(mnemic.MissingExtraError, match=r"mnemic\[eval\]"):
        conversations.locomo_score("dogs", Record("", "", ("dog",), {"category": 4}))
