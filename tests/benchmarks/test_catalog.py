"""The catalog: what it lists can be opened, and what cannot be is told at once, with the way out."""

import gzip
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import mnemic
from mnemic.benchmarks import prose
from mnemic.benchmarks.catalog import catalog, entry, open_cell
from mnemic.benchmarks.prompts import parse_prompt
from mnemic.core import ConfigError, DataError, InputError, MissingExtraError, UnknownNameError, UnsupportedError
from mnemic.training import byte_tokenizer, word_tokenizer
from tests.tiny import tiny_host

SEGMENT = 32


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer([document.text for document in prose("validation")], 900)


@pytest.fixture(scope="module")
def model(tokenizer):
    return mnemic.attach(tiny_host(vocab_size=len(tokenizer)), "rmt", segment=SEGMENT)


def opened(name, length, **settings):
    return open_cell(name, length, 0, **{"tokenizer": None, "segment": SEGMENT, **settings})


def test_every_task_is_listed_once_with_what_it_needs():
    entries = {one.name: one for one in catalog()}
    assert len(entries) == len(catalog()) == 20 + 4 + 13 + 1 + 12 + 11 + 10 + 1 + 8 + 15
    for one in entries.values():
        assert entry(one.name) is one
        assert one.lengths
        assert one.source
        assert all(one.size(length) >= 0 for length in one.lengths)
        assert bool(one.needs) == (one.unit == "released" or one.name in ("ruler_qa_1", "ruler_qa_2"))
    assert (entries["qa1"].size("4k"), entries["ruler_vt"].size("4k"), entries["qa1"].size("37")) == (4000, 4096, 37)


@pytest.mark.parametrize("name", [e.name for e in catalog() if not e.needs and not e.name.startswith("ruler")])
def test_default_lengths_open(no_data, tokenizer, name):
    one = entry(name)
    segment = 5 if name in ("remember", "rewrite") else SEGMENT
    for length in (one.lengths[0], one.lengths[-1]):
        cell = open_cell(name, length, 3, tokenizer=tokenizer, segment=segment)
        assert (cell.task, cell.length, cell.seed) == (name, length, 3)
        assert next(cell.samples()) == next(cell.samples())
        other = open_cell(name, length, 4, tokenizer=tokenizer, segment=segment)
        if not name.startswith("chomsky"):  # some have two possible samples at their shortest
            assert next(cell.samples()) != next(other.samples())


def test_released_facts_of_babilong(data, tokenizer):
    for length in entry("qa3").lengths:
        assert opened("qa3", length, tokenizer=tokenizer, data=data).chance == 1 / 6


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name, length, message", [
    ("qa21", "4k", "Did you mean.*'qa2"), ("ruler_niah_single", "4k", "ruler_niah_single_1"), ("mqra", 64, "'mqar'"),
    ("qa1", "3k", "length of qa1 .*'4k'"), ("ruler_vt", "4K", "'4k'"), ("passkey", "4k", "a number of characters"),
    ("mqar", "064", "a number of tokens"), ("recall", "-2", "a number of segments"), ("locomo", "4k", "released"),
    ("lveval_factrecall_en", "released", "'16k'|16k, "),
])  # fmt: skip
def test_unknown_tasks_and_lengths(tokenizer, name, length, message):
    with pytest.raises(UnknownNameError, match=message):
        opened(name, length, tokenizer=tokenizer)


def test_longmemeval_is_refused_with_the_way():
    with pytest.raises(UnsupportedError, match=r"judge.*write_hypotheses"):
        opened("longmemeval", "released")


@pytest.mark.parametrize("name, length, options, message", [
    ("mqar", 64, {"pair": 4}, "'pairs'"), ("mqar", 64, {"pairs": 40}, "length of at least"),
    ("mqar", 64, {"pairs": "4"}, "mqar with"), ("mqar", 7, {}, "even length"), ("recall", 2, {"pair": 1}, "'pairs'"),
    ("recall", 2, {"pairs": 9}, "different keys"), ("remember", 3, {}, "segments of 5 tokens"),
    ("segment_mqar", 1, {}, "at least 2"), ("chomsky_even_pairs", 4, {"step": 1}, "'steps'"),
    ("chomsky_even_pairs", 4, {"steps": -1}, "whole number"), ("niah", 400, {"depths": 5}, "'depth'"),
    ("niah", 400, {"depth": 101}, "percent"), ("passkey", 400, {"depth": 1}, "none at all"),
    ("qa1", "1k", {"reserved": 1}, "'reserve'"), ("qa1", 200, {}, "leaves no context"), ("qa1", 310, {}, "None of"),
    ("lines", 20_000, {}, "lines must be"), ("ruler_niah_single_1", 900, {"background": "books"}, "none at all"),
])  # fmt: skip
def test_sizes_that_cannot_be(no_data, tokenizer, name, length, options, message):
    with pytest.raises(ConfigError, match=message):
        opened(name, length, tokenizer=tokenizer, options=options)


