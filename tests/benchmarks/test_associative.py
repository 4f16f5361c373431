"""Associative recall at token level: layout, statistics, an oracle by look-up, a guesser at chance."""

import itertools
import random
from collections import Counter, defaultdict

import pytest
import torch

from mnemic.benchmarks.associative import (
    CompositionalMqar,
    Mqar,
    SegmentMqar,
    TokenExamples,
    accuracy,
    rows,
)
from mnemic.benchmarks.draws import distinct, weighted
from mnemic.benchmarks.key_values import (
    END,
    GENERATE,
    SEPARATOR,
    Copying,
    Induction,
    PairSegments,
    capacity,
)
from mnemic.core import ConfigError, DataError, InputError
from mnemic.training import Collator, SegmentLaw

MQAR = {
    "mqar": Mqar(vocabulary=128, pairs=8),
    "uniform": Mqar(vocabulary=128, pairs=8, power=1.0),
    "forgetting": Mqar(vocabulary=128, pairs=8, updates=3),
    "random others": Mqar(vocabulary=128, pairs=8, random_others=True),
    "answered": Mqar(vocabulary=64, pairs=8, power=1.0, earliest=32, answered=True),
}
SEGMENTS = SegmentMqar(segments=4, pairs=6)


def asked(labels):
    return [(t, value) for t, value in enumerate(labels) if value != -100]


def looked_up(ids, end):
    """What each key was last paired with, from pairs at even places before `end`."""
    return {ids[t]: ids[t + 1] for t in range(0, end, 2) if ids[t]}


