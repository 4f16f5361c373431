"""Explanations: a planted n-gram is found and scores 1, a random slot about 0."""

import random

import pytest
import torch

from mnemic.analysis import Span, explain, top_ngrams
from mnemic.analysis.explanations import correlation, spans_of
from mnemic.core.errors import InputError

WORDS = ("the", "garden", "is", "in", "Mary", "went")


def _tokens(count=640, seed=0):
    rng = random.Random(seed)
    return [rng.choice(WORDS) for _ in range(count)]


def _planted(tokens, gram, level=0.7, other=0.1):
    n = len(gram)
    return torch.tensor(
        [level if tuple(tokens[max(0, t - n + 1) : t + 1]) == gram else other for t in range(len(tokens))]
    )


@pytest.mark.parametrize("gram", [("garden",), ("the", "garden"), ("in", "the", "garden")])
def test_a_planted_ngram_is_found_and_scores_1(gram):
    tokens = _tokens(1600 if len(gram) == 3 else 640)
    activations = _planted(tokens, gram)
    # An n-gram over the border of two spans is in neither.
    for start in range(0, len(tokens), 16):
        activations[start : start + len(gram) - 1] = 0.1
    found = explain(activations, tokens, 4)
    assert found.score is not None
    assert found.score > 0.999
    assert found.text.startswith(f"'{' '.join(gram)}' (0.70)")
    assert found.text.endswith("else 0.10")
    assert (found.slot, found.held_out, len(found.spans)) == (4, 15, 10)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_slot_scores_about_0(seed):
    activations = torch.rand(3200, generator=torch.Generator().manual_seed(seed))
    found = explain(activations, _tokens(3200, seed), 0, best=60, seed=seed)
    assert found.score is not None
    assert abs(found.score) < 0.12


def test_slots_read_by_all_alike_have_no_score():
    assert explain(torch.full((64,), 0.25), _tokens(64), 0).score is None


def test_an_explanation_that_says_the_same_of_all_scores_0():
    class Nothing:
        text = "anything"

        def simulate(self, tokens):
            return [1.0] * len(tokens)

    tokens = _tokens()
    assert explain(_planted(tokens, ("Mary",)), tokens, 0, lambda spans: Nothing()).score == 0.0


def test_an_explainer_sees_every_second_of_the_best_spans_and_none_that_is_held_out():
    seen, asked = [], []

    class Told:
        text = "told"

        def simulate(self, tokens):
            asked.append(tuple(tokens))
            return [0.0] * len(tokens)

    def explainer(spans):
        seen.extend(spans)
        return Told()

    tokens = [f"w{i}" for i in range(320)]
    activations = torch.arange(320) / 320
    found = explain(activations, tokens, 0, explainer, best=6)
    assert [span.start for span in found.spans] == [304, 288, 272, 256, 240, 224]
    assert [span.start for span in seen] == [304, 272, 240]
    assert not {span.tokens for span in seen} & set(asked)
    assert len(asked) == found.held_out == 9
    assert explain(activations, tokens, 0, explainer, best=6).spans == found.spans


def test_correlation_against_a_loop():
    x, y = [1.0, 2.0, 4.0, 3.0], [0.5, 0.1, 0.9, 0.7]
    mx, my = sum(x) / 4, sum(y) / 4
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    scale = (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5
    assert correlation(x, y) == pytest.approx(top / scale, abs=1e-12)


def test_the_longest_match_is_not_always_first_but_the_more_telling_one():
    spans = [Span(0, ("a", "b", "c", "b"), (0.0, 1.0, 0.0, 0.2)), Span(4, ("a", "b", "d", "b"), (0.0, 1.0, 0.0, 0.2))]
    made = top_ngrams(spans)
    assert next(iter(made.levels)) == ("a", "b")
    assert made.simulate(("a", "b", "x", "b")) == pytest.approx([0.0, 1.0, 0.0, 0.2])


def test_what_cannot_be_explained():
    with pytest.raises(InputError, match="3 tokens with 4"):
        explain(torch.zeros(4), ["a"] * 3, 0)
    with pytest.raises(InputError, match="at least 4 spans"):
        explain(torch.zeros(40), ["a"] * 40, 0)

    class Short:
        text = "short"

        def simulate(self, tokens):
            return [0.0]

    with pytest.raises(InputError, match="simulated 1 activations for 16"):
        explain(torch.rand(160), _tokens(160), 0, lambda spans: Short())
    assert len(spans_of(torch.zeros(35), ["a"] * 35, 8)) == 4