def test_contexts_that_cannot_hold_the_facts(no_data, tokenizer):
    for name, length in (("ruler_vt", 300), ("niah", 210), ("passkey_tokens", 20), ("ruler_fwe", 100)):
        with pytest.raises(InputError, match="length of at least"):
            opened(name, length, tokenizer=tokenizer)
    with pytest.raises(InputError, match="at least 1"):
        opened("chomsky_even_pairs", 0)
    with pytest.raises(InputError, match="meet in one segment"):
        opened("recall", 3, segment=8, options={"pairs": 4})


def test_models_without_a_tokenizer_or_with_too_few_words(no_data, tokenizer):
    with pytest.raises(InputError, match=r"no tokenizer.*save_pretrained"):
        opened("qa1", "0k")
    few = word_tokenizer(["Mary went to the kitchen . Where is Mary ? The pass key is in it"])
    with pytest.raises(InputError, match=r"answer .* outside the tokenizer's vocabulary.*<unk>"):
        opened("passkey", 100, tokenizer=few)
    cell = replace(opened("qa1", "0k", tokenizer=tokenizer), tokenizer=few)
    known, unknown = (
        next(r for r in cell.samples() if (r.targets == ("kitchen",)) is right) for right in (True, False)
    )
    cell.check(known)
    with pytest.raises(InputError, match="outside the tokenizer's vocabulary"):
        cell.check(unknown)


def test_files_that_are_missing_or_of_another_kind(no_data, tokenizer, tmp_path):
    for one in catalog():
        if one.needs:
            with pytest.raises(DataError, match=r"Download it.*MNEMIC_DATA"):
                opened(one.name, one.lengths[0], tokenizer=tokenizer)
            # The rule for Chinese needs a package, which is asked for first.
            with pytest.raises((DataError, MissingExtraError), match=r"does not exist\. Download it from|jieba"):
                opened(one.name, one.lengths[0], tokenizer=tokenizer, data=tmp_path)
    for file in ("locomo10.json", "dev-v2.0.json", "trec.jsonl"):
        (tmp_path / file).write_text('{"data": 3}', encoding="utf-8")
    for name in ("locomo", "ruler_qa_1", "longbench_trec"):
        with pytest.raises(DataError, match=r"get it again|Get the file again|expected"):
            opened(name, "4k" if name == "ruler_qa_1" else "released", tokenizer=tokenizer, data=tmp_path)
    (tmp_path / "qasper.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="empty"):
        opened("longbench_qasper", "released", tokenizer=tokenizer, data=tmp_path)
    with pytest.raises(DataError, match=r"books_test.*does not exist"):
        opened("qa1", "1k", tokenizer=tokenizer, data=tmp_path)


@pytest.mark.parametrize("prompt, error, message", [
    ("bm52:100", UnknownNameError, "'bm25'"), ("truncated", ConfigError, "expected 'whole'"),
    ("whole:5", ConfigError, "expected 'whole'"), ("truncated:many", ConfigError, "not 'many'"),
    ("middle-out:0", ConfigError, "at least 1"), ("dense:100", ConfigError, "dense:BUDGET:MODEL"),
    ("bm25:100:x", ConfigError, "expected"),
])  # fmt: skip
def test_prompts_that_cannot_be(prompt, error, message):
    with pytest.raises(error, match=message):
        parse_prompt(prompt)


def test_other_settings_that_cannot_be(no_data, tokenizer, model):
    with pytest.raises(ConfigError, match="for tasks in words"):
        opened("mqar", 64, prompt="truncated:64")
    with pytest.raises(UnknownNameError, match="'test'"):
        opened("qa1", "0k", tokenizer=tokenizer, split="tests")
    with pytest.raises(ConfigError, match="at least 1 token"):
        opened("mqar", 64, segment=0)
    cell = opened("passkey", 100, tokenizer=tokenizer, prompt="truncated:3")
    with pytest.raises(InputError, match="question alone"):
        cell.answer(model, [next(cell.samples())])


def test_dense_retrieval_is_loaded_at_once(monkeypatch):
    def load(name):
        if name != "C:/encoders/small":
            raise OSError("no such model")
        return SimpleNamespace(encode=lambda texts: [[1.0]] * len(texts))

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=load))
    assert parse_prompt("dense:100:C:/encoders/small").budget == 100
    with pytest.raises(InputError, match="'other' cannot be loaded"):
        parse_prompt("dense:100:other")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"mnemic\[retrieval\]"):
        parse_prompt("dense:100:C:/encoders/small")


