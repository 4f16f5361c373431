"""Facts in growing numbers and samples with answers, for looking inside models of each kind of task."""

import random
from pathlib import Path

import pytest

import mnemic
from mnemic.benchmarks.babi.words import ACTORS, PLACES
from mnemic.benchmarks.experiment import Experiment
from mnemic.benchmarks.facts import _pairs, _people, fact_curve
from mnemic.benchmarks.first_samples import first_samples
from mnemic.benchmarks.key_values import PairSegments
from mnemic.benchmarks.trained import Trained
from mnemic.core.errors import UnsupportedError
from mnemic.training import word_tokenizer
from mnemic.training.data import IGNORED
from tests.tiny import tiny_host

STORY = "Mary went journeyed travelled moved back to the bathroom bedroom garden hallway kitchen office . Where is ?"


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([STORY, " ".join(ACTORS), " ".join(PLACES)])


def _trained(tokenizer, **settings):
    model = mnemic.attach(tiny_host(vocab_size=128), "rmt", segment=settings.get("segment", 16), num_tokens=2)
    return Trained(Path("run"), model, tokenizer, Experiment(memory="rmt", **settings))


@pytest.mark.parametrize("count", [1, 4])
def test_people_are_told_once_each_and_one_is_asked_for(tokenizer, count):
    draw = _people(tokenizer, count, random.Random(0))
    for _ in range(5):
        example = draw()
        words = tokenizer.convert_ids_to_tokens(example["input_ids"])
        (answer,) = [i for i, label in enumerate(example["labels"]) if label != IGNORED]
        asked = words[answer - 2]
        told = [word for word in words[: answer - 4] if word in ACTORS]
        assert len(told) == len(set(told)) == count
        assert words[answer - 4 : answer - 2] == ["Where", "is"]
        assert words[answer] == next(w for w in words[words.index(asked) :] if w in PLACES)


def test_models_of_words_are_asked_up_to_four_facts(tokenizer):
    points = fact_curve(_trained(tokenizer, task="babilong", segment=16), samples=2)
    assert [(point.facts, point.answers, point.chance) for point in points] == [(n, 2, 1 / 6) for n in (1, 2, 3, 4)]


def test_labels_of_pairs_are_the_values_alone():
    task = PairSegments(pairs=3, value_size=2)
    example = _pairs(task, random.Random(0))()
    labelled = [i for i, label in enumerate(example["labels"]) if label != IGNORED]
    assert labelled == [len(example["input_ids"]) - 3, len(example["input_ids"]) - 2]


def test_tasks_without_facts_have_no_curve(tokenizer):
    assert fact_curve(_trained(tokenizer, task="copying"), samples=1) == []


def test_samples_of_words_and_of_tokens(tokenizer):
    words = first_samples(_trained(tokenizer, task="babilong"), "qa1", "0k", 60)
    assert sum(len(prompt) + len(answer) for prompt, answer in words) >= 60
    prompt, answer = words[0]
    assert tokenizer.decode(answer).strip() in PLACES
    assert tokenizer.decode(prompt).strip().endswith("?")
    ((ids, said),) = first_samples(_trained(tokenizer, task="remember", segment=5), "remember", "3")
    assert (len(ids), len(said)) == (13, 1)
    with pytest.raises(UnsupportedError, match="outputs for every input"):
        first_samples(_trained(tokenizer, task="babilong"), "chomsky_parity_check", "6")
