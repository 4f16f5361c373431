"""LongBench and InfiniteBench: files, prompts and rules; recorded values are what the released scorers gave."""

import json
from collections import Counter
from pathlib import Path

import pytest

import mnemic
from mnemic.benchmarks import infinitebench, longbench
from mnemic.benchmarks.infinitebench import INFINITEBENCH_TASKS
from mnemic.benchmarks.longbench import LONGBENCH_TASKS

CLASSES = [
    "Date", "Date of birth", "Other number", "Number", "Other", "Person", "Person name", "Group",
    "Group or organization", "Group or organization of person", "organization", "Food",
]  # fmt: skip


def test_rules_equal_the_released_ones_on_recorded_cases():
    cases = json.loads((Path(__file__).parent / "suite_cases.json").read_text(encoding="utf-8"))
    assert set(Counter(name for name, *_ in cases).values()) == {24}
    for name, answer, targets, expected in cases:
        if name == "classification":
            found = longbench.classification(answer, targets[0], CLASSES)
        elif name == "number_share":
            found = longbench.number_share(answer, targets[0])
        else:
            found = getattr(infinitebench, name)(answer, tuple(targets))
        assert found == expected, (name, answer, targets)
    scored = {name for name, *_, expected in cases if expected > 0}
    assert scored == {name for name, *_ in cases}


def test_fixed_rules_differ_where_the_released_ones_err():
    names = ["number", "Other", "Other number"]
    # "Other" follows a class that is taken out, is skipped, and counts as a second answer.
    assert longbench.classification("Other number", "Other number", names) == 0.5
    assert longbench.classification_fixed("Other number", "Other number", names) == 1
    assert infinitebench.choice("A story: answer is C", ("red", "C")) == 0
    assert infinitebench.choice_fixed("A story: answer is C", ("red", "C")) == 0
    assert infinitebench.choice("Answer is C", ("red", "C")) == 0
    assert infinitebench.choice_fixed("Answer is C, so answer is C", ("red", "C")) == 1
    for rule in (infinitebench.choice, infinitebench.choice_fixed):
        assert rule("C. red", ("red", "C")) == 1
        assert rule("", ("red", "C")) == 0
    assert infinitebench.found_number("3.5", ("3",)) == 0
    assert infinitebench.right_prefix("[1, -2, 30]", ("1", "-2", "30")) == pytest.approx(1 / 3)
    assert infinitebench.right_prefix_fixed("[1, -2, 30]", ("1", "-2", "30")) == 1
    assert infinitebench.right_prefix_fixed("1, 2, 30", ("1", "-2", "30")) == pytest.approx(1 / 3)


def longbench_line(**changes):
    line = {
        "_id": "1",
        "input": "Who sat?",
        "context": "The cat sat.",
        "answers": ["The cat", "a dog"],
        "length": 3,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
    }
    return json.dumps({**line, **changes})


def test_longbench_files(tmp_path):
    task = LONGBENCH_TASKS["hotpotqa"]
    (tmp_path / "hotpotqa.jsonl").write_text(longbench_line() + "\n\n", encoding="utf-8")
    [record] = task.records(data=tmp_path, seed=1)
    assert (record.context, record.metadata["asked"], task.max_new_tokens) == ("The cat sat.", "Who sat?", 32)
    assert "Who sat?" in record.question
    assert task.official("cat", record) == task.fixed("the cat!", record) == 1
    assert task.official("dog cat", record) == pytest.approx(2 / 3)
    assert task.official("\nbird", record) == 0
    (tmp_path / "trec.jsonl").write_text(
        longbench_line(dataset="trec_e", all_classes=["Food", "Date"], answers=["Food"]), encoding="utf-8"
    )
    [record] = LONGBENCH_TASKS["trec"].records(data=tmp_path / "trec.jsonl")
    # Only the first line counts.
    assert LONGBENCH_TASKS["trec"].official("\nFood\nDate", record) == 1
    assert LONGBENCH_TASKS["trec"].official("Date\nFood", record) == 0
    with pytest.raises(mnemic.DataError, match="Download"):
        next(LONGBENCH_TASKS["qasper"].records(data=tmp_path))
    with pytest.raises(mnemic.DataError, match="belongs to 'trec_e'"):
        list(LONGBENCH_TASKS["qasper"].records(data=tmp_path / "trec.jsonl"))
    (tmp_path / "qasper.jsonl").write_text('{"input": 1}', encoding="utf-8")
    with pytest.raises(mnemic.DataError, match="line 1"):
        list(LONGBENCH_TASKS["qasper"].records(data=tmp_path))


def test_every_longbench_prompt_shows_the_input():
    for name, one in longbench._SETS.items():
        assert "WHAT" in one.prompt.format("WHAT"), name
        assert "{" not in one.prompt.format("WHAT"), name
    for name, prompt in infinitebench._PROMPTS.items():
        shown = prompt.format("WHAT", "\nA. x")
        assert "WHAT" in shown, name
        assert ("A. x" in shown) == (name in ("code_debug", "longbook_choice_eng"))
    assert set(infinitebench._PROMPTS) == set(INFINITEBENCH_TASKS)


@pytest.mark.parametrize(
    "name, answer, options, targets, right",
    [
        ("passkey", ["71432"], [], ("71432",), "It is 71432."),
        ("kv_retrieval", ["a-b"], [], ("a-b",), '"a-b"'),
        ("math_find", [3.5], [], ("3.5",), "3.5"),
        ("math_calc", [[1, -2, 30]], [], ("1", "-2", "30"), None),
        ("code_run", [-7], [], ("-7",), "returns -7."),
        ("longbook_choice_eng", ["red"], ["blue", "red"], ("red", "B"), "B"),
        ("code_debug", ["f.g"], ["a", "b", "f.g", "d"], ("f.g", "C"), "C: f.g"),
        ("longdialogue_qa_eng", ["MARY"], [], ("MARY",), "Mary!"),
        ("longbook_qa_chn", ["你好。", "您好"], [], ("你好。", "您好"), "你好"),
    ],
)
def test_infinitebench_files(tmp_path, name, answer, options, targets, right):
    line = {"id": 4, "context": "Text.", "input": "What?", "answer": answer, "options": options}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(line), encoding="utf-8")
    task = INFINITEBENCH_TASKS[name]
    [record] = task.records(data=tmp_path, seed=0)
    assert record.targets == targets
    if right is not None:
        assert task.official(right, record) == task.fixed(right, record) == 1
    assert task.official("nothing", record) == 0
    with pytest.raises(mnemic.DataError, match="Download"):
        list(task.records(data=tmp_path / "other.jsonl"))
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({**line, "answer": None, "context": None}) + "\n{", "utf-8")
    with pytest.raises(mnemic.DataError, match="line"):
        list(task.records(data=tmp_path))