# ------------------------------------------------------------------------------------------------------------- files

SQUAD = {"data": [{"paragraphs": [
    {"context": f"The {a} of {b} is {n}.",
     "qas": [{"question": f"What is the {a}?", "is_impossible": False, "answers": [{"text": str(n)}]}]}
    for a, b, n in (("height", "Ararat", 5137), ("depth", "Baikal", 1642), ("length", "Volga", 3531))
]}]}  # fmt: skip
LONGBENCH = {
    "_id": "1", "input": "Who sat?", "context": "The cat sat.", "answers": ["The cat"], "length": 3,
    "dataset": "hotpotqa", "language": "en", "all_classes": None,
}  # fmt: skip
LVEVAL = {"input": "Who?", "context": "Ann ran.", "answers": ["Ann"], "length": 2, "answer_keywords": "Ann"}
INFINITE = {"id": 4, "context": "Def.", "input": "Which?", "answer": ["red"], "options": ["red", "blue", "green", "x"]}
LOCOMO = [{
    "sample_id": "c1",
    "conversation": {
        "session_1": [{"dia_id": "D1:1", "speaker": "Ann", "text": "I moved to Oslo."}],
        "session_1_date_time": "1 May 2023",
    },
    "qa": [{"question": "Where did Ann move?", "answer": "Oslo", "category": 4, "evidence": ["D1:1"]},
           {"question": "Who is Bob?", "category": 5, "evidence": []}],
}]  # fmt: skip


def answered(cell, model):
    """All samples, and the record of the first. What is said does not matter here, and many tokens take long."""
    samples = list(cell.samples())
    records = replace(cell, asked=replace(cell.asked, max_new_tokens=4)).answer(model, samples[:1])
    assert json.loads(json.dumps(records)) == records
    return samples, records[0]


def test_released_files_end_to_end(no_data, tokenizer, model, tmp_path):
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(SQUAD), encoding="utf-8")
    for folder, name, line in (
        ("longbench", "hotpotqa", LONGBENCH), ("infinitebench", "longbook_choice_eng", INFINITE),
        ("lveval", "hotpotwikiqa_mixup_32k", LVEVAL),
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.jsonl").write_text(json.dumps(line), encoding="utf-8")
    expected = {
        "ruler_qa_1": (400, 3, "5137"), "longbench_hotpotqa": ("released", 1, "The cat"),
        "infinitebench_longbook_choice_eng": ("released", 1, "red"), "lveval_hotpotwikiqa_mixup": ("32k", 1, "Ann"),
    }  # fmt: skip
    for name, (length, count, target) in expected.items():
        samples, record = answered(opened(name, length, tokenizer=tokenizer, data=tmp_path), model)
        assert len(samples) == count
        assert record["targets"][0] == target
    # The file itself will do.
    file = tmp_path / "longbench" / "hotpotqa.jsonl"
    assert len(list(opened("longbench_hotpotqa", "released", tokenizer=tokenizer, data=file).samples())) == 1


def test_conversations_end_to_end(no_data, tokenizer, model, tmp_path):
    pytest.importorskip("nltk", reason="the rule of LoCoMo needs nltk")
    (tmp_path / "locomo10.json.gz").write_bytes(gzip.compress(json.dumps(LOCOMO).encode()))
    samples, record = answered(opened("locomo", "released", tokenizer=tokenizer, data=tmp_path), model)
    assert (len(samples), record["targets"], record["category"]) == (2, ["Oslo"], 4)
    adversarial = opened("locomo", "released", tokenizer=tokenizer, data=tmp_path, options={"categories": [5]})
    assert [sample.metadata["category"] for sample in adversarial.samples()] == [5]


def test_retrieval_reads_what_bm25_finds(no_data, tokenizer, model):
    pytest.importorskip("bm25s", reason="needs mnemic[retrieval]")
    cell = opened("lines", 60, tokenizer=tokenizer, prompt="bm25:400")
    [record] = [next(cell.samples())]
    prompt = cell.prompting.prompt(cell.asked, record, tokenizer)
    assert len(prompt.ids) <= 400
    assert record.targets[0] in tokenizer.decode(prompt.ids)
    [answered] = cell.answer(model, [record])
    assert answered["truncated"] == prompt.dropped > 0
