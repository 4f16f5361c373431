"""Text in pieces: joined it is the whole text, up to the first stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemic.serving.text import AnswerText, Detokeniser, StopStrings
from tests.serving.tokenizers_for_tests import TEXTS, byte_fallback, byte_level

BYTES, FALLBACK = byte_level(), byte_fallback()
FIRST_BYTE = FALLBACK.convert_tokens_to_ids("<0x00>")
letters = st.text(alphabet="ab", max_size=30)


def pieces(tokenizer, ids):
    decoder = Detokeniser(tokenizer)
    return [decoder.add(i) for i in ids], decoder.end()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=60))
def test_pieces_of_any_tokens_join_to_the_whole(ids):
    parts, rest = pieces(BYTES, ids)
    assert "".join(parts) + rest == BYTES.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_characters_are_never_cut(text):
    ids = [*BYTES.encode(text), BYTES.eos_token_id]
    parts, rest = pieces(BYTES, ids)
    assert "".join(parts) + rest == text
    assert rest == "" or text.endswith("\N{REPLACEMENT CHARACTER}")
    assert all("\N{REPLACEMENT CHARACTER}" not in p for p in parts) or "\N{REPLACEMENT CHARACTER}" in text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["the", " ", "ä", "你", "🎉", " cat", "z"]), max_size=40))
def test_decoders_that_strip_the_first_space_and_fuse_bytes(words):
    text = "".join(words)
    ids = [
        i
        for c in text.replace(" ", "▁")
        for i in ([FALLBACK.convert_tokens_to_ids(c)] if c in "▁thecatz" else [FIRST_BYTE + b for b in c.encode()])
    ]
    parts, rest = pieces(FALLBACK, ids)
    assert "".join(parts) + rest == FALLBACK.decode(ids, skip_special_tokens=True) == text.removeprefix(" ")


def plain(text, stops):
    """Character by character: the text before the longest stop string at the first place where one is complete."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(st.lists(letters, max_size=12), st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4))
def test_stop_strings_cut_where_the_whole_text_would_be_cut(parts, stops):
    stopper, given_out = StopStrings(stops), ""
    expected, stop = plain("".join(parts), stops)
    for part in parts:
        given_out += stopper.add(part)
        # Nothing is given out that has to be taken back.
        assert expected.startswith(given_out)
    assert given_out + stopper.end() == expected
    assert stopper.found == stop


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet="aä你🎉 .", max_size=25),
    st.lists(st.text(alphabet="aä你🎉 .", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_over_borders_of_tokens_and_characters(text, stops):
    ids = BYTES.encode(text)
    answer, given_out = AnswerText(BYTES, stops), ""
    for i, token in enumerate(ids):
        given_out += answer.add(token, last=i == len(ids) - 1)
        if answer.stop is not None:
            break
    assert (given_out, answer.stop) == plain(text, stops)


def test_text_is_held_back_only_while_it_is_undecided():
    stopper = StopStrings(["\nUser:"])
    assert [stopper.add(p) for p in ("yes\n", "U", "ps", "\nUser", ": no", "more")] == ["yes", "", "\nUps", "", "", ""]
    assert stopper.found == "\nUser:"


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_early(text):
    ids = BYTES.encode(text)
    parts, rest = pieces(BYTES, ids)
    assert rest == ""
    if text.isascii():
        assert all(parts)


def test_without_a_tokenizer_there_is_no_text():
    assert AnswerText(None, ()).add(3, last=True) == ""
