"""Streamed BABILong samples: equal to a builder that keeps everything, in constant memory, readable by a stream."""

import hashlib
import itertools
import random
import tracemalloc
from dataclasses import asdict, fields

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import mnemic
from mnemic.benchmarks import BabilongSample, Document, Haystack, StreamedSample, babi, open_babilong, prose
from mnemic.benchmarks.babilong import LABELS, sample
from mnemic.benchmarks.background import sentence_spans
from tests.tiny import tiny_host


def novels(count=4, sentences=300):
    """Texts of their own, so that nothing depends on the Python that runs the test."""
    rng = random.Random("novels")
    words = ["".join(rng.choice("aeioulmnrst") for _ in range(2 + int(rng.random() * 7))) for _ in range(400)]

    def sentence():
        said = " ".join(words[int(rng.random() * 400)] for _ in range(3 + int(rng.random() * 30)))
        return said.capitalize() + ("." if rng.random() < 0.9 else "?”")

    for number in range(count):
        text = "\n".join("  ".join(sentence() for _ in range(5)) for _ in range(sentences // 5))
        yield Document(f"n{number}", text, f"novel {number // 2}")


def kept(task, length, tokenizer, documents, *, seed, count, reserve=300, window=None):
    """The construction of the paper with everything in memory: sentences in a list, ids in a list."""
    slot_rng = random.Random(f"mnemic.babilong|{task}|{length}|{seed}")
    rng = random.Random(f"mnemic.background|{task}|{length}|{seed}")
    budget = length - reserve
    left = []
    for story in babi.stream(task, seed, "test"):
        facts = [tokenizer.encode(" " + fact) for fact in story.facts]
        missing = wanted = budget - sum(map(len, facts))
        if missing <= 0 or len(facts) + 1 > budget // 8:
            continue
        sentences, names = [], []
        while missing:
            if not left:
                document = documents[int(rng.random() * len(documents))]
                begin = int(rng.random() * len(document.text))
                end = begin + max(10 * wanted, 1000)
                spans = [(a, b) for a, b in sentence_spans(document.text) if b > begin and a < end]
                left = [(document, document.text[a:b]) for a, b in spans[1:-1]]
            while left and missing:
                document, text = left.pop(0)
                ids = tokenizer.encode(" " + text)
                if len(ids) >= 10:
                    sentences.append(ids[:missing])
                    missing -= len(sentences[-1])
                    names += [document.provenance] * (document.provenance not in names)
        begins = [0, *itertools.accumulate(map(len, sentences))]
        slots = list(range(len(begins)))
        if window:
            low, high = int(budget * window[0]), int(budget * window[1]) - sum(map(len, facts))
            slots = [slot for slot in slots[:-1] if low <= begins[slot] < high]
        drawn = sorted(slots[int(slot_rng.random() * len(slots))] for _ in facts)
        ids, offsets = [], []
        for slot in range(len(begins)):
            for fact, place in zip(facts, drawn, strict=True):
                if place == slot:
                    offsets.append(len(ids))
                    ids += fact
            ids += sentences[slot] if slot < len(sentences) else []
        yield BabilongSample(
            task=task, length=length, context=tokenizer.decode(ids).strip(), question=story.question,
            target=story.answer, seed=seed, provenance=f"facts: {story.provenance}; background: {'; '.join(names)}",
            fact_slots=tuple(drawn), slots=len(begins), fact_offsets=tuple(offsets), tokens=len(ids),
            supporting=story.supporting,
        )  # fmt: skip
        count -= 1
        if not count:
            return


def assert_streams(found, expected):
    """What is known equals, and so do the pieces joined, as often as they are read."""
    assert {one.name: getattr(found, one.name) for one in fields(sample.SampleFacts)} == {
        name: value for name, value in asdict(expected).items() if name != "context"
    }
    for _ in range(2):
        assert "".join(found.text()) == expected.context
        assert sum(map(len, found.ids())) == expected.tokens
    assert found.whole() == expected


@pytest.mark.parametrize("task", LABELS)
def test_equal_to_a_builder_that_keeps_everything(no_data, tokenizer, task, monkeypatch):
    monkeypatch.setattr(sample, "_BLOCK", 150)
    documents = tuple(novels())
    number = int(task.removeprefix("qa"))
    for length, count in ((4000, 3), ((1000, 2000, 8000, 16_000)[number % 4] if task != "qa3" else 64_000, 1)):
        window = (0.2, 0.9) if length == 4000 and task != "qa3" else None
        start, end = window or (None, None)
        stream = open_babilong(
            task, length, tokenizer, background=documents, seed=number, count=count, start_pct=start, end_pct=end
        )
        expected = list(kept(task, length, tokenizer, documents, seed=number, count=count, window=window))
        for found, one in zip(stream.streamed(), expected, strict=True):
            assert_streams(found, one)
        assert list(stream) == expected


FORMER = (
    "context", "fact_offsets", "fact_slots", "length", "provenance", "question", "seed", "slots", "target", "task",
    "tokens",
)  # fmt: skip


def test_samples_are_those_of_before(no_data, tokenizer):
    """A digest of samples by a builder that held each whole: 20 tasks, every length from 0k to 64k."""
    haystack = Haystack(novels(), tokenizer)
    digest = hashlib.sha256()
    for task, length in itertools.product(LABELS, ("0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k")):
        if (task == "qa3" and length in ("1k", "2k")) or (length == "64k" and task not in ("qa1", "qa7")):
            continue
        stream = open_babilong(task, length, tokenizer, background=haystack, seed=7, count=1)
        for found, one in zip(stream.streamed(), stream, strict=True):
            assert_streams(found, one)
            digest.update(repr([(name, getattr(one, name)) for name in FORMER]).encode())
    assert digest.hexdigest() == "d364a7cfecf9ec74ad2dc3062acfe8e7b46bb3a3afcb4325ed1738d4e6ee5f43"


def metaspace():
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return inner, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)


def word_pieces():
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=False)
    return inner, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"], show_progress=False)


