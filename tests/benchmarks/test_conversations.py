"""LoCoMo and LongMemEval: their files, rules and measures, on small made-up files and, where it lies, on LoCoMo's."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import mnemic
from mnemic.benchmarks.conversations import (
    ABSENT,
    LOCOMO_TASK,
    evidence_recall,
    locomo,
    locomo_records,
    locomo_score,
    locomo_summary,
    normalised,
)
from mnemic.benchmarks.longmemeval import longmemeval_records, retrieval_scores, write_hypotheses
from mnemic.benchmarks.retrieval_baselines import Bm25
from mnemic.benchmarks.task import Record

CARD = {
    "all": (0.447, 0.537, 0.696),
    1: (0.133, 0.212, 0.403),
    2: (0.514, 0.597, 0.756),
    3: (0.170, 0.246, 0.371),
    4: (0.520, 0.614, 0.771),
    5: (0.512, 0.610, 0.762),
}


def asked(category, target):
    return Record("", "?", (target,), {"category": category})


def sample():
    turns = [
        {"speaker": "Ann", "dia_id": "D1:1", "text": "I bought a red kite."},
        {"speaker": "Bob", "dia_id": "D1:2", "text": "Nice!", "blip_caption": "a photo of a dog", "img_url": ["x"]},
    ]
    later = [{"speaker": "Ann", "dia_id": "D3:1", "text": "The kite flew away."}]
    return {
        "sample_id": "conv-1",
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Bob",
            "session_1": turns,
            "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_2_date_time": "2:00 pm on 9 May, 2023",
            "session_3": later,
            "session_3_date_time": "3:00 pm on 10 May, 2023",
        },
        "qa": [
            {"question": "What colour?", "answer": "red", "evidence": ["D1:1"], "category": 4},
            {"question": "How many?", "answer": 1, "evidence": ["D1:1; D3:1", "D"], "category": 1},
            {"question": "What car?", "adversarial_answer": "blue", "evidence": ["D3:1"], "category": 5},
        ],
    }


@pytest.fixture
def small(tmp_path):
    (tmp_path / "locomo10.json.gz").write_bytes(gzip.compress(json.dumps([sample()]).encode()))
    return tmp_path


@pytest.fixture(scope="module")
def released():
    path = Path(os.environ.get("MNEMIC_DATA", "")) / "locomo10" / "locomo10.json.gz"
    if not path.is_file():
        pytest.skip("MNEMIC_DATA has no locomo10/")
    pytest.importorskip("nltk", reason="nltk is not installed: pip install 'mnemic[eval]'")
    return path


def test_a_small_file_is_read_as_written(small):
    [conversation] = locomo(small)
    assert conversation.context == (
        'DATE: 1:56 pm on 8 May, 2023\nAnn said, "I bought a red kite."\nBob said, "Nice!" and shared a photo of a '
        'dog.\n\nDATE: 3:00 pm on 10 May, 2023\nAnn said, "The kite flew away."'
    )
    records = list(LOCOMO_TASK.records(data=small, seed=3))
    assert [r.targets for r in records] == [("red",), ("1",), (ABSENT,)]
    assert [r.metadata["found"] for r in records] == [["D1:1"], [], ["D3:1"]]
    assert all(r.metadata["asked"] in r.question and r.context == conversation.context for r in records)
    assert [r.metadata["category"] for r in locomo_records(small, categories=(1, 5))] == [1, 5]


def test_the_rule_on_worked_examples():
    pytest.importorskip("nltk", reason="nltk is not installed: pip install 'mnemic[eval]'")
    assert normalised("The cat, and A dog's 1,000 an-ts") == ["cat", "dogs", "1000", "ants"]
    assert locomo_score("painted", asked(4, "She was painting")) == pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3))
    assert locomo_score("7 May", asked(2, "7 May 2023")) == pytest.approx(0.8)
    # What stands behind ";" is a reason, and counts in category 3 alone.
    assert locomo_score("yes", asked(3, "Yes; she likes dogs")) == 1
    assert locomo_score("yes", asked(2, "Yes; she likes dogs")) == pytest.approx(0.4)
    # Parts at commas; each part of the target takes the best part of the answer.
    assert locomo_score("cats, big dogs", asked(1, "dogs, horses")) == pytest.approx((2 / 3 + 0) / 2)
    assert locomo_score("dogs horses", asked(4, "dogs, horses")) == 1
    assert locomo_score("It was NOT MENTIONED.", asked(5, ABSENT)) == 1
    assert locomo_score("blue", asked(5, ABSENT)) == 0
    assert locomo_score("", asked(4, "dogs")) == 0
    # "the" alone leaves no word.
    assert locomo_score("the", asked(4, "the")) == 0


def test_the_rule_equals_the_released_one_on_recorded_cases():
    """Made-up targets and answers; the values are what the released scorer gave (nltk 3.10.4)."""
    pytest.importorskip("nltk", reason="nltk is not installed: pip install 'mnemic[eval]'")
    cases = json.loads((Path(__file__).parent / "locomo_cases.json").read_text(encoding="utf-8"))
    assert Counter(category for category, *_ in cases) == dict.fromkeys((1, 2, 3, 4, 5), 40)
    for category, target, answer, expected in cases:
        assert locomo_score(answer, asked(category, target)) == expected


def test_summary_flags_who_always_refuses():
    pytest.importorskip("nltk", reason="nltk is not installed: pip install 'mnemic[eval]'")
    records = [asked(4, "red"), asked(4, "kite"), asked(2, "May"), asked(5, ABSENT)]
    refused = locomo_summary(records, [ABSENT] * 4)
    assert (refused["adversarial"], refused["answerable"], refused["refuses"]) == (1, 0, True)
    found = locomo_summary(records, ["red", "dog", "May", "blue"])
    assert found["answerable"] == pytest.approx((0.5 + 1) / 2)
    assert found["overall"] == pytest.approx(2 / 4)
    assert (found["adversarial"], found["refuses"]) == (0, False)
    assert found["categories"]["single-hop"] == {"score": 0.5, "count": 2}


def test_evidence_recall():
    assert evidence_recall(["D1:1", "D2:3"], ["D1:1", "D1:2"]) == 0.5
    assert evidence_recall(["S1"], ["D1:1", "D1:2", "D2:1", "D11:1"]) == 0.5
    assert evidence_recall([], []) == 1
    assert evidence_recall([], ["D1:1"]) == 0


def test_bad_files(tmp_path):
    with pytest.raises(mnemic.DataError, match="Download"):
        locomo(tmp_path)
    (tmp_path / "locomo10.json").write_text("[{}]", encoding="utf-8")
    with pytest.raises(mnemic.DataError, match="not LoCoMo"):
        locomo(tmp_path)
    (tmp_path / "locomo10.json").write_text("{", encoding="utf-8")
    with pytest.raises(mnemic.DataError, match="cannot be read"):
        locomo(tmp_path)
    with pytest.raises(mnemic.DataError, match="Download"):
        next(longmemeval_records(tmp_path))


def test_the_released_file_has_the_counts_of_the_card(released):
    conversations = locomo(released)
    assert [len(c.questions) for c in conversations] == [199, 105, 193, 260, 242, 158, 190, 239, 196, 204]
    assert (min(len(c.sessions) for c in conversations), max(len(c.sessions) for c in conversations)) == (19, 32)
    assert (min(len(c.turns) for c in conversations), max(len(c.turns) for c in conversations)) == (369, 689)
    records = list(locomo_records(released))
    assert Counter(r.metadata["category"] for r in records) == {1: 282, 2: 321, 3: 96, 4: 841, 5: 446}
    assert sum(bool(r.metadata["found"]) for r in records) == 1977


def test_the_answer_scores_100_and_a_refusal_where_it_should(released):
    records = list(locomo_records(released))
    right = [r.targets[0].split(";")[0] if r.metadata["category"] == 3 else r.targets[0] for r in records]
    found = locomo_summary(records, right)
    assert {name: round(one["score"], 6) for name, one in found["categories"].items()} == {
        "multi-hop": 1, "temporal": 1, "open-domain": 1, "single-hop": 1, "adversarial": 1
    }  # fmt: skip
    refused = locomo_summary(records, ["Not mentioned"] * len(records))
    assert refused["adversarial"] == 1
    assert refused["answerable"] < 0.01
    assert refused["refuses"]


def test_bm25_finds_the_evidence_as_on_the_card(released):
    pytest.importorskip("bm25s", reason="bm25s is not installed: pip install 'mnemic[retrieval]'")
    search = Bm25(words=normalised)
    recalls = {key: [] for key in CARD}
    records = iter(locomo_records(released))
    for conversation in locomo(released):
        turns = conversation.turns
        chunks = tuple(f"{turn.speaker} {turn.text} {turn.caption}" for turn in turns)
        for _ in conversation.questions:
            record = next(records)
            evidence = record.metadata["found"]
            if evidence:
                order = np.argsort(-search(chunks, record.metadata["asked"]), kind="stable")
                row = [evidence_recall((turns[i].name for i in order[:k]), evidence) for k in (5, 10, 50)]
                for key in ("all", record.metadata["category"]):
                    recalls[key].append(row)
    assert len(recalls["all"]) == 1977
    for key, expected in CARD.items():
        np.testing.assert_allclose(np.mean(recalls[key], axis=0), expected, atol=0.001)


def longmemeval_file(folder, **changes):
    question = {
        "question_id": "q1_abs",
        "question_type": "temporal-reasoning",
        "question": "When?",
        "answer": 3,
        "question_date": "2023/06/01 (Thu) 10:00",
        "haystack_dates": ["2023/05/20 (Sat) 02:21", "2023/05/09 (Tue) 23:00"],
        "haystack_session_ids": ["late", "early"],
        "haystack_sessions": [
            [{"role": "user", "content": "Later.", "has_answer": True}],
            [{"role": "user", "content": "Früh."}, {"role": "assistant", "content": "Yes."}],
        ],
        "answer_session_ids": ["late"],
    }
    path = folder / "longmemeval_oracle.json"
    path.write_text(json.dumps([{**question, **changes}]), encoding="utf-8")
    return folder


def test_longmemeval_sorts_sessions_by_date(tmp_path):
    [record] = longmemeval_records(longmemeval_file(tmp_path))
    assert record.context.index("Früh.") < record.context.index("Later.")
    assert "has_answer" not in record.context
    assert record.metadata["sessions"] == ["early", "late"]
    assert record.metadata["evidence"] == ["late"]
    assert record.metadata["abstention"]
    assert record.targets == ("3",)
    assert "2023/06/01 (Thu) 10:00" in record.question
    [users] = longmemeval_records(tmp_path, user_turns_only=True)
    assert "Yes." in record.context
    assert "Yes." not in users.context
    with pytest.raises(mnemic.DataError, match="question 1"):
        list(longmemeval_records(longmemeval_file(tmp_path, haystack_dates=["May"])))


def test_longmemeval_retrieval_by_hand():
    known = ["a", "b", "c", "d"]
    found = retrieval_scores(["c", "a", "d", "b"], ["a", "b"], known, 2)
    # The released rule does not discount the second rank: 1 of an ideal 1 + 1.
    assert found == {"any": 1, "all": 0, "ndcg": 0.5}
    fixed = retrieval_scores(["c", "a", "d", "b"], ["a", "b"], known, 2, "fixed")
    assert fixed["ndcg"] == pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))
    whole = retrieval_scores(["c", "a", "d", "b"], ["a", "b"], known, 4)
    assert whole == {"any": 1, "all": 1, "ndcg": pytest.approx((1 + 1 / 2) / 2)}
    assert retrieval_scores(["a"], [], known, 1)["ndcg"] == 0
    assert retrieval_scores(["c", "d"], ["a"], known, 2) == {"any": 0, "all": 0, "ndcg": 0}


def test_hypotheses_are_lines_of_json(tmp_path):
    answers = {"q1": "blue", "q2_abs": "I do not know \N{EM DASH} sorry\n"}
    write_hypotheses(tmp_path / "out.jsonl", answers)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"question_id": k, "hypothesis": v} for k, v in answers.items()]
