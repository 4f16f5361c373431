"""The Chomsky suite: targets against independent interpreters, the paper's examples, scoring."""

import ast
import itertools
import math
import random

import pytest
import torch
from torch.nn import functional as F

from mnemic.benchmarks.chomsky import (
    TASKS,
    TEST_LENGTHS,
    FormalExamples,
    batch_accuracy,
    formal_task,
    length_generalisation,
    model_solver,
    token_example,
)
from mnemic.core import ConfigError, InputError, UnknownNameError
from tests.tiny import tiny_host

EXPRESSION = "01234+-*()"
EQUATION = "01234+-()x="


def value(text):
    """Python's own arithmetic, modulo 5."""
    return eval(compile(ast.parse(text, mode="eval"), "", "eval"), {"__builtins__": {}}) % 5


def number(digits):
    """Lowest digit first."""
    return int("".join(map(str, digits[::-1])), 2)


def little(n):
    return [int(d) for d in bin(n)[2:]][::-1]


def two(x):
    at = x.index(2)
    return number(x[:at]), number(x[at + 1 :])


def padded(y, size):
    return y + [2] + [0] * (size - len(y) - 1)


def stack(x):
    held = []
    for i, symbol in enumerate(x):
        if symbol < 2:
            assert i == len(held) or 2 not in x[:i], "bits come before actions"
            held.append(symbol)
        elif symbol == 2:
            held = held[:-1]
        else:
            held = [*held, symbol - 3]
    return padded(held[::-1], len(x) + 1)


def solved(x):
    text = "".join(EQUATION[s] for s in x)
    left, right = text.split("=")
    return [d for d in range(5) if value(left.replace("x", str(d))) == int(right)]


def missing(x):
    half = len(x) // 2
    at = x.index(2)
    return [x[(at + half) % (2 * half)]]


REFERENCE = {
    "even_pairs": lambda x: [int(x[0] != x[-1])],
    "modular_arithmetic": lambda x: [value("".join("01234+-*"[s] for s in x))],
    "parity_check": lambda x: [x.count(1) % 2],
    "cycle_navigation": lambda x: [(x.count(2) - x.count(0)) % 5],
    "stack_manipulation": stack,
    "reverse_string": lambda x: list(reversed(x)),
    "modular_arithmetic_brackets": lambda x: [value("".join(EXPRESSION[s] for s in x))],
    "solve_equation": solved,
    "duplicate_string": lambda x: [*x, *x],
    "missing_duplicate_string": missing,
    "odds_first": lambda x: [s for i, s in enumerate(x, 1) if i % 2 == 0] + [s for i, s in enumerate(x, 1) if i % 2],
    "binary_addition": lambda x: padded(little(sum(two(x))), len(x) + 1),
    "binary_multiplication": lambda x: padded(little(math.prod(two(x))), len(x)),
    "compute_sqrt": lambda x: [int(d) for d in f"{math.isqrt(number(x[::-1])):0{math.ceil(len(x) / 2)}b}"],
    "bucket_sort": lambda x: [s for kind in range(5) for s in x if s == kind],
}
SMALLEST = {"solve_equation": 3, "missing_duplicate_string": 2, "binary_addition": 3, "binary_multiplication": 3}
CHANCE_20 = {"modular_arithmetic", "cycle_navigation", "modular_arithmetic_brackets", "solve_equation", "bucket_sort"}


def test_there_are_fifteen_with_the_chance_of_the_paper():
    assert list(TASKS) == list(REFERENCE)
    assert {name for name, task in TASKS.items() if task.chance == 0.2} == CHANCE_20
    assert all(task.chance == 0.5 for name, task in TASKS.items() if name not in CHANCE_20)
    assert TEST_LENGTHS[0] == 41
    assert TEST_LENGTHS[-1] == 500


def check(name, length, rng):
    task = TASKS[name]
    x, y = task.sample(rng, length)
    odd = name == "modular_arithmetic" and length % 2 == 0
    assert len(x) == length - odd
    assert {*x} <= {*range(task.inputs)}
    assert {*y} <= {*range(task.outputs)}
    if length >= SMALLEST.get(name, 1):
        assert y == REFERENCE[name](x)
    return y


