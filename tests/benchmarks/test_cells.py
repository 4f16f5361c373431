"""Cells: an oracle that looks up scores 1, a random guess chance; words end to end on a tiny model; batches alike."""

import itertools
import json
import random
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mnemic
from mnemic.benchmarks import RecallTask, compare_answers, compare_answers_fixed, open_babilong, prose
from mnemic.benchmarks.babilong import LABELS, prompt
from mnemic.benchmarks.catalog import catalog, open_cell
from mnemic.benchmarks.chomsky import TASKS as LANGUAGES
from mnemic.benchmarks.chomsky import length_generalisation
from mnemic.benchmarks.distances import by_distance
from mnemic.benchmarks.key_values import PairSegments
from mnemic.benchmarks.token_cell import TokenCell
from mnemic.training import byte_tokenizer
from tests.tiny import tiny_host

SEGMENT = 32
# Task, length, segment, options.
SIZED = [
    ("mqar", 64, SEGMENT, {"vocabulary": 64, "pairs": 8, "power": 1.0}),
    ("mqar", 64, SEGMENT, {"vocabulary": 64, "pairs": 8, "updates": 5, "answered": True}),
    ("segment_mqar", 4, SEGMENT, {"vocabulary": 64, "pairs": 8}),
    ("compositional_mqar", 64, SEGMENT, {"vocabulary": 64, "grid": 3}),
    ("remember", 9, 5, {"symbols": 8}),
    ("rewrite", 9, 6, {"symbols": 3, "value_size": 2}),
    ("induction", 40, SEGMENT, {}),
    ("copying", 12, SEGMENT, {"gap": 3}),
    ("recall", 4, 8, {"pairs": 2}),
]


def first(cell, count):
    return list(itertools.islice(cell.samples(), count))


class Said:
    """In place of a model: what it says after each token of a row is given by a function of the row's ids."""

    device = torch.device("cpu")

    def __init__(self, vocabulary, say):
        self.vocabulary, self.say = vocabulary, say

    def eval(self):
        return self

    def get_input_embeddings(self):
        return torch.nn.Embedding(self.vocabulary, 1)

    def __call__(self, ids, *, use_cache, logits_to_keep):
        said = torch.tensor([self.say(row) for row in ids.tolist()])[:, -logits_to_keep:]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, self.vocabulary).float())


def looked_up(task, row):
    """What stood behind the same words before, read from the ids alone."""
    if hasattr(task, "string"):
        return [0] * (task.string + task.gap) + row[: len(row) - task.string - task.gap]
    if isinstance(task, PairSegments):
        size = task.segment_length
        parts = [row[i : i + size] for i in range(0, len(row), size)]
        values = [
            part[task.key_size + 1 :] for part in parts[:-1] if part[: task.key_size] == parts[-1][: task.key_size]
        ]
        return [*row[: -size + task.key_size], *values[-1], 0]
    words = 2 if hasattr(task, "grid") else 1
    known, said = {}, []
    for i in range(len(row)):
        said.append(known.get(tuple(row[max(0, i - words + 1) : i + 1]), 0))
        known[tuple(row[max(0, i - words) : i])] = row[i]
    return said