@pytest.mark.parametrize("name", MQAR)
def test_mqar_labels_are_what_a_dictionary_says(name):
    task = MQAR[name]
    written = 2 * (task.pairs + task.updates)
    for example in itertools.islice(TokenExamples(task, 5), 1000):
        ids, labels = example["input_ids"], example["labels"]
        assert len(ids) == len(labels) == task.length
        table = looked_up(ids, written)
        assert len(table) == task.pairs
        assert all(0 < key < task.vocabulary // 2 <= value < task.vocabulary for key, value in table.items())
        found = asked(labels)
        # The label stands one place behind its question: the model shifts.
        assert [table[ids[t - 1]] for t, _ in found] == [value for _, value in found]
        assert {ids[t - 1] for t, _ in found} == table.keys()
        assert all((t - 1) % 2 == 0 and t - 1 >= task.first_question for t, _ in found)
        assert all((ids[t] == value) == task.answered or task.random_others for t, value in found)
        if task.updates:
            first = looked_up(ids, 2 * task.pairs)
            again = ids[2 * task.pairs : written : 2]
            assert len({*again}) == task.updates
            assert all((first[key] != table[key]) == (key in again) for key in first)


def test_mqar_layout_of_a_small_row():
    """T 16, n 3: six tokens of pairs, then questions in five slots; the rest is filler."""
    example = Mqar(vocabulary=20, length=16, pairs=3).example(random.Random(0))
    ids, labels = example["input_ids"], example["labels"]
    questions = [t for t in range(6, 16) if ids[t]]
    assert len(questions) == 3
    assert all(t % 2 == 0 for t in questions)
    assert sorted(ids[0:6:2]) == sorted(ids[t] for t in questions)
    assert [t for t, _ in asked(labels)] == [t + 1 for t in questions]


def gaps(task, count, seed):
    """The slot of the question for the pair that stands first."""
    found = Counter()
    for example in itertools.islice(TokenExamples(task, seed), count):
        ids = example["input_ids"]
        found[(ids.index(ids[0], 2 * task.pairs) - 2 * task.pairs) // 2] += 1
    return found


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gap_law(power):
    """The first draw follows j^(a - 1) exactly; within 3.9 sigma in every slot (24 slots, p < 0.003)."""
    count, task = 4000, Mqar(vocabulary=128, pairs=8, power=power)
    weights = [(j + 1) ** (power - 1) for j in range(24)]
    for slot, seen in gaps(task, count, 1).items():
        p = weights[slot] / sum(weights)
        assert abs(seen - count * p) < 3.9 * (count * p * (1 - p)) ** 0.5


def test_draws_without_replacement_take_what_is_left():
    """Three of five by weights 5 .. 1, against the products of what is left, computed by hand."""
    weights, count, rng = [5.0, 4.0, 3.0, 2.0, 1.0], 20_000, random.Random(0)
    seen = Counter(tuple(weighted(rng, weights, 3)) for _ in range(count))
    for order in itertools.permutations(range(5), 3):
        p, left = 1.0, 15.0
        for i in order:
            p, left = p * weights[i] / left, left - weights[i]
        assert abs(seen[order] - count * p) < 4.5 * (count * p * (1 - p)) ** 0.5


def test_distinct_orders_are_equally_likely():
    rng, count = random.Random(0), 12_000
    seen = Counter(tuple(distinct(rng, 4, 2)) for _ in range(count))
    assert len(seen) == 12
    assert all(abs(n - 1000) < 4 * (1000 * 11 / 12) ** 0.5 for n in seen.values())


def test_compositional_needs_both_tokens():
    task = CompositionalMqar(vocabulary=64, length=64, grid=3)
    for example in itertools.islice(TokenExamples(task, 2), 300):
        ids, labels = example["input_ids"], example["labels"]
        table = {(ids[t], ids[t + 1]): ids[t + 2] for t in range(0, 27, 3)}
        assert len(table) == 9
        assert [table[ids[t - 2], ids[t - 1]] for t, _ in asked(labels)] == [value for _, value in asked(labels)]
        assert len(asked(labels)) == 9
        for place in (0, 1):
            values = defaultdict(set)
            for key, value in table.items():
                values[key[place]].add(value)
            assert all(len(v) == 3 for v in values.values())


def test_pairs_and_questions_share_no_segment():
    for example in itertools.islice(TokenExamples(SEGMENTS, 3), 300):
        ids, labels = example["input_ids"], example["labels"]
        table = looked_up(ids, 96)
        assert len(ids) == 128
        assert len(table) == 6
        found = asked(labels)
        assert {ids[t - 1]: value for t, value in found} == table
        assert all(t > 96 for t, _ in found)


def test_of_many_pairs_any_few_are_asked():
    task = SegmentMqar(vocabulary=32, segments=4, segment_length=8, pairs=12, asked=2)
    orders = Counter()
    for example in itertools.islice(TokenExamples(task, 3), 300):
        ids, labels = example["input_ids"], example["labels"]
        table, found = looked_up(ids, 24), asked(labels)
        assert (len(ids), len(table), len(found)) == (32, 12, 2)
        keys = [ids[t - 1] for t, _ in found]
        assert len({*keys}) == 2
        assert [table[key] for key in keys] == [value for _, value in found]
        assert [q.columns[0] for q in task.questions(example)] == [t for t, _ in found]
        places = [key for key in ids[:24:2] if key]
        orders.update(places.index(key) for key in keys)
    # 600 questions over 12 places.
    assert min(orders.values()) > 25
    assert len(orders) == 12
    all_asked = SegmentMqar(segments=4, pairs=6, asked=6)
    assert list(itertools.islice(TokenExamples(all_asked, 1), 5)) == list(
        itertools.islice(TokenExamples(SEGMENTS, 1), 5)
    )


def test_segments_are_drawn_once_a_batch():
    law = SegmentLaw(2, (4,), batch=8)
    examples = list(itertools.islice(TokenExamples(SEGMENTS, 0, law), 80))
    lengths = [len(e["input_ids"]) // 32 for e in examples]
    assert {*lengths} == {2, 3, 4}
    assert all(len({*lengths[at : at + 8]}) == 1 for at in range(0, 80, 8))
    assert Collator()(examples[:8])["input_ids"].shape[0] == 8
    with pytest.raises(ConfigError, match="no segments to vary"):
        TokenExamples(Mqar(), 0, law)
    with pytest.raises(ConfigError, match="at least 2"):
        TokenExamples(SEGMENTS, 0, SegmentLaw(1, (4,), batch=8))
    with pytest.raises(ConfigError, match="larger key_size"):
        TokenExamples(PairSegments(key_size=1), 0, SegmentLaw(2, (4, 18), batch=8))


@pytest.mark.parametrize("rewrite", [False, True])
def test_associative_retrieval_oracle(rewrite):
    task = PairSegments(pairs=20, rewrite=rewrite, key_size=2, value_size=3)
    size = task.segment_length
    repeated = 0
    for example in itertools.islice(TokenExamples(task, 1), 300):
        ids, labels = example["input_ids"], example["labels"]
        segments = [ids[at : at + size] for at in range(0, len(ids), size)]
        assert len(segments) == 21
        assert {s[2] for s in segments[:-1]} == {SEPARATOR}
        assert segments[-1][2] == GENERATE
        assert {s[-1] for s in segments} == {END}
        table = {tuple(s[:2]): s[3:-1] for s in segments[:-1]}
        repeated += len(table) < 20
        assert table[tuple(segments[-1][:2])] == segments[-1][3:-1]
        assert labels == [-100] * (len(ids) - 5) + ids[-5:]
    assert (repeated > 100) == rewrite
    ids, _ = rows(task, 20)
    assert task.value_accuracy(ids, ids) == 1.0
    wrong = ids.clone()
    wrong[:10, -3] += 1
    assert task.value_accuracy(wrong, ids) == 0.5


def test_every_different_key_is_asked_equally_often():
    """Also a key that was written many times: 3 keys, 12 writes."""
    task = PairSegments(pairs=12, rewrite=True, key_size=1, symbols=3)
    count = 3000
    seen = Counter(e["input_ids"][-4] for e in itertools.islice(TokenExamples(task, 4), count))
    assert all(abs(n - 1000) < 4 * (count * 2 / 9) ** 0.5 for n in seen.values())


def test_capacity_inverts_guessing():
    for known in (0, 30, 200):
        right = known / 200 + (1 - known / 200) / 16
        assert capacity(200, 16, right) == pytest.approx(known)
    # The formula of the paper by hand: 50 pairs, 16 values, accuracy 0.7.
    assert capacity(50, 16, 0.7) == pytest.approx((50 * 16 * 0.7 - 50) / 15)
    with pytest.raises(InputError, match="accuracy"):
        capacity(10, 16, 1.2)


def test_induction_and_copying():
    for example in itertools.islice(TokenExamples(Induction(vocabulary=10, length=24), 0), 200):
        ids, labels = example["input_ids"], example["labels"]
        assert ids.count(0) == 2
        assert ids[-2] == 0
        assert labels == [-100] * 23 + [ids[ids.index(0) + 1]]
        assert ids[-1] == labels[-1] != 0
    task = Copying(symbols=5, string=6, gap=3)
    for example in itertools.islice(TokenExamples(task, 0), 100):
        ids, labels = example["input_ids"], example["labels"]
        assert ids[6:10] == [0, 0, 0, 1]
        assert labels == [-100] * 10 + ids[:6]
        assert ids[10:] == ids[:6]


TASKS = {**MQAR, "compositional": CompositionalMqar(vocabulary=64), "segments": SEGMENTS, "induction": Induction(),
         "copying": Copying()}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_oracle_and_guesser(name):
    """The labels score 1; a uniform guess among the answers scores chance, within 4 sigma."""
    task = TASKS[name]
    _, labels = rows(task, 400, seed=7)
    assert accuracy(labels, labels) == (1.0, 1.0)
    answers = round(1 / task.chance)
    guesses = task.vocabulary - answers + torch.randint(answers, labels.shape, generator=torch.manual_seed(0))
    right, _ = accuracy(guesses, labels)
    n = int((labels != -100).sum())
    assert abs(right - task.chance) < 4 * (task.chance * (1 - task.chance) / n) ** 0.5


def test_whole_rows_are_counted():
    labels = torch.tensor([[-100, 3, 4], [-100, 5, 6]])
    assert accuracy(torch.tensor([[0, 3, 4], [0, 5, 7]]), labels) == (0.75, 0.5)


def test_positions_go_on_without_what_came_before():
    examples = TokenExamples(MQAR["mqar"], 3)
    first = list(itertools.islice(examples, 12))
    state = {**examples.state_dict(), "samples": 10}
    again = TokenExamples(MQAR["mqar"], 3)
    again.load_state_dict(state)
    assert list(itertools.islice(again, 2)) == first[10:]
    with pytest.raises(DataError):
        TokenExamples(MQAR["mqar"], 4).load_state_dict(state)
    with pytest.raises(DataError):
        TokenExamples(MQAR["uniform"], 3).load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mqar(length=30, pairs=8), "at least 32"),
        (lambda: Mqar(length=63), "even length"),
        (lambda: Mqar(power=0.0), "power"),
        (lambda: Mqar(updates=5), "updates"),
        (lambda: Mqar(vocabulary=16, pairs=8), "vocabulary of 16"),
        (lambda: Mqar(earliest=6), "earliest"),
        (lambda: CompositionalMqar(length=20), "at least 21|needs 21"),
        (lambda: CompositionalMqar(grid=1), "grid"),
        (lambda: SegmentMqar(segments=1), "at least 2"),
        (lambda: SegmentMqar(pairs=17), "can be asked"),
        (lambda: SegmentMqar(segments=2, pairs=17, asked=1), "room for 16 pairs"),
        (lambda: SegmentMqar(pairs=4, asked=5), "5 of 4 pairs"),
        (lambda: SegmentMqar(pairs=4, asked=0), "0 of 4 pairs"),
        (lambda: PairSegments(pairs=17, key_size=1), "larger key_size"),
        (lambda: PairSegments(symbols=101), "symbols"),
        (lambda: Induction(length=3), "length"),
        (lambda: Copying(string=0), "string"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