@pytest.mark.parametrize("name", TASKS)
def test_targets_equal_an_independent_interpreter(name):
    """Ten samples of every length 1 to 40, and one each of some to 500."""
    rng = random.Random(0)
    for length in range(1, 41):
        assert len({len(check(name, length, rng)) for _ in range(10)}) == 1
    for length in (200, 499, 500):
        check(name, length, rng)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_targets_equal_an_independent_interpreter_200_times(name):
    rng = random.Random(1)
    for length, _ in itertools.product(range(1, 41), range(200)):
        check(name, length, rng)


def test_small_lengths_are_those_of_the_released_code():
    rng = random.Random(0)
    assert formal_task("solve_equation").sample(rng, 2) == ([0, 0], [0])
    assert formal_task("missing_duplicate_string").sample(rng, 1) == ([1], [1])
    assert formal_task("binary_multiplication").sample(rng, 2)[1] == [0, 2]
    assert formal_task("binary_addition").sample(rng, 1) == ([0], [0, 2])
    sums = {tuple(map(tuple, formal_task("binary_addition").sample(rng, 2))) for _ in range(100)}
    assert sums == {((0, 0), (0, 2, 0)), ((1, 0), (1, 2, 0)), ((0, 1), (0, 1, 2))}


def found(name, x):
    """The target of an input that is drawn sooner or later."""
    rng, task = random.Random(0), TASKS[name]
    for _ in range(200_000):
        drawn, y = task.sample(rng, len(x))
        if drawn == x:
            return y
    raise AssertionError(f"{x} was never drawn")


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [
        ("stack_manipulation", "0110422", "11020000"),
        ("stack_manipulation", "110222", "2000000"),
        ("missing_duplicate_string", "01100210", "1"),
        ("missing_duplicate_string", "1011213", "0"),
        ("modular_arithmetic", "071547362", "0"),
        ("modular_arithmetic", "15273", "2"),
        ("modular_arithmetic", "16161", "4"),
        ("compute_sqrt", "100101", "110"),
        ("compute_sqrt", "111", "10"),
        ("binary_addition", "001201101", "0101120000"),
        ("binary_multiplication", "001201101", "000110120"),
    ],
)
def test_documented_examples(name, x, y):
    """Examples of the paper's released code; its comment on 37 says 101, which is 5: the root is 6, 110."""
    x, y = ([int(c) for c in text] for text in (x, y))
    assert REFERENCE[name](x) == y
    if len(x) < 8:
        assert found(name, x) == y


def test_statistics_of_sizes():
    """Stack sizes and first numbers are uniform; x replaces digits only, and each digit of the answer is likely."""
    rng, count = random.Random(0), 3000
    starts = [next(i for i, s in enumerate([*x, 2]) if s >= 2) for x in
              (TASKS["stack_manipulation"].sample(rng, 6)[0] for _ in range(count))]  # fmt: skip
    firsts = [TASKS["binary_addition"].sample(rng, 7)[0].index(2) for _ in range(count)]
    answers = [TASKS["solve_equation"].sample(rng, 20)[1][0] for _ in range(count)]
    for seen, kinds in ((starts, range(1, 6)), (firsts, range(1, 6)), (answers, range(5))):
        assert {*seen} == {*kinds}
        assert all(abs(seen.count(k) - count / 5) < 4 * (count * 0.16) ** 0.5 for k in kinds)


def test_token_layout():
    task = formal_task("reverse_string")
    example = token_example(task, [0, 1, 1], [1, 1, 0])
    # Symbols 0 and 1, blank 2, empty 3; the first output is said at the first "empty".
    assert example["input_ids"] == [0, 1, 1, 3, 3, 3, 3]
    assert example["labels"] == [-100, -100, -100, -100, 1, 1, 0]
    assert token_example(task, [0, 1], [1, 0], steps=2)["input_ids"] == [0, 1, 2, 2, 2, 2, 3, 3, 3]


