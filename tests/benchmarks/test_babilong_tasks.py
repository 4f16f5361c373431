"""BABILong over all 20 tasks: samples of every task, the published scoring rule, and the tasks in words."""

import itertools
import random

import pytest

from mnemic.benchmarks import babi, compare_answers, compare_answers_fixed, open_babilong, oracle
from mnemic.benchmarks.babilong import LABELS
from mnemic.benchmarks.babilong_tasks import TASKS
from mnemic.core import UnknownNameError


def told(sample, tokenizer):
    """The facts of a sample, read from where it says that they begin."""
    ids = tokenizer.encode(" " + sample.context)
    for offset in sample.fact_offsets:
        yield tokenizer.decode(ids[offset : offset + 16]).partition(".")[0].strip() + "."


@pytest.mark.parametrize("task", LABELS)
def test_generated_facts_of_every_task_are_hidden_and_answer(no_data, tokenizer, task):
    stream = open_babilong(task, "4k", tokenizer, seed=2, count=4)
    samples = list(stream)
    assert len(samples) == 4
    for sample in samples:
        assert sample.tokens == stream.budget == 3700
        assert sample.target == oracle(task, list(told(sample, tokenizer)), sample.question)
        assert compare_answers_fixed(sample.target, sample.target, sample.question, task)
    for sample in open_babilong(task, "0k", tokenizer, count=20):
        facts = sample.context.replace(". ", ".\n").split("\n")
        assert sample.target == oracle(task, facts, sample.question)


@pytest.mark.parametrize("task", LABELS)
def test_released_facts_of_every_task_are_hidden(data, tokenizer, task):
    stories = [s for s in babi.read(data, task) if len(s.facts) + 1 <= 462]  # (4000 - 300) // 8
    samples = open_babilong(task, "4k", tokenizer, data=data, background="prose", count=3)
    for sample, story in zip(samples, stories, strict=False):
        assert list(told(sample, tokenizer)) == list(story.facts)
        assert (sample.question, sample.target) == (story.question, story.answer)


# The rule as the card states it, step by step, with the labels written out again.
PLACES = "bathroom bedroom garden hallway kitchen office"
CARD_LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), PLACES),
    "qa5": "Bill Fred Jeff Mary apple football milk", **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), "no yes"),
    "qa7": "none one three two", "qa8": "apple football milk nothing", "qa10": "maybe no yes",
    "qa14": "bedroom cinema kitchen office park school", "qa15": "cat mouse sheep wolf",
    "qa16": "gray green white yellow", "qa19": "e,e e,n e,s n,e n,n n,w s,e s,s s,w w,n w,s w,w",
    "qa20": "bedroom bored garden hungry kitchen thirsty tired",
}  # fmt: skip


def rule_of_the_card(target, output, question, task):
    output = output.lower()
    for mark in (".", "<context>", "<example>"):
        cut = output.find(mark)
        if cut >= 0:
            output = output[:cut]
    in_question, in_output = [], []
    for label in CARD_LABELS[task].split():
        if question.lower().find(label.lower()) >= 0:
            in_question.append(label.lower())
        if output.find(label.lower()) >= 0:
            in_output.append(label.lower())
    left = sorted(label for label in in_output if label not in in_question)
    if "," in target and len(target) > 3:
        return left == sorted(set(target.lower().split(",")))
    return left == [target.lower()]


def hostile(rng, task, target, question):
    """A string made to confuse the rule: labels, parts of labels, marks, and the question's own words."""
    labels = CARD_LABELS[task].split()
    words = question.replace("?", "").split()
    label = rng.choice(labels)
    pieces = [
        *[target] * 3, label, label.upper(), label[:-1], "x" + label, label + "s", rng.choice(words), ".", "...",
        "<context>", "<CONTEXT>", "<example>", "Question:", "question", ",", ", ", "\n", "\t", "nobody knows", "none",
        "no one", "I\u0307n", "\u2028", "", "not", *labels[:2],
    ]  # fmt: skip
    return rng.choice(("", " ", ",")).join(rng.choice(pieces) for _ in range(rng.randrange(7)))


def test_scorer_is_the_rule_of_the_card_on_a_thousand_hostile_strings():
    rng = random.Random(20240614)
    right = 0
    for number in range(1000):
        task = list(CARD_LABELS)[number % 20]
        story = next(itertools.islice(STORIES[task], number // 20, None))
        output = hostile(rng, task, story.answer, story.question)
        expected = rule_of_the_card(story.answer, output, story.question, task)
        assert compare_answers(story.answer, output, story.question, task) is expected, (task, story, output)
        right += expected
    assert 150 < right < 850  # both verdicts are common


STORIES = {task: babi.generate(task, 0, "test", 50) for task in CARD_LABELS}


def test_labels_are_those_of_the_card():
    assert {task: set(labels.split()) for task, labels in CARD_LABELS.items()} == {t: set(LABELS[t]) for t in LABELS}


@pytest.mark.parametrize("task", LABELS)
def test_tasks_in_words(no_data, tokenizer, task):
    spec = TASKS[f"babilong_{task}"]
    assert (spec.name, spec.max_new_tokens) == (f"babilong_{task}", 20)
    records = list(itertools.islice(spec.records(tokenizer=tokenizer, length="1k" if task != "qa3" else "4k"), 2))
    again = list(itertools.islice(spec.records(tokenizer=type(tokenizer)(), length="1k" if task != "qa3" else "4k"), 2))
    assert records == again
    for record in records:
        assert spec.fixed(record.targets[0], record) == 1.0
        assert spec.official(record.targets[0], record) == float(record.targets[0] != "none")
        assert spec.fixed("I do not know", record) == 0.0
        assert record.metadata["task"] == task
        assert len(record.metadata["facts"]) >= 1
    with pytest.raises(UnknownNameError):
        next(spec.records(tokenizer=tokenizer, length="3k"))