@pytest.mark.parametrize("make", [metaspace, word_pieces])
def test_tokenizers_whose_first_word_is_special(no_data, make, monkeypatch):
    """They decode a first word without the blank that it has elsewhere."""
    monkeypatch.setattr(sample, "_BLOCK", 60)
    tokenizer, trainer = make()
    tokenizer.train_from_iterator([document.text for document in prose("validation")], trainer)
    stream = open_babilong("qa1", "2k", tokenizer, count=3, seed=1)
    for found, one in zip(stream.streamed(), stream, strict=True):
        assert len(list(found.ids())) > 10
        assert_streams(found, one)


def test_a_tokenizer_without_pieces_is_refused(no_data, tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "_BLOCK", 60)
    plain = tokenizer.decode
    tokenizer.decode = lambda ids: plain(ids) + " (end)"
    found = next(open_babilong("qa1", "1k", tokenizer).streamed())
    with pytest.raises(mnemic.InputError, match="otherwise when more follows"):
        list(found.text())
    assert found.whole().context.endswith("(end)")


def test_white_space_around_the_whole_goes():
    pieces = ["", " \n", "  a ", " ", "b\n", "\n", " c", "  ", ""]
    assert "".join(sample._stripped(pieces)) == "".join(pieces).strip()
    assert list(sample._stripped([" ", "\n"])) == []


def test_samples_can_be_read_in_any_order(no_data, tokenizer):
    stream = open_babilong("qa2", "4k", tokenizer, background=tuple(novels()), count=3, seed=2)
    expected = [one.context for one in stream]
    found = list(stream.streamed())
    pairs = itertools.zip_longest(found[2].text(), found[0].text(), fillvalue="")
    last, first = map("".join, zip(*pairs, strict=True))
    assert [first, "".join(found[1].text()), last] == expected
    assert found[0] == next(stream.streamed())
    assert isinstance(found[0], StreamedSample)


def test_memory_does_not_grow_with_the_length(no_data, tokenizer):
    haystack = Haystack(novels(2), tokenizer)

    def peak(length):
        stream = open_babilong("qa1", length, tokenizer, background=haystack)
        tracemalloc.start()
        found = next(stream.streamed())
        assert sum(map(len, found.ids())) == length - 300
        assert sum(map(len, found.text())) > length
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100_000)  # every sentence is encoded once
    short, long = peak(20_000), peak(200_000)
    assert long < short + 50_000
    assert long < 2_000_000


def test_a_stream_that_reads_pieces_remembers_the_whole(no_data, bpe, monkeypatch):
    monkeypatch.setattr(sample, "_BLOCK", 90)
    model = mnemic.attach(tiny_host(vocab_size=1000).double(), "rmt", segment=32, num_tokens=4).eval()
    found = next(open_babilong("qa1", "1k", bpe, seed=3).streamed())
    pieces = list(found.ids())
    assert len(pieces) > 5
    in_pieces, at_once = (model.stream() for _ in range(2))
    in_pieces.feed(found.ids())
    at_once.feed([token for piece in pieces for token in piece])
    assert in_pieces.tokens_seen == at_once.tokens_seen == found.tokens == 700
    assert set(in_pieces.state) == set(at_once.state)
    for name, value in at_once.state.items():
        torch.testing.assert_close(in_pieces.state[name], value, rtol=1e-10, atol=1e-10)
    assert in_pieces.generate(max_new_tokens=5, do_sample=False, return_ids=True) == at_once.generate(
        max_new_tokens=5, do_sample=False, return_ids=True
    )