def test_examples_have_one_length_a_batch_and_go_on():
    examples = FormalExamples(formal_task("bucket_sort"), 16, 0)
    drawn = list(itertools.islice(examples, 16 * 60))
    lengths = [(len(e["input_ids"]) - 1) // 2 for e in drawn]
    assert all(len({*lengths[at : at + 16]}) == 1 for at in range(0, len(drawn), 16))
    assert 1 <= min(lengths) < 5
    assert 35 < max(lengths) <= 40
    again = FormalExamples(formal_task("bucket_sort"), 16, 0)
    again.load_state_dict({**examples.state_dict(), "samples": 100})
    assert next(iter(again)) == drawn[100]
    assert all(max(e["input_ids"]) < formal_task("bucket_sort").vocabulary for e in drawn)


def oracle(name):
    return lambda inputs, count: [REFERENCE[name](list(x)) for x in inputs]


@pytest.mark.parametrize("name", TASKS)
def test_oracle_and_guesser(name):
    """The interpreter scores 1. A uniform guess among the outputs scores one over their number, within 4 sigma."""
    task = TASKS[name]
    result = length_generalisation(task, oracle(name), (41, 60), samples=64, batch=32)
    assert result.score == 1.0
    assert result.solved
    rng = random.Random(0)
    counted = []

    def guess(inputs, count):
        counted.append(count * len(inputs))
        return [[rng.randrange(task.outputs) for _ in range(count)] for _ in inputs]

    score = length_generalisation(task, guess, (41, 42), samples=512).score
    p = 1 / task.outputs
    # Terminated tasks count fewer symbols; a quarter of them is a safe bound on how many.
    n = sum(counted) / (4 if task.terminated else 1)
    assert abs(score - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_accuracy_equals_a_transcription_with_arrays():
    """Official: a mask up to the first greatest target (the terminator 2), the mean over what it leaves."""
    rng = random.Random(0)
    task = formal_task("stack_manipulation")
    targets = [task.sample(rng, 20)[1] for _ in range(64)]
    said = [[rng.randrange(3) for _ in y] for y in targets]
    target, guess = torch.tensor(targets), torch.tensor(said)
    mask = torch.arange(21) <= F.one_hot(target, 3).argmax(-1).argmax(-1, keepdim=True)
    expected = ((guess == target) * mask).sum() / mask.sum()
    assert batch_accuracy(task, targets, said) == pytest.approx(float(expected))


def test_score_is_the_mean_over_lengths_and_batches():
    """One batch of two is right, the other half right, at one of two lengths."""
    task = formal_task("parity_check")
    calls = []

    def solver(inputs, count):
        calls.append(len(inputs[0]))
        right = [REFERENCE["parity_check"](x) for x in inputs]
        return [[1 - right[0][0]], right[1]] if len(calls) == 2 else right

    result = length_generalisation(task, solver, (3, 4), samples=4, batch=2)
    assert calls == [3, 3, 4, 4]
    assert result.by_length == {3: 0.75, 4: 1.0}
    assert result.score == 0.875
    assert not result.solved


def test_a_model_is_read_at_the_empty_tokens():
    task = formal_task("reverse_string")
    model = tiny_host()
    inputs = [[0, 1, 1, 0], [1, 1, 0, 1]]
    said = model_solver(model, task)(inputs, 4)
    for x, answer in zip(inputs, said, strict=True):
        logits = model(torch.tensor([[*x, 3, 3, 3, 3]])).logits[0, 4:, :2]
        assert answer == logits.argmax(-1).tolist()


def test_bad_input():
    task = formal_task("parity_check")
    with pytest.raises(UnknownNameError, match="parity_check"):
        formal_task("parity")
    with pytest.raises(InputError, match="at least 1"):
        task.sample(random.Random(0), 0)
    with pytest.raises(InputError, match="multiple of batch"):
        length_generalisation(task, oracle("parity_check"), (41,), samples=100, batch=64)
    with pytest.raises(InputError, match="0 lengths"):
        length_generalisation(task, oracle("parity_check"), ())
    with pytest.raises(InputError, match="outputs were said"):
        batch_accuracy(task, [[1]], [[1, 0]])
    with pytest.raises(ConfigError, match="lengths"):
        FormalExamples(task, 8, lengths=(5, 4))
