"""Conversations: turns, replies, rows that wait, forks, files, and what is refused."""

import pytest
import torch

import mnemic
from mnemic import FileFormatError, InputError, StateError
from mnemic.core.files import read_file, write_file
from mnemic.hosts.conversation import Conversation
from mnemic.training import word_tokenizer
from tests.contract.encoder_decoders import SEGMENT, build, tiny_encoder_decoder
from tests.tiny import random_ids, tiny_host

FIRST, SECOND = random_ids(1, 6, seed=1), random_ids(1, 5, seed=2)


def ids_of(reply):
    return {"return_ids": True, "max_new_tokens": reply}


@pytest.mark.parametrize("memory, host", [("membart", "bart"), ("memformer", "t5")])
def test_turns_are_calls_that_hand_their_state_on(memory, host):
    model = build(memory, host)
    talk = model.conversation().turn(FIRST)
    reply = talk.generate(SECOND, **ids_of(4))
    with torch.no_grad():
        state = model.read(FIRST).memory_state
        expected = model.generate(SECOND, memory_state=state, max_new_tokens=4)
        after = model.read(SECOND, memory_state=state).memory_state
    assert reply == expected[0, 1:].tolist()
    assert talk.state.equal(after)
    assert talk.turns == 2
    # The reply itself was not read.
    assert talk.fork().turn(torch.tensor(reply)).turns == 3
    assert talk.turns == 2


def test_rows_wait_while_others_speak():
    model = build()
    talk = model.conversation(2).turn([[5, 6, 7], [8, 9]])
    before = talk.state
    talk.turn([[], [10, 11, 12]])
    assert talk.turns == [1, 2]
    name = model.memory.slots
    assert torch.equal(talk.state[name][0], before[name][0])
    alone = model.conversation().turn([8, 9]).turn([10, 11, 12])
    torch.testing.assert_close(talk.state[name][1], alone.state[name][0])
    left = model.conversation(2).turn(torch.tensor([[0, 5], [6, 7]]), attention_mask=torch.tensor([[0, 1], [1, 1]]))
    torch.testing.assert_close(left.state[name][0], model.conversation().turn([5]).state[name][0])


def test_forks_go_apart_and_reset_forgets():
    model = build()
    talk = model.conversation().turn(FIRST)
    twin = talk.fork().turn(SECOND)
    assert not twin.state.equal(talk.state)
    assert talk.turn(SECOND).state.equal(twin.state)
    assert twin.reset().turns == 0
    assert twin.turn(FIRST).state.equal(model.conversation().turn(FIRST).state)
    assert talk.turns == 2


def test_the_state_stays_as_large():
    model = build()
    talk = model.conversation()
    sizes = {talk.turn(random_ids(1, 2 + i, seed=i)).state_bytes for i in range(12)}
    assert sizes == {4 * 32 * 4}
    assert talk.turns == 12


def test_a_conversation_comes_back_from_its_file(tmp_path):
    model = build()
    talk = model.conversation(2).turn([[5, 6, 7], [8, 9]]).turn([[], [9]])
    talk.save(tmp_path / "talk")
    again = model.conversation(load=tmp_path / "talk")
    assert again.state.equal(talk.state)
    assert again.turns == [1, 2]
    turn = [[3, 4], [5]]
    assert again.generate(turn, num_beams=2, **ids_of(3)) == talk.generate(turn, num_beams=2, **ids_of(3))
    wide = Conversation.load(model.double(), tmp_path / "talk")
    assert wide.state[model.memory.slots].dtype == torch.float64


def test_files_of_others_are_refused(tmp_path):
    model = build()
    model.conversation().turn(FIRST).save(tmp_path / "talk")
    with pytest.raises(StateError, match="another memory"):
        build("memformer").conversation(load=tmp_path / "talk")
    other = build()
    with torch.no_grad():
        for parameter in other.memory.parameters():
            parameter.mul_(2)
    with pytest.raises(StateError, match="other weights of the memory"):
        other.conversation(load=tmp_path / "talk")
    mnemic.save_state(model, model.memory.initial_state(1), tmp_path / "state")
    with pytest.raises(FileFormatError, match="holds a mnemic state"):
        model.conversation(load=tmp_path / "state")
    header, tensors = read_file(tmp_path / "talk", "conversation")
    for turns in ([-1], [1, 2], 3, [0.5]):
        write_file(tmp_path / "odd", "conversation", {**header, "turns": turns}, tensors)
        with pytest.raises(FileFormatError, match="incomplete or inconsistent"):
            model.conversation(load=tmp_path / "odd")
    damaged = bytearray((tmp_path / "talk").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "talk").write_bytes(damaged)
    with pytest.raises(FileFormatError, match="checksum"):
        model.conversation(load=tmp_path / "talk")


def test_text_and_several_sequences():
    model = build()
    tokenizer = word_tokenizer(["the name is bob", "who is it"])
    talk = model.conversation(tokenizer=tokenizer).turn("the name is bob")
    reply = talk.generate("who is it", max_new_tokens=3)
    assert isinstance(reply, str)
    replies = talk.fork().generate("who is it", max_new_tokens=3, num_beams=3, num_return_sequences=2)
    assert len(replies) == 2
    sampled = talk.generate([3, 4], do_sample=True, return_dict_in_generate=True, **ids_of(3))
    assert len(sampled) == 3


def test_a_reply_ends_with_its_end_token():
    model = build()
    reply = model.conversation().generate(FIRST, **ids_of(5))
    model.generation_config.eos_token_id = reply[1]
    ended = model.conversation().generate(FIRST, **ids_of(5))
    assert ended == reply[: reply.index(reply[1]) + 1]


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([], "Empty input"),
        ([[], []], "Input of 2 rows for a conversation of 1"),
        ([999], "expected 0 to 60"),
        (torch.zeros(1, 3), "int64"),
        ("text", "This conversation has no tokenizer"),
        (3.5, "Cannot read input"),
    ],
)
def test_turns_that_cannot_be_read_are_refused(inputs, message):
    talk = build().conversation()
    with pytest.raises(InputError, match=message):
        talk.turn(inputs)
    assert talk.turns == 0


def test_conversations_need_an_encoder_decoder_with_memory():
    for host in (tiny_encoder_decoder(), mnemic.attach(tiny_host(), "rmt", segment=SEGMENT)):
        with pytest.raises(InputError, match="held with an encoder-decoder that has a memory"):
            Conversation(host)
    with pytest.raises(InputError, match="at least one row"):
        build().conversation(0)
    with pytest.raises(InputError, match="no tokenizer"):
        build().conversation().generate(FIRST)
