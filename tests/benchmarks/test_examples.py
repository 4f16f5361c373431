"""Training examples: where they end, and where their loss is."""

from itertools import islice

import pytest

from mnemic.benchmarks.building import build, examples
from mnemic.benchmarks.examples import BabilongExamples, RecallExamples
from mnemic.benchmarks.experiment import Experiment
from mnemic.benchmarks.recall import RecallTask
from mnemic.core import ConfigError
from mnemic.core.errors import UnknownNameError
from mnemic.training import SegmentLaw, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    from mnemic.benchmarks import babi, prose

    stories = [" ".join([*s.facts, s.question, s.answer]) for s in babi.generate("qa1", 0, "train", 200)]
    return word_tokenizer([d.text for d in prose("train")], 512, always=stories)


@pytest.mark.parametrize("vary", [True, False])
def test_babilong_examples_end_in_their_last_segment(tokenizer, monkeypatch: pytest.MonkeyPatch, vary: bool):
    monkeypatch.delenv("MNEMIC_DATA", raising=False)
    examples = BabilongExamples(("qa1",), tokenizer, 64, SegmentLaw(2, (2,), batch=4), vary_length=vary)
    found = list(islice(examples, 60))
    ends = {len(example["input_ids"]) for example in found}
    assert all(64 < end <= 128 or vary for end in ends)
    assert len(ends) > 5 if vary else len(ends) == 1
    for example in found:
        answer = [label for label in example["labels"] if label != -100]
        assert answer == example["input_ids"][-2:]
        assert tokenizer.decode(answer[:1]) in ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
        assert answer[1] == tokenizer.eos_token_id
    assert found == list(islice(examples, 60))


def test_segments_too_short_for_a_story_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="no room for a story"):
        BabilongExamples(("qa1",), tokenizer, 16, SegmentLaw(1, (2,), batch=4))


def test_recall_examples_share_their_length_in_a_batch():
    task = RecallTask(segment_length=8)
    examples = list(islice(RecallExamples(task, SegmentLaw(2, (4,), batch=4), fact_segment=0), 40))
    for start in range(0, 40, 4):
        assert len({len(e["input_ids"]) for e in examples[start : start + 4]}) == 1
    for example in examples:
        first = example["input_ids"][:8]
        assert example["labels"][-1] in first


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "settings, sizes",
    [
        ({"task": "mqar", "task_options": {"vocabulary": 32, "length": 24, "pairs": 2}}, {24}),
        ({"task": "segment_mqar", "segment": 8, "task_options": {"pairs": 2}, "least_segments": 2}, {16, 24}),
        ({"task": "segment_mqar", "segment": 64, "unit": 8, "least_segments": 2}, {16, 24}),
        ({"task": "rewrite", "segment": 5, "least_segments": 2}, {10, 15}),
        ({"task": "copying", "task_options": {"string": 5}}, {11}),
        ({"task": "chomsky", "tasks": ("parity_check",), "task_options": {"longest": 3}}, {3, 4, 5}),
        ({"task": "chomsky", "tasks": ("parity_check",), "task_options": {"longest": 2, "steps": 2}}, {5, 8}),
        ({"task": "recall", "segment": 32, "unit": 8}, {8, 16, 24}),
    ],
)  # fmt: skip
def test_token_level_tasks_have_a_tokenizer_and_samples_of_their_sizes(settings, sizes):
    given = {"host_options": SMALL, "most_segments": (3,), "batch_size": 4, "memory": "none", **settings}
    experiment = Experiment(**given)
    model, tokenizer = build(experiment)
    samples = [next(data)["input_ids"] for data in [iter(examples(experiment, model, tokenizer))] for _ in range(400)]
    assert {len(ids) for ids in samples} == sizes
    assert max(max(ids) for ids in samples) < len(tokenizer) == model.config.vocab_size
    assert experiment.by_segments == (experiment.task in ("segment_mqar", "rewrite", "recall"))
    assert model.mnemic.layout.segment == experiment.segment


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "segment_mqar", "task_options": {"pars": 2}}, "Did you mean 'pairs'"),
        ({"task": "segment_mqar", "task_options": {"segment_length": 4}}, "No size of segment_mqar"),
        ({"task": "rewrite", "segment": 8}, "set segment"),
        ({"task": "recall", "task_options": {"valeus": 2}}, "Did you mean 'values'"),
        ({"task": "chomsky", "tasks": ("qa1",)}, "No formal task"),
        ({"task": "chomsky", "tasks": ("parity_check", "even_pairs")}, "name one"),
        ({"task": "chomsky", "tasks": ("parity_check",), "task_options": {"length": 2}}, "No size of chomsky"),
        ({"task": "babilong", "task_options": {"pairs": 2}}, "no sizes of its own"),
        ({"unit": 0}, "at least 1"),
    ],
)
def test_sizes_that_a_task_does_not_have(settings, message):
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        Experiment(**settings)
