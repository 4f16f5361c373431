"""RULER: an oracle by regular expressions, exact lengths, statistics, scorers against transcriptions."""

import itertools
import json
import random
import re
from collections import Counter

import pytest

from mnemic.benchmarks.background import prose
from mnemic.benchmarks.fitting import full_prompt, largest
from mnemic.benchmarks.ruler import LENGTHS, TASKS, effective_length, match_all, match_all_words, match_part
from mnemic.benchmarks.ruler.frequencies import MOST, build_cwe, counts
from mnemic.benchmarks.ruler.needles import DEPTHS, NOISE, PARAMETERS, Essay
from mnemic.benchmarks.ruler.scoring import match_part_words
from mnemic.benchmarks.task import Record
from mnemic.benchmarks.words import ADJECTIVES, NOUNS, PAIRS, SINGLES, pair
from mnemic.core import DataError, InputError
from mnemic.training import word_tokenizer

SYNTHETIC = [name for name in TASKS if not name.startswith("qa")]


def records(name, tokenizer, length, count, **options):
    if name in PARAMETERS:
        options.setdefault("background", "prose")
    return list(itertools.islice(TASKS[name].records(tokenizer=tokenizer, length=length, **options), count))


def oracle(record):
    """Reads context and question alone."""
    name, text = record.metadata["task"], record.context
    if name.startswith("niah"):
        told = re.findall(r"magic \w+ for (\S+) is: (\S+)\.", text)
        keys = re.split(r", and |, ", re.search(r"for (.*) in the text above\?", record.question)[1])
        return " ".join(value for key in keys for k, value in told if k == key)
    if name == "vt":
        text = text[text.rindex("Follow the chain") :]
        wanted, held = re.search(r"value (\d+)", record.question)[1], {}
        for new, old in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            held[new] = held.get(old, old)
        return " ".join(name for name, value in held.items() if value == wanted)
    if name == "cwe":
        words = re.findall(r"\d+\. (\w+)", text[text.rindex("Some words") :])
        return " ".join(word for word, _ in Counter(words).most_common(10))
    words = text.split("\n", 1)[1].split()
    return " ".join(word for word, _ in Counter(words).most_common(4) if word != "...")


def check(name, tokenizer, length, count):
    task = TASKS[name]
    for record in records(name, tokenizer, length, count):
        assert task.official(oracle(record), record) == task.fixed(oracle(record), record) == 1.0
        tokens = len(tokenizer.encode(full_prompt(record)))
        assert tokens == record.metadata["tokens"]
        total = tokens + task.max_new_tokens
        assert total <= length
        # Nothing larger fits: within one unit of noise, or one step of a list.
        assert total >= length - (170 if name == "cwe" else 60)
        assert record.metadata["length"] == length


@pytest.mark.parametrize("length, count", [(512, 20), (1024, 10), (4096, 4)])
@pytest.mark.parametrize("name", SYNTHETIC)
def test_oracle_and_length(name, length, count, tokenizer):
    check(name, tokenizer, length, count)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SYNTHETIC)
def test_oracle_and_length_on_200_samples(name, tokenizer):
    for length in (512, 1024, 4096):
        check(name, tokenizer, length, 200)


def test_lengths_count_tokens_of_the_given_tokenizer(bpe):
    for name in ("niah_single_1", "niah_single_3", "vt"):
        check(name, bpe, 2048, 2)


def test_parameters_are_those_of_the_paper(tokenizer):
    assert len(TASKS) == 13
    assert LENGTHS[0] == 4096
    budgets = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert all(task.max_new_tokens == budgets[name.split("_")[0]] for name, task in TASKS.items())
    number, identity, word = r"\d{7}", r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"[a-z]+-[a-z]+"
    expected = {  # key, value, needles, answers
        "niah_single_1": (word, number, 1, 1), "niah_single_2": (word, number, 1, 1),
        "niah_single_3": (word, identity, 1, 1), "niah_multikey_1": (word, number, 4, 1),
        "niah_multikey_2": (word, number, None, 1), "niah_multikey_3": (identity, identity, None, 1),
        "niah_multivalue": (word, number, 4, 4), "niah_multiquery": (word, number, 4, 4),
    }  # fmt: skip
    for name, (key, value, needles, answers) in expected.items():
        for record in records(name, tokenizer, 1024, 5):
            told = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", record.context)
            assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for k, v in told)
            assert len(told) == needles if needles else len(told) > 20
            assert len(record.targets) == answers
            asked = [k for k, v in told if v in record.targets]
            # No other needle has an asked key.
            assert sorted(k for k, _ in told if k in asked) == sorted(asked)
            assert ("numbers for" in record.question) == (answers > 1)