def possible(task):
    """The answers that a guess chooses from."""
    if isinstance(task, PairSegments):
        return range(task.symbols)
    if isinstance(task, RecallTask):
        return range(task.first_value, task.vocab_size)
    if hasattr(task, "string"):
        return range(2, task.vocabulary)
    return range(1 if hasattr(task, "length") and not hasattr(task, "grid") and not hasattr(task, "pairs")
                 else task.vocabulary // 2, task.vocabulary)  # fmt: skip


def near(share, chance, count):
    return abs(share - chance) < 4 * (chance * (1 - chance) / count) ** 0.5


def mean(records, rule="official"):
    return sum(r[rule] for r in records) / len(records)


@pytest.mark.parametrize("name, length, segment, options", SIZED)
def test_token_tasks_looked_up_and_guessed(name, length, segment, options):
    cell = open_cell(name, length, 3, tokenizer=None, segment=segment, options=options)
    assert isinstance(cell, TokenCell)
    task = cell.sized
    vocabulary = getattr(task, "vocab_size", None) or task.vocabulary
    samples = first(cell, 200)
    assert samples == first(cell, 200)
    records = cell.answer(Said(vocabulary, lambda row: looked_up(task, row)), samples)
    assert {r["official"] for r in records} == {r["fixed"] for r in records} == {r["row"] for r in records} == {1.0}
    assert all(r["output"] == r["targets"] and r["truncated"] == 0 for r in records)
    assert all(r["tokens"] == len(s["input_ids"]) for r, s in zip(records, samples, strict=True))
    rng, answers = random.Random(1), possible(task)
    guessed = cell.answer(Said(vocabulary, lambda row: [rng.choice(answers) for _ in row]), first(cell, 1500))
    assert near(mean(guessed), cell.chance, 1500 * len(guessed[0].get("parts", guessed[0]["question"])))
    assert mean(guessed, "row") <= mean(guessed)
    json.dumps(records)


@pytest.mark.parametrize("language", LANGUAGES)
def test_formal_languages_known_and_guessed(language):
    task = LANGUAGES[language]
    cell = open_cell(f"chomsky_{language}", 30, 2, tokenizer=None, segment=SEGMENT, options={"steps": 1})
    samples = first(cell, 64)
    answers = {tuple(x): y for x, y in samples}

    def known(row):
        x = row[: row.index(task.blank)]
        return [0] * (2 * len(x)) + answers[tuple(x)] + [0]

    records = cell.answer(Said(task.vocabulary, known), samples)
    assert {r["official"] for r in records} == {r["row"] for r in records} == {1.0}
    rng, symbols = random.Random(0), task.outputs - task.terminated
    guessed = cell.answer(Said(task.vocabulary, lambda row: [rng.randrange(symbols) for _ in row]), first(cell, 1000))
    counted = [len(r["targets"]) for r in guessed]
    # Of each sample the terminator is never guessed; see FormalTask.chance.
    expected = sum(cell.chance * (1 - task.terminated / n) for n in counted) / len(counted)
    assert near(mean(guessed), expected, sum(counted))


def test_formal_samples_are_those_of_length_generalisation():
    task, seen = LANGUAGES["cycle_navigation"], []

    def solver(inputs, count):
        seen.extend(inputs)
        return [[0] * count for _ in inputs]

    measured = length_generalisation(task, solver, [45], samples=64, batch=64, seed=4)
    cell = open_cell("chomsky_cycle_navigation", 45, 4, tokenizer=None, segment=SEGMENT)
    samples = first(cell, 64)
    assert [x for x, _ in samples] == seen
    records = cell.answer(Said(task.vocabulary, lambda row: [0] * len(row)), samples)
    assert mean(records) == pytest.approx(measured.score)


@pytest.mark.parametrize("name, length, segment, options", [s for s in SIZED if s[0] in ("segment_mqar", "rewrite")])
def test_distances_in_segments(name, length, segment, options):
    cell = open_cell(name, length, 0, tokenizer=None, segment=segment, options=options)
    samples = first(cell, 100)
    vocabulary = cell.sized.vocabulary
    found = set()
    for sample, record in zip(samples, cell.answer(Said(vocabulary, lambda row: [0] * len(row)), samples), strict=True):
        ids = torch.tensor(sample["input_ids"]).reshape(length, segment)
        for part, key in zip(record["parts"], record["question"], strict=True):
            if name == "segment_mqar":
                [here] = (ids[:-1] == key).any(1).nonzero()
            else:
                here = (ids[:-1, :2] == ids[-1, :2]).all(1).nonzero()[-1]
            assert part["distance"] == length - 1 - int(here)
            found.add(part["distance"])
    assert found == set(range(1, length))


@pytest.fixture(scope="module")
def recalling():
    task = RecallTask()
    return task, mnemic.attach(tiny_host(vocab_size=task.vocab_size), "rmt", segment=8)


def test_recall_counts_right_answers_by_distance(recalling):
    task, model = recalling
    for segments in (2, 3):
        cell = open_cell("recall", segments, 1, tokenizer=None, segment=8, options={"segments": 7})
        assert cell.chance == task.chance
        expected = defaultdict(list)
        generator = torch.Generator().manual_seed(1000 + segments)
        for where in (0, None):
            batch = task.batch(256, generator, segments=segments, fact_segment=where)
            with torch.no_grad():
                said = model(batch.input_ids).logits[:, -2].argmax(-1)
            for distance, right in zip(batch.distance.tolist(), (said == batch.input_ids[:, -1]).tolist(), strict=True):
                expected[distance].append(right)
        found = by_distance(model, cell, 512, 100)
        assert {d: (s.correct, s.count) for d, s in found.items()} == {d: (sum(h), len(h)) for d, h in expected.items()}
        assert all(r["parts"][0]["official"] == r["official"] == r["row"] for r in cell.answer(model, first(cell, 8)))


def test_token_batches_are_alike(recalling):
    _, model = recalling
    cell = open_cell("recall", 3, 1, tokenizer=None, segment=8)
    samples = first(cell, 6)
    together = cell.answer(model, samples)
    assert together == [record for sample in samples for record in cell.answer(model, [sample])]
    language = open_cell("chomsky_reverse_string", 9, 1, tokenizer=None, segment=8)
    samples = first(language, 4)
    assert language.answer(model, samples) == [r for s in samples for r in language.answer(model, [s])]


def test_ids_beyond_the_vocabulary(recalling):
    _, model = recalling
    cell = open_cell("mqar", 64, 0, tokenizer=None, segment=8)
    with pytest.raises(mnemic.InputError, match="8192 token ids and the model 25"):
        cell.answer(model, first(cell, 1))


# ------------------------------------------------------------------------------------------------------------- words


@pytest.fixture(scope="module")
def reading():
    tokenizer = byte_tokenizer([document.text for document in prose("validation")], 900)
    return mnemic.attach(tiny_host(vocab_size=len(tokenizer)), "lm2", segment=SEGMENT, num_slots=8), tokenizer


def opened(reading, name, length, **settings):
    return open_cell(name, length, 1, tokenizer=reading[1], segment=SEGMENT, **settings)


def test_babilong_is_read_as_it_was_trained_and_scored_by_its_rules(no_data, reading):
    model, tokenizer = reading
    for length in ("0k", 500):
        samples = list(itertools.islice(open_babilong("qa1", length, tokenizer, seed=1), 4))
        cell = opened(reading, "qa1", length)
        records = cell.answer(model, first(cell, 4))
        for record, one in zip(records, samples, strict=True):
            stream = model.stream(tokenizer=tokenizer)
            said = stream.generate(
                prompt(one), max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            asked = (one.target, said, one.question, "qa1")
            assert record["targets"] == [one.target]
            assert (record["question"], record["provenance"]) == (one.question.strip(), one.provenance)
            assert (record["output"], record["tokens"]) == (said, stream.tokens_seen)
            assert (record["official"], record["fixed"]) == (compare_answers(*asked), compare_answers_fixed(*asked))
            assert record["truncated"] == 0
        assert json.loads(json.dumps(records)) == records
        assert cell.chance == 1 / 6


def test_word_batches_are_alike(no_data, reading):
    for name, length in (("qa2", "0k"), ("passkey", 300)):
        cell = opened(reading, name, length)
        samples = first(cell, 3)
        together = cell.answer(reading[0], samples)
        assert together == [record for sample in samples for record in cell.answer(reading[0], [sample])]


def test_babilong_distance_is_that_of_the_last_supporting_fact(no_data, reading):
    _, tokenizer = reading
    cell = opened(reading, "qa1", 600)
    for record in first(cell, 8):
        ids = tokenizer(" " + record.context, add_special_tokens=False)["input_ids"]
        told = tokenizer.decode(ids[record.metadata["support"] :][:60]).split(".")[0]
        person = record.question.removeprefix("Where is ").rstrip("?")
        assert person in told
        assert record.targets[0] in told
        end = len(tokenizer(record.question)["input_ids"]) + record.metadata["tokens"] - 1
        expected = end // SEGMENT - record.metadata["support"] // SEGMENT
        assert cell._record(record, "", cell.asked.prompt(record))["distance"] == expected


def test_one_label_of_each_babilong_question_is_right(no_data, reading):
    assert {entry.name for entry in catalog() if entry.name.startswith("qa")} == set(LABELS)
    for name, labels in LABELS.items():
        cell = opened(reading, name, "0k")
        for record in first(cell, 20):
            assert record.metadata["support"] in record.metadata["facts"]
            right = sum(cell.asked.fixed(label, record) for label in labels)
            assert right == 1 if cell.chance is not None else name == "qa8" and right <= 1
        assert cell.chance is None or cell.chance == 1 / len(labels)


@pytest.mark.parametrize("name, length, depth", [
    ("passkey", 300, True), ("passkey_tokens", 300, True), ("niah", 400, True), ("lines", 5, True),
    ("ruler_niah_single_1", 400, True), ("ruler_niah_multikey_1", 500, False), ("ruler_vt", 800, False),
    ("ruler_fwe", 600, False), ("ruler_cwe", 4600, False),
])  # fmt: skip
def test_generated_words_end_to_end(no_data, reading, name, length, depth):
    model, _ = reading
    cell = opened(reading, name, length)
    # What is said does not matter here, and 128 tokens take long.
    cell = replace(cell, asked=replace(cell.asked, max_new_tokens=6))
    samples = first(cell, 2)
    records = cell.answer(model, samples)
    assert json.loads(json.dumps(records)) == records
    for sample, record in zip(samples, records, strict=True):
        assert record["targets"] == list(sample.targets)
        assert ("depth" in record) == depth
        prompt = len(reading[1](cell.asked.prompt(sample))["input_ids"])
        assert prompt < record["tokens"] <= prompt + 6
        assert record["official"] == cell.asked.official(record["output"], sample)


def test_prompts_of_baselines_count_what_they_leave_out(no_data, reading):
    model, tokenizer = reading
    for name, length in (("qa1", 800), ("niah", 600)):
        whole = opened(reading, name, length)
        [sample] = first(whole, 1)
        context = len(tokenizer(sample.context)["input_ids"])
        question = len(tokenizer(sample.question)["input_ids"])
        for setting in ("truncated:200", "middle-out:200"):
            cell = opened(reading, name, length, prompt=setting)
            [record] = cell.answer(model, first(cell, 1))
            assert abs(record["truncated"] - (context + question - 200)) <= 3  # white space between them
            assert 200 < record["tokens"] <= 200 + cell.asked.max_new_tokens
            assert "distance" not in record
        text = tokenizer.decode(cell.prompting.prompt(cell.asked, sample, tokenizer).ids)
        assert text.startswith(sample.context[:100])
        assert text.endswith(f"{cell.asked.separator}{sample.question}")
