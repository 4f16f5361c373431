"""Needles: passkey, needle in a haystack, lines."""

import itertools
import random
import re
from collections import Counter

import pytest

from mnemic.benchmarks.background import prose
from mnemic.benchmarks.fitting import full_prompt
from mnemic.benchmarks.needles import (
    GARBAGE,
    LINES,
    NIAH_DEPTHS,
    NIAH_LENGTHS,
    TASKS,
    first_integer,
    heat_map,
    sigmoid_depths,
)
from mnemic.benchmarks.ruler.needles import NOISE
from mnemic.benchmarks.task import Record
from mnemic.core import ConfigError, InputError
from mnemic.training import word_tokenizer


def take(name, count, **sizes):
    return list(itertools.islice(TASKS[name].records(**sizes), count))


def both(name, said, record):
    return TASKS[name].official(said, record), TASKS[name].fixed(said, record)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_passkey(garbage):
    for record in take("passkey", 20, garbage=garbage):
        keys = re.findall(r"pass key is (\d+)|(\d+) is the pass key", record.context)
        said = keys[0][0]
        assert [a or b for a, b in keys] == [said, said]
        assert both("passkey", f" {said}. And 7", record) == (1.0, 1.0)
        assert both("passkey", "no idea", record) == (0.0, 0.0)
        assert 1 <= int(said) <= 50_000
        opening, prefix, _, suffix = record.context.split("\n")
        assert len(prefix) + len(suffix) == garbage
        assert opening.startswith("There is")
        endless = f"{NOISE} " * 500
        assert endless.startswith(prefix)
        assert endless.startswith(suffix)


def test_passkey_depths_and_keys_are_uniform():
    """Chi-square over 10 bins, p > 0.001."""
    found = take("passkey", 2000, garbage=1000)
    for bins in (
        Counter(min(9, int(r.metadata["depth"] / 10)) for r in found),
        Counter((int(r.targets[0]) - 1) // 5000 for r in found),
    ):
        assert sum((bins[k] - 200) ** 2 / 200 for k in range(10)) < 27.9


def test_passkey_of_a_length_in_tokens(tokenizer):
    found = take("passkey_tokens", 22, tokenizer=tokenizer, length=1000, depths=11)
    assert [r.metadata["depth"] for r in found] == [10.0 * i for i in range(11)] * 2
    for record in found:
        tokens = len(tokenizer.encode(full_prompt(record)))
        assert 1000 - 60 <= tokens + 10 <= 1000
        assert len(record.targets[0]) == 5
        lines = record.context.split("\n")
        at = next(i for i, line in enumerate(lines) if line.startswith("The pass key"))
        assert abs(100 * (at - 1) / (len(lines) - 2) - record.metadata["depth"]) < 4
    with pytest.raises(InputError, match="does not fit 30 tokens"):
        take("passkey_tokens", 1, tokenizer=tokenizer, length=30)


def test_a_guess_is_one_of_50_000():
    rng = random.Random(0)
    found = take("passkey", 1000, garbage=0)
    assert sum(both("passkey", str(rng.randrange(1, 50_001)), r)[0] for r in found) <= 1


@pytest.mark.parametrize("words", [True, False])
def test_needle_stands_at_the_end_of_a_sentence(words, tokenizer, bpe):
    chosen = tokenizer if words else bpe
    found = take("niah", 70, tokenizer=chosen, length=1000, background="prose")
    assert [r.metadata["depth"] for r in found[:35]] == list(NIAH_DEPTHS)
    sentence = "The best thing to do in Lisbon is to ride the old yellow tram."
    moved = 0
    for record in found:
        before, after = record.context.split(sentence)
        depth, room = record.metadata["depth"], record.metadata["haystack"]
        place = record.metadata["place"]
        assert before.rstrip().endswith(".") or not before.strip() or depth == 100
        assert place <= int(room * depth / 100)
        moved += place < int(room * depth / 100)
        if depth == 100:
            assert after.strip() == ""
        assert len(chosen.encode(before)) == pytest.approx(place, abs=3)
        tokens = len(chosen.encode(full_prompt(record)))
        assert tokens == record.metadata["tokens"]
        assert 800 <= tokens <= 1000 - 50
        assert both("niah", "You should Ride the old yellow tram!", record) == (1.0, 1.0)
        assert both("niah", "ride the old yellow tramway", record) == (1.0, 0.0)
    assert moved > 40


def test_needle_context_has_exactly_the_tokens(tokenizer):
    """The needle's tokens and the haystack are the length less the buffer of 200."""
    for record in take("niah", 10, tokenizer=tokenizer, length=600, depth=50, background=prose("test")[:1]):
        assert len(tokenizer.encode(record.context)) == 400


def test_heat_map_and_grid(tokenizer):
    assert NIAH_LENGTHS[0] == 1000
    assert NIAH_LENGTHS[-1] == 16_000
    assert len(NIAH_LENGTHS) == len(NIAH_DEPTHS) == 35
    assert len(LINES) == 13
    scored = [
        (record, float(depth == 0))
        for length in (400, 500)
        for depth in (0, 100)
        for record in take("niah", 3, tokenizer=tokenizer, length=length, depth=depth, background="prose")
    ]
    assert heat_map(scored) == {(400, 0): (1, 3), (400, 100): (0, 3), (500, 0): (1, 3), (500, 100): (0, 3)}
    with pytest.raises(InputError, match="no length or no depth"):
        heat_map([(Record("", "", ()), 1.0)])


def test_sigmoid_depths():
    depths = sigmoid_depths((0, 25, 50, 75, 100))
    assert depths == (0.0, 7.586, 50.0, 92.414, 100.0)


@pytest.mark.parametrize("count", [1, 200, 680])
def test_lines(count):
    for record in take("lines", 10, lines=count):
        told = re.findall(r"line (\S+): the register holds <(\d+)>", record.context)
        assert len({name for name, _ in told}) == len(told) == count
        asked = re.search(r"in line (\S+)\?", record.question)[1]
        said = dict(told)[asked]
        assert both("lines", f"<{said}>", record) == (1.0, 1.0)
        # What follows a right answer spoils the official score.
        assert both("lines", f"{said}, in line 7", record) == (float(said == "7"), 1.0)
        assert both("lines", "none", record) == (0.0, 0.0)


def test_integers():
    assert first_integer("so 0042 or 7") == 42
    assert first_integer("none") is None


def test_bad_input(tokenizer):
    with pytest.raises(ConfigError, match="garbage"):
        TASKS["passkey"].records(garbage=-1)
    with pytest.raises(ConfigError, match="depths"):
        TASKS["passkey_tokens"].records(tokenizer=tokenizer, length=500, depths=1)
    with pytest.raises(ConfigError, match="0 to 100"):
        TASKS["niah"].records(tokenizer=tokenizer, length=1000, depth=101)
    with pytest.raises(ConfigError, match="not in the needle"):
        TASKS["niah"].records(tokenizer=tokenizer, length=1000, needle=("A b.", "What?", "c"))
    with pytest.raises(InputError, match="leave no room"):
        TASKS["niah"].records(tokenizer=tokenizer, length=210)
    with pytest.raises(InputError, match="outside the tokenizer's vocabulary"):
        TASKS["niah"].records(tokenizer=word_tokenizer(["a b c"]), length=1000)
    long = ("It is red.", "What is it? " * 100, "red")
    with pytest.raises(InputError, match="too long for the buffer"):
        take("niah", 1, tokenizer=tokenizer, length=1000, needle=long, background="prose")
    with pytest.raises(ConfigError, match="lines"):
        TASKS["lines"].records(lines=0)
