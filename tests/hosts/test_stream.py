"""Streams: feeding, generating, keeping; each against plain recomputation of everything read so far."""

import pytest
import torch

import mnemic
from mnemic import FileFormatError, InputError, UnsupportedError
from tests.hosts.models import SEGMENT, close, greedy, last, logits_of, tiny_model, word_tokenizer, words
from tests.tiny import VOCABULARY, random_ids

IDS = random_ids(1, 29, seed=5)
ROW = IDS[0].tolist()


def test_what_is_remembered_shows_in_the_logits():
    # Without this the equalities below would say little.
    alone = logits_of(tiny_model("none"), IDS)[0, -1]
    for memory in ("window", "lm2", "rmt"):
        assert (logits_of(tiny_model(memory), IDS)[0, -1] - alone).abs().max() > 0.05, memory


# Feeding


FORMS = {
    "list": lambda: ROW,
    "row": lambda: IDS[0],
    "matrix": lambda: IDS,
    "int32": lambda: IDS.int(),
    "nested": lambda: [ROW],
    "list of tensors": lambda: [IDS[0]],
    "numpy": lambda: IDS[0].numpy(),
    "numpy matrix": lambda: IDS.numpy(),
    "tuple": lambda: tuple(ROW),
    "iterator of lists": lambda: iter([ROW[:3], ROW[3:16], ROW[16:]]),
    "iterator of tensors": lambda: (IDS[:, i : i + 5] for i in range(0, 29, 5)),
    "iterator of both": lambda: iter([ROW[:8], IDS[0, 8:9], [ROW[9:24]], IDS[:, 24:]]),
    "text": lambda: words(ROW),
    "list of text": lambda: [words(ROW)],
    "iterator of text": lambda: iter([words(ROW[:7]), words(ROW[7:8]), words(ROW[8:])]),
    "iterator of text and ids": lambda: iter([words(ROW[:7]), ROW[7:20], IDS[:, 20:]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_feed_takes_text_and_ids_in_every_form(model, form):
    stream = model.stream(tokenizer=word_tokenizer())
    logits = stream.feed(FORMS[form](), return_logits=True)
    assert stream.tokens_seen == 29
    close(logits, logits_of(model, IDS))
    close(last(stream), logits[:, -1])


@pytest.mark.parametrize("count", [1, SEGMENT - 1, SEGMENT, 2 * SEGMENT, 16 * SEGMENT, 17 * SEGMENT + 3])
def test_logits_of_feeding_are_those_of_one_call(model, count):
    ids = random_ids(1, count, seed=count)
    logits = model.stream().feed(ids, return_logits=True)
    assert logits.shape == (1, count, VOCABULARY)
    close(logits, logits_of(model, ids))


def test_feeding_returns_the_stream(lm2):
    stream = lm2.stream()
    assert stream.feed(ROW[:3]).feed(ROW[3:]) is stream
    close(last(stream), logits_of(lm2, IDS)[:, -1])


def test_rows_of_different_lengths_are_read_side_by_side(model):
    rows = [random_ids(n, seed=n).tolist() for n in (3, 17, 150)]
    more = [random_ids(n, seed=9 + n).tolist() for n in (9, 0, 8)]
    batch = model.stream(3)
    first = batch.feed(rows, return_logits=True)
    assert first.shape == (3, 150, VOCABULARY)
    assert batch.tokens_seen == [3, 17, 150]
    second = batch.feed(more, return_logits=True)
    assert batch.tokens_seen == [12, 17, 158]
    for i, (row, then) in enumerate(zip(rows, more, strict=True)):
        alone = logits_of(model, torch.tensor([row + then]))[0]
        close(first[i, 150 - len(row) :], alone[: len(row)])
        assert bool((first[i, : 150 - len(row)] == 0).all())
        close(second[i, 9 - len(then) :], alone[len(row) :])
        close(last(batch)[i], alone[-1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tensor_with_a_mask_pads_on_either_side(model, side):
    lengths, width = (4, 140), 140
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for i, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, place], mask[i, place] = random_ids(n, seed=n), 1
    batch = model.stream(2)
    logits = batch.feed(ids, attention_mask=mask, return_logits=True)
    assert batch.tokens_seen == [4, 140]
    for i, n in enumerate(lengths):
        alone = logits_of(model, random_ids(n, seed=n)[None])[0]
        close(logits[i][mask[i] == 1], alone)
        close(last(batch)[i], alone[-1])


def test_columns_that_are_padding_in_every_row_cost_nothing(lm2):
    # More padding than one call reads: the first calls hold no token at all.
    ids = torch.cat([torch.zeros(1, 16 * SEGMENT + 5, dtype=torch.long), IDS], dim=1)
    mask = torch.cat([torch.zeros(1, 16 * SEGMENT + 5), torch.ones(1, 29)], dim=1)
    stream = lm2.stream()
    logits = stream.feed(ids, attention_mask=mask, return_logits=True)
    assert logits.shape[1] == ids.shape[1]
    assert stream.tokens_seen == 29
    close(logits[:, -29:], logits_of(lm2, IDS))


def test_special_tokens_stand_at_the_start_of_a_stream_only(lm2):
    stream = lm2.stream(tokenizer=word_tokenizer(bos=True))
    stream.feed(words(ROW[:4])).feed(words(ROW[4:9]))
    assert stream.tokens_seen == 10
    close(last(stream), logits_of(lm2, torch.tensor([[1, *ROW[:9]]]))[:, -1])
    assert stream.reset().feed(words(ROW[:2])).tokens_seen == 3


def test_progress_is_shown_on_request(lm2, capsys):
    lm2.stream().feed(ROW)
    assert capsys.readouterr() == ("", "")
    lm2.stream().feed(ROW, progress=True)
    shown = capsys.readouterr()
    assert "29 tokens" in shown.err
    assert shown.out == ""


def test_bytes_carried_are_constant_after_the_first_segment(model):
    stream, found = model.stream(), []
    stream.feed(ROW[: SEGMENT + 1])
    for i in range(40):
        stream.feed([3 + i % 50] * (1 + i % 5))
        found.append(stream.state_bytes)
    assert set(found) == {found[0]}
    assert found[0] > 0
    assert stream.tokens_seen == SEGMENT + 1 + sum(1 + i % 5 for i in range(40))


# Generating


def test_generating_twice_is_one_long_recomputation(model):
    stream = model.stream()
    first = stream.generate(IDS[:, :11], max_new_tokens=9, return_ids=True)
    assert first == greedy(model, IDS[:, :11], 9)
    assert stream.tokens_seen == 20
    second = stream.generate(IDS[:, 11:], max_new_tokens=10, return_ids=True)
    history = torch.tensor([ROW[:11] + first + ROW[11:]])
    assert second == greedy(model, history, 10)
    assert stream.tokens_seen == 48
    close(last(stream), logits_of(model, torch.tensor([history[0].tolist() + second]))[:, -1])


@pytest.mark.parametrize("count", [1, SEGMENT - 1, SEGMENT, 20])
def test_without_a_prompt_it_goes_on_from_what_was_fed(model, count):
    fed = model.stream().feed(IDS[:, :count])
    seen = fed.tokens_seen
    found = fed.generate(max_new_tokens=12, return_ids=True)
    assert found == model.stream().generate(IDS[:, :count], max_new_tokens=12, return_ids=True)
    assert found == greedy(model, IDS[:, :count], 12)
    assert fed.tokens_seen == seen + 12
    # And once more, in two steps.
    assert fed.generate(max_new_tokens=3, return_ids=True) == greedy(
        model, torch.tensor([ROW[:count] + found]), 3
    )  # fmt: skip


def test_one_new_token(model):
    stream = model.stream().feed(IDS)
    assert stream.generate(max_new_tokens=1, return_ids=True) == greedy(model, IDS, 1)
    assert stream.tokens_seen == 30


def test_text_in_text_out(lm2):
    stream = lm2.stream(tokenizer=word_tokenizer())
    answer = stream.generate(words(ROW), max_new_tokens=6)
    assert answer == words(greedy(lm2, IDS, 6))
    batch = lm2.stream(2, tokenizer=word_tokenizer())
    answers = batch.generate([words(ROW[:5]), words(ROW)], max_new_tokens=6)
    assert answers == [words(greedy(lm2, IDS[:, :5], 6)), answer]


def test_a_batch_is_its_rows_alone(model):
    prompts = [ROW[:4], ROW[:17], ROW]
    batch = model.stream(3)
    expected = [greedy(model, torch.tensor([p]), 9) for p in prompts]
    assert batch.generate(prompts, max_new_tokens=9, return_ids=True) == expected
    assert batch.tokens_seen == [13, 26, 38]
    again = batch.generate(max_new_tokens=4, return_ids=True)
    assert again == [greedy(model, torch.tensor([p + e]), 4) for p, e in zip(prompts, expected, strict=True)]


def test_rows_end_for_themselves(model):
    prompts = [ROW[:4], ROW]
    plain = [greedy(model, torch.tensor([p]), 9) for p in prompts]
    end = next(t for t in plain[0] if t not in plain[1])
    stop = plain[0].index(end) + 1
    batch = model.stream(2)
    found = batch.generate(prompts, max_new_tokens=9, eos_token_id=end, pad_token_id=0, return_ids=True)
    assert found == [plain[0][:stop], plain[1]]
    assert batch.tokens_seen == [4 + stop, 38]
    # Both go on: the row that ended has read its end and nothing behind it.
    then = batch.generate(max_new_tokens=3, return_ids=True)
    assert then == [greedy(model, torch.tensor([p + f]), 3) for p, f in zip(prompts, found, strict=True)]


def test_sampling_follows_the_seed(model):
    def sample(seed):
        stream = model.stream().feed(IDS)
        torch.manual_seed(seed)
        return stream.generate(max_new_tokens=12, do_sample=True, temperature=2.0, top_k=0, return_ids=True)

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) == 4
    stream = model.stream().feed(IDS)
    found = stream.generate(max_new_tokens=5, do_sample=True, top_k=1, return_ids=True)
    assert found == greedy(model, IDS, 5)


@pytest.mark.parametrize("fed", [0, 13, 29])
def test_beams_equal_those_of_the_model(model, fed):
    with torch.no_grad():
        expected = model.generate(IDS, max_new_tokens=9, num_beams=3)[0, 29:].tolist()
    stream = model.stream()
    if fed:
        stream.feed(IDS[:, :fed])
    prompt = IDS[:, fed:] if fed < 29 else None
    assert stream.generate(prompt, max_new_tokens=9, num_beams=3, return_ids=True) == expected
    assert stream.tokens_seen == 38
    close(last(stream), logits_of(model, torch.tensor([ROW + expected]))[:, -1])


def test_beams_of_a_batch(lm2):
    prompts = [ROW[:4], ROW]
    found = lm2.stream(2).generate(prompts, max_new_tokens=7, num_beams=3, return_ids=True)
    for row, prompt in zip(found, prompts, strict=True):
        assert row == lm2.stream().generate(prompt, max_new_tokens=7, num_beams=3, return_ids=True)


def test_several_answers_and_the_stream_follows_the_first(model):
    stream = model.stream().feed(IDS)
    torch.manual_seed(3)
    rows = stream.generate(max_new_tokens=6, do_sample=True, num_return_sequences=3, top_k=0, return_ids=True)
    assert len(rows) == 3
    assert all(len(row) == 6 for row in rows)
    assert rows[0] != rows[1]
    assert stream.tokens_seen == 35
    close(last(stream), logits_of(model, torch.tensor([ROW + rows[0]]))[:, -1])
    beams = model.stream().generate(ROW, max_new_tokens=6, num_beams=4, num_return_sequences=2, return_ids=True)
    with torch.no_grad():
        assert beams == model.generate(IDS, max_new_tokens=6, num_beams=4, num_return_sequences=2)[:, 29:].tolist()


def test_a_generation_config_is_taken(lm2):
    config = lm2.generation_config.__class__(max_new_tokens=4, num_beams=3, pad_token_id=0)
    stream = lm2.stream()
    assert stream.generate(ROW, generation_config=config, return_ids=True) == lm2.stream().generate(
        ROW, max_new_tokens=4, num_beams=3, return_ids=True
    )
    assert stream.tokens_seen == 33


class Collector:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_tokens(lm2):
    streamer = Collector()
    found = lm2.stream().generate(ROW, max_new_tokens=5, streamer=streamer, return_ids=True)
    assert streamer.pieces == [ROW, *[[t] for t in found]]
    assert streamer.ended


@pytest.mark.parametrize("fed", [True, False])
def test_iterate_yields_the_text_of_generate(model, fed):
    tokenizer = word_tokenizer()
    expected = model.stream(tokenizer=tokenizer).generate(words(ROW), max_new_tokens=8)
    stream = model.stream(tokenizer=tokenizer)
    if fed:
        stream.feed(ROW)
    pieces = list(stream.iterate(None if fed else words(ROW), max_new_tokens=8))
    assert len(pieces) > 1
    assert "".join(pieces) == expected
    assert stream.tokens_seen == 37


def test_iterate_that_is_left_early_leaves_a_stream_to_go_on_with(lm2):
    stream = lm2.stream(tokenizer=word_tokenizer())
    pieces = stream.iterate(words(ROW), max_new_tokens=5000)
    next(pieces)
    pieces.close()
    count = stream.tokens_seen - 29
    # Nothing writes to it any more, and it did not have to generate everything first.
    assert 1 <= count < 5000
    history = torch.tensor([ROW + greedy(lm2, IDS, count)]) if count < 200 else None
    if history is not None:
        close(last(stream), logits_of(lm2, history)[:, -1])
    assert stream.tokens_seen - 29 == count


def test_iterate_hands_on_errors(lm2):
    with pytest.raises(InputError, match="Nothing to continue"):
        list(lm2.stream(tokenizer=word_tokenizer()).iterate(max_new_tokens=3))
    with pytest.raises(InputError, match="one row"):
        list(lm2.stream(2, tokenizer=word_tokenizer()).iterate(max_new_tokens=3))


def test_decoding_that_takes_tokens_back_is_refused(lm2):
    stream = lm2.stream().feed(ROW)
    with pytest.raises(UnsupportedError, match=r"prompt_lookup_num_tokens.*'lm2'"):
        stream.generate(max_new_tokens=3, prompt_lookup_num_tokens=2, return_ids=True)
    assert stream.generate(max_new_tokens=3, return_ids=True) == greedy(lm2, IDS, 3)


# What cannot be read


@pytest.mark.parametrize(
    "empty", ["", [], [[]], [""], torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long), iter([])]
)
def test_empty_input_is_refused(lm2, empty):
    stream = lm2.stream(tokenizer=word_tokenizer(bos=True))
    with pytest.raises(InputError, match=r"Empty input|Nothing to feed"):
        stream.feed(empty)
    assert stream.tokens_seen == 0


@pytest.mark.parametrize(
    "bad", [5, None, 1.5, [1.5], [None], [["w3"]], [[1.5]], [[None]], object(), {"input_ids": [3]}, iter([3, 4])]
)
def test_input_of_other_types_is_refused(lm2, bad):
    with pytest.raises(InputError, match=r"expected|rows"):
        lm2.stream(tokenizer=word_tokenizer()).feed(bad)


@pytest.mark.parametrize(
    "bad",
    [torch.ones(1, 4), torch.ones(1, 1, 4, dtype=torch.long), torch.tensor(3), torch.ones(1, 4, dtype=torch.bool)],
)
def test_tensors_of_other_shapes_and_dtypes_are_refused(lm2, bad):
    with pytest.raises(InputError, match=r"expected int64 ids"):
        lm2.stream().feed(bad)


def test_masks_must_fit(lm2):
    stream = lm2.stream()
    with pytest.raises(InputError, match=r"mask of shape \(1, 3\)"):
        stream.feed(IDS, attention_mask=torch.ones(1, 3))
    with pytest.raises(InputError, match="Empty input"):
        stream.feed(IDS, attention_mask=torch.zeros(1, 29))
    with pytest.raises(InputError, match="attention_mask"):
        stream.feed([ROW], attention_mask=torch.ones(1, 29))


def test_ids_outside_the_vocabulary_are_refused_before_anything_is_read(lm2):
    stream = lm2.stream()
    for bad in ([3, VOCABULARY], [-1, 3], torch.tensor([[3, 1000]])):
        with pytest.raises(InputError, match=f"expected 0 to {VOCABULARY - 1}"):
            stream.feed(bad)
        with pytest.raises(InputError, match=f"expected 0 to {VOCABULARY - 1}"):
            stream.generate(bad, max_new_tokens=2)
    assert stream.tokens_seen == 0


def test_the_number_of_rows_must_fit(lm2):
    tokenizer = word_tokenizer()
    for rows, bad in ((1, [ROW, ROW]), (2, ROW), (2, [ROW]), (2, "w3 w4"), (2, IDS), (2, ["w3"] * 3)):
        stream = lm2.stream(rows, tokenizer=tokenizer)
        with pytest.raises(InputError, match=f"rows for a stream of {rows}"):
            stream.feed(bad)
        with pytest.raises(InputError, match=f"rows for a stream of {rows}"):
            stream.generate(bad, max_new_tokens=2)
    with pytest.raises(InputError, match="batch_size=0"):
        lm2.stream(0)


def test_text_needs_a_tokenizer(lm2):
    stream = lm2.stream()
    with pytest.raises(InputError, match=r"no tokenizer.*tokenizer="):
        stream.feed("w3 w4")
    with pytest.raises(InputError, match="no tokenizer"):
        stream.generate("w3 w4", max_new_tokens=2)
    stream.feed(ROW)
    with pytest.raises(InputError, match="no tokenizer"):
        stream.generate(max_new_tokens=2)
    # The refused call has read and generated nothing.
    assert stream.tokens_seen == 29


def test_the_hosts_own_tokenizer_is_found(lm2, tmp_path):
    mnemic.save(lm2, tmp_path, whole=True)
    word_tokenizer().save_pretrained(tmp_path)
    stream = mnemic.load(tmp_path).stream()
    assert stream.generate(words(ROW), max_new_tokens=4) == words(greedy(lm2, IDS, 4))


def test_nothing_to_continue(lm2):
    with pytest.raises(InputError, match=r"Nothing to continue.*prompt"):
        lm2.stream().generate(max_new_tokens=2)


def test_a_missing_file_is_named(lm2, tmp_path):
    with pytest.raises(FileFormatError, match=r"nothing-here\.mnemic"):
        lm2.stream(load=tmp_path / "nothing-here.mnemic")