def test_a_prompt_repeats_only_with_equal_arguments(tokenizer):
    first = records("niah_multikey_2", tokenizer, 512, 3)
    assert records("niah_multikey_2", tokenizer, 512, 3) == first
    assert records("niah_multikey_2", tokenizer, 512, 3, seed=1) != first
    assert len({r.context for r in first}) == 3


def test_needles_lie_at_uniform_depths(tokenizer):
    """Chi-square over 5 bins of noise lines and over the 40 depths of an essay; p > 0.001."""
    found = records("niah_single_1", tokenizer, 1000, 400)
    seen = Counter(int(r.metadata["depth"] // 20) for r in found)
    size = found[0].context.count(NOISE)
    places = Counter(int(100 * place / size // 20) for place in range(size))
    assert sum((seen[k] - 400 * n / size) ** 2 / (400 * n / size) for k, n in places.items()) < 18.5
    essay = Counter(r.metadata["depth"] for r in records("niah_single_2", tokenizer, 300, 400))
    assert {*essay} <= {*map(float, DEPTHS)}
    assert sum((essay[float(d)] - 10) ** 2 / 10 for d in DEPTHS) < 72.1


def test_essay_words_are_exact_and_repeat():
    essay = Essay(prose("test")[:2])
    whole = " ".join(essay.take(essay.ends[-1])).split()
    for count in (1, 7, 100, len(whole), len(whole) + 5, 2 * len(whole)):
        taken = essay.take(count)
        assert " ".join(taken).split() == (whole * 3)[:count]


def test_chain_is_in_order_and_the_example_is_another(tokenizer):
    for record in records("vt", tokenizer, 1024, 10):
        example, own = record.context.split("Follow the chain")[1:]
        names = re.findall(r"VAR (\w+) =", own)
        assert names == list(record.targets)
        assert all(len(name) == 5 for name in names)
        shown = re.findall(r"VAR (\w+) =", example)
        assert len(shown) == 5
        assert all(len(name) == 3 for name in shown)
        assert example.rstrip().endswith(" ".join(shown))


@pytest.mark.parametrize(("length", "often", "seldom", "shown"), [(1024, 6, 1, (3, 1, 20)), (4096, 30, 3, (10, 3, 40))])
def test_counts_of_common_words(tokenizer, length, often, seldom, shown):
    for record in records("cwe", tokenizer, length, 3):
        example, own = (re.findall(r"\d+\. (\w+)", part) for part in record.context.split("Some words")[1:])
        seen = Counter(own)
        assert {seen[word] for word in record.targets} == {often}
        assert {n for word, n in seen.items() if word not in record.targets} == {seldom}
        # The example's list, then its ten answers.
        first = Counter(example[:-10])
        assert {first[word] for word in example[-10:]} == {shown[0]}
        assert {n for word, n in first.items() if word not in example[-10:]} == {shown[1]}
        assert len(first) == shown[2]
        assert not {*first} & {*seen}


def test_counts_of_frequent_words(tokenizer):
    assert counts(1000, 4) == [int(1000 / k**2 * 6 / 3.141592653589793**2) for k in (1, 2, 3, 4)]
    record = records("fwe", tokenizer, 2048, 1)[0]
    words = Counter(record.context.split("\n", 1)[1].split())
    ranked = words.most_common(5)
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == record.targets
    assert ranked[3][1] > ranked[4][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word in words if word != "...")


def test_word_lists():
    """No word lies within another one, or the official scorer would find what was not said."""
    joined = [pair(i, "") for i in range(PAIRS)]
    text = "|".join(joined)
    assert len({*joined}) == PAIRS
    assert all(text.count(word) == 1 for word in joined[:: PAIRS // 300])
    assert all("|".join(SINGLES).count(word) == 1 for word in SINGLES)
    # Within its own pairs only.
    assert all(text.count(word) == len(NOUNS) for word in ADJECTIVES)
    assert all(text.count(word) == len(ADJECTIVES) for word in NOUNS)


def test_long_word_lists(tokenizer):
    for seed in range(5):
        record = build_cwe(f"{seed}", False, MOST)
        seen = Counter(re.findall(r"\d+\. (\w+)", record.context[record.context.rindex("Some words") :]))
        assert len(seen) == MOST
        assert match_all(" ".join(seen.keys() - {*record.targets}), record) == 0.0


# --------------------------------------------------------------------------------------------------------- documents


@pytest.fixture
def squad(tmp_path):
    data = [
        {"title": str(a), "paragraphs": [
            {"context": f"Paragraph {a}.{p} tells that the secret of {a}.{p} is word{a}{p}. " + "Filler text. " * 5,
             "qas": [{"question": f"What is the secret of {a}.{p}?", "is_impossible": False,
                      "answers": [{"text": f"word{a}{p}"}, {"text": f"is word{a}{p}"}]},
                     {"question": "What is not told?", "is_impossible": True, "answers": []}]}
            for p in range(4)]}
        for a in range(10)
    ]  # fmt: skip
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps({"data": data}))
    return path


@pytest.fixture
def hotpot(tmp_path):
    data = [
        {"question": f"Which word has {i}?", "answer": f"word{i}",
         "context": [[f"Title {i}.{j}", [f"Fact {j} of {i}: word{i}.", " More."]] for j in range(3)]}
        for i in range(12)
    ]  # fmt: skip
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(data))
    return path


def test_squad_documents(squad, tokenizer):
    task = TASKS["qa_1"]
    found = list(task.records(tokenizer=tokenizer, length=400, file=squad))
    # Every question with an answer, in file order.
    assert [r.targets[0] for r in found] == [f"word{a}{p}" for a in range(10) for p in range(4)]
    firsts = Counter()
    for number, record in enumerate(found):
        assert task.official(f"It is {record.targets[0]}.", record) == task.fixed(record.targets[0], record) == 1.0
        assert task.official("nothing", record) == 0.0
        documents = re.findall(r"Document \d+:\nParagraph (\d)\.(\d)", record.context)
        assert len({*documents}) == len(documents) == record.metadata["documents"] > 4
        # Others of the same article come before further ones.
        assert sum(int(a) == number // 4 for a, _ in documents) == 4
        firsts[documents.index((str(number // 4), str(number % 4)))] += 1
        assert len(tokenizer.encode(full_prompt(record))) + 32 <= 400
    assert len(firsts) > 4


def test_hotpot_documents(hotpot, tokenizer):
    for number, record in enumerate(TASKS["qa_2"].records(tokenizer=tokenizer, length=300, file=hotpot)):
        assert record.targets == (f"word{number}",)
        assert all(f"Title {number}.{j}\nFact {j} of {number}: word{number}. More." in record.context for j in range(3))


def test_all_documents_are_enough(hotpot, tokenizer):
    record = next(TASKS["qa_2"].records(tokenizer=tokenizer, length=100_000, file=hotpot))
    assert record.metadata["documents"] == 36


def test_missing_or_foreign_files(tmp_path, squad, tokenizer):
    with pytest.raises(DataError, match=r"dev-v2\.0\.json of SQuAD"):
        TASKS["qa_1"].records(tokenizer=tokenizer, length=400, file=tmp_path / "none.json")
    with pytest.raises(DataError, match="HotpotQA"):
        TASKS["qa_2"].records(tokenizer=tokenizer, length=400, file=squad)
    (tmp_path / "broken.json").write_text('{"data": [')
    with pytest.raises(DataError, match="SQuAD"):
        TASKS["qa_1"].records(tokenizer=tokenizer, length=400, file=tmp_path / "broken.json")


# ----------------------------------------------------------------------------------------------------------- scoring


def official_all(prediction, references):
    """Transcribed from the description of the released scorer."""
    characters = [c if ord(c) > 31 else "\n" for c in prediction.strip()]
    text = "".join(characters).strip().lower()
    hits = 0
    for reference in references:
        hits += text.find(reference.lower()) >= 0
    return hits / len(references)


def odd_strings(count):
    rng = random.Random(0)
    pieces = ["123", "41234", "word-one", "Word-One", "one", " ", "\n", "\x00", "\t", ".", ",", "", "-", "é", "É", "?"]
    for _ in range(count):
        said = "".join(rng.choice(pieces) for _ in range(rng.randrange(8)))
        yield said, [rng.choice(["123", "word-one", "one", "É", "34", "41234"]) for _ in range(rng.randrange(1, 5))]


def test_official_scorers_equal_a_transcription():
    whole = 0
    for said, references in odd_strings(1000):
        record = Record("", "", tuple(references))
        assert match_all(said, record) == official_all(said, references)
        assert match_part(said, record) == max(official_all(said, [r]) for r in references)
        assert match_all_words(said, record) <= match_all(said, record)
        assert match_part_words(said, record) <= match_part(said, record)
        whole += match_all_words(said, record) < match_all(said, record)
    assert whole > 50


def test_official_scorer_equals_the_harness():
    common = pytest.importorskip("lm_eval.tasks.ruler.common_utils", reason="lm-eval is not installed")
    for said, references in odd_strings(50):
        expected = common.string_match_all(common.postprocess_pred([said]), [references])
        assert match_all(said, Record("", "", tuple(references))) == expected


def test_where_the_fixed_rule_differs():
    record = Record("", "", ("123",))
    assert match_all("41234", record) == 1.0
    assert match_all_words("41234", record) == 0.0
    assert match_all_words("It is 123.", record) == 1.0
    assert match_all_words("word-one", Record("", "", ("one",))) == 0.0


def test_guessers_score_chance(tokenizer):
    """One of the four numbers in the text is right in a quarter of the samples; ten words of a list of n, 10 / n."""
    rng, count = random.Random(0), 200
    right = 0.0
    for record in records("niah_multikey_1", tokenizer, 400, count):
        right += match_all(rng.choice(re.findall(r"is: (\d+)", record.context)), record)
    assert abs(right - count / 4) < 4 * (count * 3 / 16) ** 0.5
    hits = asked = expected = 0.0
    for record in records("cwe", tokenizer, 600, 40):
        words = sorted({*re.findall(r"\d+\. (\w+)", record.context[record.context.rindex("Some words") :])})
        hits += 10 * match_all(" ".join(rng.sample(words, 10)), record)
        expected += 100 / len(words)
        asked += 10
    assert abs(hits - expected) < 4 * expected**0.5


def test_effective_length():
    assert effective_length({4096: 95.5, 8192: 90.0, 16384: 85.6, 32768: 80.1}) == 16384
    assert effective_length({4096: 50.0}) == 0
    with pytest.raises(InputError, match="percent"):
        effective_length({})


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", SYNTHETIC)
def test_what_does_not_fit_is_refused(name, tokenizer):
    with pytest.raises(InputError, match="at least"):
        records(name, tokenizer, 140, 1)


def test_answers_outside_the_vocabulary_are_refused():
    words = word_tokenizer(["One of the special magic numbers for is"])
    with pytest.raises(InputError, match="outside the tokenizer's vocabulary"):
        records("niah_single_1", words, 1000, 1)


@pytest.mark.parametrize("start", [0, 3, 17, 40, 1000])
@pytest.mark.parametrize("bound", [3, 4, 17, 100])
def test_largest(start, bound):
    assert largest(lambda size: size <= bound, 3, start) == bound
    assert largest(lambda size: size <= bound, 3, start, most=10) == min(bound, 10)
    assert largest(lambda size: size <= bound, bound + 1, start) is None
