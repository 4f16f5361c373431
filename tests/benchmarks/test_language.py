"""Language modelling: counts, closed forms, and every policy against one forward call for each reading."""

import gzip
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import mnemic
from mnemic.benchmarks.language import by_position, by_segment, evaluate_language, gain, summarise, token_losses
from mnemic.benchmarks.long_texts import LongTexts, books, enwik8, pg19, wikitext
from mnemic.benchmarks.scoring import score_ends
from tests.tiny import VOCABULARY, random_ids, tiny_host

SEGMENT = 8


def attached(memory="rmt", segment=SEGMENT, **options):
    options = {"num_tokens": 2} if memory == "rmt" else options
    return mnemic.attach(tiny_host(), memory, segment=segment, **options).eval()


def documents(*lengths):
    return [random_ids(n, seed=n).tolist() for n in lengths]


def one_call(model, ids):
    """Losses of ids[1:] from one forward call."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def check(found, expected):
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found.nan_to_num(), expected.nan_to_num(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("memory", ["rmt", "deltanet", "window"])
@pytest.mark.parametrize("policy", ["document", "segment", "stream", "window"])
def test_losses_equal_one_call_for_each_reading(memory, policy):
    model, texts = attached(memory), documents(27, 8, 1, 40)
    options = {"window": 12, "stride": 5} if policy == "window" else {}
    found = token_losses(model, texts, policy, batch_size=3, **options)
    assert [len(f) for f in found] == [len(t) for t in texts]
    if policy == "stream":
        whole = [token for text in texts for token in text]
        expected = torch.cat([torch.tensor([math.nan]).double(), one_call(model, whole)])
        check(torch.cat(found), expected)
        return
    for text, losses in zip(texts, found, strict=True):
        expected = torch.full((len(text),), math.nan, dtype=torch.float64)
        if policy == "document":
            readings = [(0, 0, len(text))]
        elif policy == "segment":
            readings = [(a, a, min(a + SEGMENT, len(text))) for a in range(0, len(text), SEGMENT)]
        else:
            stops = [min(12, len(text)), *range(17, len(text) + 5, 5)] if len(text) > 12 else [len(text)]
            stops = [min(stop, len(text)) for stop in stops]
            readings = [(max(0, b - 12), a, b) for a, b in zip([0, *stops], stops, strict=False)]
        for begin, first, stop in readings:
            if stop - begin > 1:
                part = one_call(model, text[begin:stop])
                keep = max(first, begin + 1)
                expected[keep:stop] = part[keep - begin - 1 :]
        check(losses, expected)


def test_a_start_token_excludes_nothing():
    model, texts = attached(), documents(19, 1)
    for policy in ("document", "segment", "stream"):
        losses = torch.cat(token_losses(model, texts, policy, start=1))
        assert not losses.isnan().any()
    [first, single] = token_losses(model, texts, start=1)
    check(first, one_call(model, [1, *texts[0]]))
    check(single, one_call(model, [1, *texts[1]]))


@pytest.mark.parametrize("streams", [1, 2, 7])
@pytest.mark.parametrize("segment", [8, 13])
def test_scored_and_excluded_are_all(streams, segment):
    texts = documents(33, 20, 50)
    losses = token_losses(attached(segment=segment), texts, "stream", streams=streams)
    totals = summarise(losses, words=50, num_bytes=400)
    assert totals["tokens"] == 103
    assert totals["excluded"] == streams
    assert totals["scored"] == 103 - streams


def test_batches_change_nothing():
    model, texts = attached(), documents(27, 9, 40, 16, 33)
    for one, other in zip(
        token_losses(model, texts, batch_size=1), token_losses(model, texts, batch_size=4), strict=True
    ):
        check(one, other)


def test_without_memory_segments_and_windows_agree():
    """One segment holds the text: reading it once, or a window a token with all before it, is the same."""
    model, texts = attached("none", segment=48), documents(40)
    [once] = token_losses(model, texts)
    [stepwise] = token_losses(model, texts, "window", window=48, stride=1)
    check(stepwise, once)


class Table(torch.nn.Module):
    """Next-token logits by the current token."""

    def __init__(self, log_probs):
        super().__init__()
        self.table = log_probs

    def forward(self, hidden):
        return self.table[hidden[..., 0].round().long()]


def closed_form(table):
    """A host whose logits are table[current token]: layers add nothing, the head looks the token up."""
    size = len(table)
    host = tiny_host(vocab_size=size, tie_word_embeddings=False)
    model = mnemic.attach(host, "none", segment=SEGMENT).eval()
    with torch.no_grad():
        weight = host.get_input_embeddings().weight
        weight.zero_()
        weight[:, 0] = torch.arange(size, dtype=weight.dtype)
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                parameter.zero_()
    model.model.norm = torch.nn.Identity()
    model.lm_head = Table(table)
    return model


def test_a_bigram_model_gives_the_closed_form():
    table = torch.randn(17, 17, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    ids = (random_ids(50) % 17).tolist()
    [losses] = token_losses(closed_form(table), [ids])
    expected = -sum(float(table[a, b]) for a, b in pairwise(ids))
    assert float(losses[1:].sum()) == pytest.approx(expected, rel=1e-9)


def test_uniform_bytes_cost_eight_bits():
    text = books("some", [b"Any bytes at all. " * 5, "Größe".encode()])
    model = closed_form(torch.zeros(256, 256))
    for policy, start in (("document", None), ("segment", None), ("document", 0)):
        found = evaluate_language(model, text, policy=policy, start=start)
        assert found["bits_per_byte"] == pytest.approx(8, abs=1e-6)
        assert found["excluded"] == {"document": 2, "segment": 13}[policy] * (start is None)
    assert found["tokens"] == found["bytes"] == sum(map(len, text.documents))
    assert found["text"]["sha256"] == text.sha256
    assert found["by_segment"][0]["scored"] == 15
    assert found["tokenizer"] == "bytes"


def test_perplexities_convert():
    losses = [torch.tensor([math.nan, 1.0, 2.0, 3.0]).double(), torch.tensor([math.nan, 4.0]).double()]
    found = summarise(losses, words=3, num_bytes=20)
    assert found["nats"] == 10
    assert (found["scored"], found["excluded"]) == (4, 2)
    assert found["perplexity_token"] == pytest.approx(math.exp(2.5))
    assert found["perplexity_word"] == pytest.approx(found["perplexity_token"] ** (6 / 3), rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx(2.5 * 6 / (math.log(2) * 20), rel=1e-9)


def test_by_position_and_segment():
    losses = [torch.tensor([math.nan, 1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([math.nan, 5.0, 6.0]).double()]
    assert by_position(losses, [0, 2, 5, 9]) == [
        {"from": 0, "to": 2, "scored": 2, "loss": 3.0},
        {"from": 2, "to": 5, "scored": 4, "loss": 15 / 4},
    ]
    assert [one["loss"] for one in by_segment(losses, 2)] == [3.0, 11 / 3, 4.0]


def test_gain_is_over_tokens_that_both_predict():
    carried = [torch.tensor([math.nan, 1.0, 2.0]).double(), torch.tensor([math.nan, 1.0, 1.0]).double()]
    anew = [torch.tensor([math.nan, 1.5, math.nan]).double(), torch.tensor([math.nan, 2.0, 1.5]).double()]
    found = gain(carried, anew)
    assert found["tokens"] == 3
    assert found["gain"] == pytest.approx((0.5 + 1.0 + 0.5) / 3)


def test_wikitext_is_cut_at_titles_and_nothing_is_lost(tmp_path):
    lines = ["", " = One = ", "", " = = Part = = ", "", " a = b = c ", " x <unk> y ", "", " = Two = ", "", " z "]
    path = tmp_path / "wiki.test.tokens"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = wikitext(path)
    assert len(found.documents) == 2
    assert b"".join(found.documents) == path.read_bytes()
    assert sum(found.words) == sum(len(line.split()) + 1 for line in lines)
    assert found.documents[1].startswith(b"\n = Two = \n")
    (tmp_path / "other.txt").write_text("no titles\n", encoding="utf-8")
    with pytest.raises(mnemic.DataError, match="titles"):
        wikitext(tmp_path / "other.txt")


@pytest.mark.parametrize("split, words", [("valid", 217_646), ("test", 245_569)])
def test_released_wikitext_has_the_published_counts(split, words):
    path = Path(os.environ.get("MNEMIC_DATA", "")) / "wikitext-2-heldout" / f"wikitext2.{split}.tokens.txt.gz"
    if not path.is_file():
        pytest.skip("MNEMIC_DATA has no wikitext-2-heldout/")
    found = wikitext(path)
    assert sum(found.words) == words
    assert b"".join(found.documents) == gzip.decompress(path.read_bytes())
    assert len(found.documents) == 60


def test_files_of_other_data_sets(tmp_path):
    (tmp_path / "2.txt").write_text("two  words", encoding="utf-8")
    (tmp_path / "1.txt").write_text("one\nand three\n", encoding="utf-8")
    assert pg19(tmp_path).words == (3, 2)
    with pytest.raises(mnemic.DataError, match=r"\.txt"):
        pg19(tmp_path / "none")
    with pytest.raises(mnemic.DataError, match="Download"):
        enwik8(tmp_path / "enwik8")
    (tmp_path / "enwik8").write_bytes(b"short")
    with pytest.raises(mnemic.DataError, match="100,000,000"):
        enwik8(tmp_path / "enwik8")
    with pytest.raises(mnemic.UnknownNameError, match="split"):
        enwik8(tmp_path / "enwik8", "dev")
    with pytest.raises(mnemic.DataError, match="UTF-8"):
        LongTexts("raw", "byte", (b"\xff",), (1,)).encode(lambda text, **options: {"input_ids": [1]})


def test_bad_input():
    model = attached()
    with pytest.raises(mnemic.UnknownNameError, match="policy"):
        token_losses(model, documents(9), "documents")
    with pytest.raises(mnemic.ConfigError, match="window"):
        token_losses(model, documents(9), "window", window=4)
    with pytest.raises(mnemic.ConfigError, match="stride"):
        token_losses(model, documents(9), "window", window=4, stride=5)
    with pytest.raises(mnemic.ConfigError, match="streams"):
        token_losses(model, documents(9), streams=2)
    with pytest.raises(mnemic.InputError, match="start"):
        token_losses(model, documents(1))
    with pytest.raises(mnemic.InputError, match=str(VOCABULARY - 1)):
        token_losses(model, [[1, VOCABULARY]])
    with pytest.raises(mnemic.InputError, match="as many tokens as the row has"):
        list(score_ends(model, [[1, 2]], [[[1, 2, 3]]]))
