"""Stories with questions in between: telegraphic at first, whole later, and always answered rightly."""

import re
from itertools import islice

import pytest

from mnemic.benchmarks import babi, prose
from mnemic.benchmarks.babi import oracle
from mnemic.benchmarks.building import build, examples
from mnemic.benchmarks.experiment import Experiment
from mnemic.benchmarks.stories import EMPTY_WORDS, FOLLOWING, StoryExamples
from mnemic.core.errors import ConfigError
from mnemic.training import SegmentLaw, word_tokenizer
from mnemic.training.data import IGNORED

TASKS = ("qa1", "qa2", "qa3", "qa6", "qa7", "qa10")


@pytest.fixture(scope="module")
def tokenizer():
    stories = [
        " ".join([*s.facts, s.question, s.answer]) for task in TASKS for s in babi.generate(task, 0, "train", 300)
    ]
    return word_tokenizer([d.text for d in prose("train")], 512, always=stories)


@pytest.fixture(autouse=True)
def no_books(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MNEMIC_DATA", raising=False)


def told(tokenizer, example) -> list[tuple[str, str]]:
    """What was read before each answer, and the answer."""
    ids, labels, found = example["input_ids"], example["labels"], []
    for i, label in enumerate(labels):
        if label not in (IGNORED, tokenizer.eos_token_id) and labels[i - 1] in (IGNORED, tokenizer.eos_token_id):
            end = labels.index(tokenizer.eos_token_id, i)
            found.append((tokenizer.decode(ids[:i]), tokenizer.decode(labels[i:end])))
    return found


def spelled(text: str) -> str:
    return re.sub(r" (?=[.?])", "", text)


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_follows_from_the_facts_before_it(tokenizer, task: str):
    """The oracle reads the sentences of a sample's text that are facts, of whichever story."""
    known = babi.generate(task, 3, "train", 1500)
    fact = re.compile("|".join(sorted({re.escape(f) for s in known for f in s.facts}, key=len, reverse=True)))
    questions = {s.question.strip() for s in known}
    asked = 0
    for example in islice(StoryExamples((task,), tokenizer, 64, SegmentLaw(2, (4,), batch=4), seed=1), 40):
        for text, answer in map(lambda pair: (spelled(pair[0]), pair[1]), told(tokenizer, example)):
            question = next(q for q in questions if text.endswith(q))
            assert oracle(task, fact.findall(text), question) == answer
            asked += 1
    assert asked > 40


def test_questions_are_mostly_about_what_was_not_said_last(tokenizer):
    """Of telegrams: a fact is a name and a place, and so is a question with its answer."""
    examples = StoryExamples(("qa1",), tokenizer, 64, SegmentLaw(1, (1,), batch=4), growth=(100, 101))
    last = asked = 0
    for example in islice(examples, 200):
        names = {}
        for at, label in enumerate(example["labels"]):
            word = tokenizer.decode(example["input_ids"][at])
            if word in babi.ACTORS:
                name = word
            elif word in babi.PLACES and label == IGNORED:
                said, names[name] = name, word
            elif word in babi.PLACES and len(names) > 1:
                assert names[name] == word
                asked += 1
                last += name == said
    assert asked > 500
    assert 0.15 < last / asked < 0.35


@pytest.mark.parametrize("task", ["qa1", "qa7"])
def test_what_tests_ask_is_not_trained_on(tokenizer, task: str):
    """A short story of training may be that of a test; then its question is another one."""
    known = babi.generate(task, 3, "train", 1500)
    fact = re.compile("|".join(sorted({re.escape(f) for s in known for f in s.facts}, key=len, reverse=True)))
    questions = {s.question.strip(): s.question for s in known}
    splits = []
    for example in islice(StoryExamples((task,), tokenizer, 64, SegmentLaw(2, (4,), batch=4), seed=1), 60):
        for text, _ in told(tokenizer, example):
            question = next(raw for q, raw in questions.items() if spelled(text).endswith(q))
            splits.append(babi.split_of(fact.findall(spelled(text)), question))
    assert {"train", "validation"} == set(splits)


def test_samples_end_with_a_question_in_their_last_segment(tokenizer):
    found = list(islice(StoryExamples(("qa1",), tokenizer, 64, SegmentLaw(3, (3,), batch=4)), 60))
    assert all(128 < len(e["input_ids"]) <= 192 for e in found)
    assert len({len(e["input_ids"]) for e in found}) > 5
    assert all(e["labels"][-1] == tokenizer.eos_token_id and e["labels"][-2] != IGNORED for e in found)
    assert all(label in (IGNORED, i) for e in found for i, label in zip(e["input_ids"], e["labels"], strict=True))
    # From one question to many, and with many facts that nobody asks about.
    asked = [len(told(tokenizer, e)) for e in found]
    assert min(asked) == 1
    assert max(asked) >= 5


def test_stories_grow_from_telegrams_to_whole_sentences(tokenizer):
    examples = StoryExamples(("qa1",), tokenizer, 64, SegmentLaw(1, (1,), batch=4), growth=(10, 20))
    texts = [spelled(tokenizer.decode(e["input_ids"])) for e in islice(examples, 120)]
    words = [re.findall(r"[A-Za-z]+", text.replace("<eos>", "")) for text in texts]
    assert not any(EMPTY_WORDS.intersection(each) for each in words[:40])
    part = [len(EMPTY_WORDS.intersection(each)) for each in words[44:80]]
    assert 0 in part or min(part) < 4
    assert all({"Where", "is", "to", "the"} <= set(each) for each in words[80:])
    # What is left of a telegram is every name and place.
    names = {"Mary", "John", "Daniel", "Sandra", "office", "garden", "kitchen", "hallway", "bathroom", "bedroom"}
    assert all(set(each) <= names for each in words[:40])


def test_stories_go_on_at_a_position_and_never_come_again(tokenizer):
    def made():
        return StoryExamples(("qa1", "qa2"), tokenizer, 64, SegmentLaw(1, (2, 4), batch=2), growth=(3, 9), seed=5)

    whole = list(islice(made(), 40))
    first, second = made(), made()
    assert list(islice(first, 13)) == whole[:13]
    second.load_state_dict(first.state_dict())
    assert list(islice(second, 27)) == whole[13:]
    assert len({tuple(e["input_ids"]) for e in whole}) == 40
    other = StoryExamples(("qa1", "qa2"), tokenizer, 64, SegmentLaw(1, (2, 4), batch=2), growth=(3, 8), seed=5)
    assert other.fingerprint() != made().fingerprint()


def test_stories_that_do_not_follow_one_another_stay_alone(tokenizer):
    """Objects carried at the end of a story would be counted in the next one."""
    assert "qa7" not in FOLLOWING
    assert "qa1" in FOLLOWING
    more = {}
    for task in ("qa1", "qa7"):
        known = [s.facts for s in babi.generate(task, 3, "train", 1500)]
        fact = re.compile("|".join(sorted({re.escape(f) for facts in known for f in facts}, key=len, reverse=True)))
        made = islice(StoryExamples((task,), tokenizer, 512, SegmentLaw(1, (1,), batch=1)), 40)
        told_most = max(len(fact.findall(spelled(tokenizer.decode(e["input_ids"])))) for e in made)
        more[task] = told_most > max(map(len, known))
    assert more == {"qa1": True, "qa7": False}


def test_few_facts_in_long_samples(tokenizer):
    known = {f for s in babi.generate("qa1", 3, "train", 1500) for f in s.facts}
    fact = re.compile("|".join(sorted(map(re.escape, known), key=len, reverse=True)))
    found = list(islice(StoryExamples(("qa1",), tokenizer, 64, SegmentLaw(8, (8,), batch=4), facts=5), 60))
    facts = [len(fact.findall(spelled(tokenizer.decode(e["input_ids"])))) for e in found]
    asked = [len(told(tokenizer, e)) for e in found]
    assert all(448 < len(e["input_ids"]) <= 512 for e in found)
    assert all(count <= 5 or questions_after_one_fact(found[i], fact, tokenizer) for i, count in enumerate(facts))
    assert min(facts) == 1
    assert max(asked) >= 4


def questions_after_one_fact(example, fact, tokenizer) -> bool:
    """Whether all questions stand behind the last fact: then these facts are what the first of them took."""
    first, _ = told(tokenizer, example)[0]
    return len(fact.findall(spelled(first))) == len(fact.findall(spelled(tokenizer.decode(example["input_ids"]))))


def test_bad_settings_are_named(tokenizer):
    with pytest.raises(ConfigError, match="no room for a story"):
        StoryExamples(("qa1",), tokenizer, 16, SegmentLaw(1, (2,), batch=4))
    with pytest.raises(ConfigError, match="growth"):
        StoryExamples(("qa1",), tokenizer, 64, SegmentLaw(1, (2,), batch=4), growth=(5, 2))
    with pytest.raises(ConfigError, match="No story of qa3"):
        next(iter(StoryExamples(("qa3",), tokenizer, 32, SegmentLaw(1, (1,), batch=4))))
    for options in ({"growth": [1]}, {"growth": [2, 1]}, {"growth": ["a", "b"]}, {"grow": [1, 2]}, {"facts": 0}):
        with pytest.raises(ConfigError, match=r"grow|facts"):
            Experiment(task="stories", task_options=options)


def test_an_experiment_trains_on_stories():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings = Experiment(
        memory="none", task="stories", tasks=("qa1",), task_options={"growth": [1, 3]}, segment=32, unit=64,
        batch_size=2, vocabulary=300, host_options=small,
    )  # fmt: skip
    assert settings.by_segments
    assert settings.on_stories
    made = examples(settings, *build(settings))
    assert made.growth == (1, 3)
    assert len(list(islice(made, 8))) == 8
