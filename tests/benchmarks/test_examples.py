"""Training examples: where they end, and where their loss is."""

from itertools import islice

import pytest

from mnemic.benchmarks.examples import BabilongExamples, RecallExamples
from mnemic.benchmarks.recall import RecallTask
from mnemic.core import ConfigError
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
