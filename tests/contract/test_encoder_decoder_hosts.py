"""The contract on encoder-decoders: rows, padding, turns, decoding, gradients, files, and what is refused."""

from typing import Any

import peft
import pytest
import torch
from transformers import BartForSequenceClassification, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.modeling_outputs import BaseModelOutput

import mnemic
from mnemic import ConfigError, HostError, InputError, StateError, UnsupportedError, memory_config
from tests.contract.cases import assert_states_close, checkpointing
from tests.contract.encoder_decoders import HOSTS, MEMORIES, SEGMENT, build, pairs, tiny_encoder_decoder
from tests.tiny import random_ids, tiny_host

TURNS = [random_ids(3, SEGMENT, seed=i) for i in range(3)]
REPLY = random_ids(3, 5, seed=9)


def close(got, expected, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=atol)


def slots_of(model) -> str:
    return next(iter(model.memory.initial_state(1)))


def reset_slots(state):
    return next(iter(state.values()))


@pytest.mark.parametrize("host", HOSTS)
def test_without_slots_or_at_first_the_host_is_unchanged(host):
    """membart without slots, memformer as it is attached."""
    ids, cases = TURNS[0], [("memformer", {"num_slots": 4})] + [("membart", {"num_slots": 0})] * (host != "t5")
    for memory, options in cases:
        model = tiny_encoder_decoder(host)
        with torch.no_grad():
            expected = model(ids, labels=REPLY)
            mnemic.attach(model, memory, segment=SEGMENT, **options)
            assert model.memory.identity_at_attach
            got = model(ids, labels=REPLY)
            later = model(ids, labels=REPLY, memory_state=got.memory_state)
        close(got.logits, expected.logits, 1e-6)
        close(got.loss, expected.loss, 1e-6)
        close(later.logits, expected.logits, 1e-6)


@pairs
def test_a_long_turn_is_the_turns_that_it_is_cut_into(memory, host):
    model = build(memory, host)
    long = random_ids(2, 2 * SEGMENT + 3)
    with torch.no_grad():
        whole = model(long, labels=REPLY[:2])
        first = model.read(long[:, :3])
        second = model.read(long[:, 3 : 3 + SEGMENT], memory_state=first.memory_state)
        last = model(long[:, 3 + SEGMENT :], labels=REPLY[:2], memory_state=second.memory_state)
    close(last.logits, whole.logits)
    assert_states_close(last.memory_state, whole.memory_state, 1e-5)


@pairs
def test_rows_and_padding_change_nothing(memory, host):
    model, lengths = build(memory, host), [SEGMENT, 3, 2 * SEGMENT + 1]
    ids = random_ids(3, max(lengths))
    left, right = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        left[row, -length:] = right[row, :length] = 1
    shifted = torch.stack([row.roll(max(lengths) - n) for row, n in zip(ids, lengths, strict=True)])
    with torch.no_grad():
        before = model.read(TURNS[0]).memory_state
        behind = model(ids, attention_mask=right, labels=REPLY, memory_state=before)
        ahead = model(shifted, attention_mask=left, labels=REPLY, memory_state=before)
        for row, length in enumerate(lengths):
            one = slice(row, row + 1)
            alone = model(ids[one, :length], labels=REPLY[one], memory_state=before.select([row]))
            for padded in (behind, ahead):
                close(padded.logits[one], alone.logits)
                assert_states_close(padded.memory_state.select([row]), alone.memory_state, 1e-5)


@pairs
def test_earlier_turns_reach_the_reply_and_later_ones_do_not(memory, host):
    model = build(memory, host)
    other = TURNS[0].clone()
    other[0, 1] = (other[0, 1] + 1) % 50 + 3
    with torch.no_grad():
        first, changed = (model(ids, labels=REPLY) for ids in (TURNS[0], other))
        second, moved = (model(TURNS[1], labels=REPLY, memory_state=o.memory_state) for o in (first, changed))
    assert float((second.logits[0] - moved.logits[0]).abs().max()) > 1e-6
    close(second.logits[1:], moved.logits[1:], 1e-6)


@pairs
def test_rows_without_tokens_keep_their_state_bit_for_bit(memory, host):
    model = build(memory, host)
    mask = torch.ones_like(TURNS[1])
    mask[1] = 0
    with torch.no_grad():
        before = model.read(TURNS[0]).memory_state
        output = model(TURNS[1], attention_mask=mask, labels=REPLY, memory_state=before)
    name = slots_of(model)
    assert torch.equal(output.memory_state[name][1], before[name][1])
    assert not torch.equal(output.memory_state[name][0], before[name][0])
    assert bool(output.logits.isfinite().all())


@pairs
def test_reset_rows_are_in_their_first_turn(memory, host):
    model = build(memory, host)
    with torch.no_grad():
        before = model.read(TURNS[0]).memory_state
        mixed = model(TURNS[1], labels=REPLY, memory_state=before, memory_reset=torch.tensor([True, False, False]))
        fresh, carried = model(TURNS[1], labels=REPLY), model(TURNS[1], labels=REPLY, memory_state=before)
    assert torch.equal(mixed.logits[0], fresh.logits[0])
    assert torch.equal(mixed.logits[1:], carried.logits[1:])


@pairs
def test_the_state_comes_back_whatever_is_given(memory, host):
    model, start = build(memory, host), torch.full((3, 1), 2)
    with torch.no_grad():
        turn = model.read(TURNS[0])
        whole = model(TURNS[0], decoder_input_ids=start)
        read = model(encoder_outputs=turn, decoder_input_ids=start)
        # The mask of the text alone is too short for what the decoder reads; the turn brings its own.
        masked = model(encoder_outputs=turn, attention_mask=torch.ones_like(TURNS[0]), decoder_input_ids=start)
        found = model(TURNS[0], decoder_input_ids=start, return_dict=False)
        embedded = model(inputs_embeds=turn.last_hidden_state, decoder_input_ids=start)
    for output in (whole, read, masked):
        assert output.memory_state.equal(turn.memory_state)
        assert torch.equal(output.logits, whole.logits)
    assert torch.equal(found[0], whole.logits)
    assert embedded.memory_state is not None


def greedy(model, ids, state, steps: int):
    """By the whole forward at every step."""
    start = model.generation_config.decoder_start_token_id
    tokens = torch.full((len(ids), 1), start)
    for _ in range(steps):
        logits = model(ids, decoder_input_ids=tokens, memory_state=state, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


@pairs
def test_greedy_generation_takes_the_best_token_of_the_forward(memory, host):
    model = build(memory, host)
    model.generation_config.forced_eos_token_id = None
    mask = torch.ones_like(TURNS[1])
    mask[1, :3] = 0
    with torch.no_grad():
        state = model.read(TURNS[0]).memory_state
        expected = greedy(model, TURNS[1], state, 6)
        got = model.generate(TURNS[1], memory_state=state, max_new_tokens=6, do_sample=False)
        padded = model.generate(
            input_ids=TURNS[1], attention_mask=mask, memory_state=state, max_new_tokens=6, return_dict_in_generate=True
        )
        alone = model.generate(TURNS[1][1:2, 3:], memory_state=state.select([1]), max_new_tokens=6)
        again = model.read(TURNS[1], mask, memory_state=state)
    assert torch.equal(got, expected)
    assert torch.equal(padded.sequences[1:2], alone)
    assert padded.memory_state.equal(again.memory_state)


@pairs
def test_beams_and_samples(memory, host):
    model = build(memory, host)
    options = {"max_new_tokens": 5, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        state = model.read(TURNS[0]).memory_state
        beams = model.generate(TURNS[1], memory_state=state, num_return_sequences=2, **options)
        for row in range(3):
            one = model.generate(TURNS[1][row : row + 1], memory_state=state.select([row]), **options)
            assert torch.equal(beams.sequences[2 * row : 2 * row + 1, : one.sequences.shape[1]], one.sequences)
            close(beams.sequences_scores[2 * row], one.sequences_scores[0])
        assert beams.memory_state.batch_size == 3
        torch.manual_seed(0)
        first = model.generate(TURNS[1], memory_state=state, do_sample=True, max_new_tokens=5)
        torch.manual_seed(0)
        second = model.generate(
            encoder_outputs=model.read(TURNS[1], memory_state=state), do_sample=True, max_new_tokens=5
        )
        processed = model.generate(TURNS[1], memory_state=state, max_new_tokens=5, encoder_no_repeat_ngram_size=1)
    assert torch.equal(first, second)
    assert not any(set(row[1:].tolist()) & set(turn.tolist()) for row, turn in zip(processed, TURNS[1], strict=True))


@pairs
def test_gradients_reach_the_first_state_through_turns(memory, host):
    model = build(memory, host)
    name = slots_of(model)
    first = model.memory.initial_state(3)
    start = mnemic.State({name: first[name].detach().clone().requires_grad_()})
    state = start
    for ids in TURNS[:2]:
        state = model.read(ids, memory_state=state).memory_state
    model(TURNS[2], labels=REPLY, memory_state=state).loss.backward()
    gradient = start[name].grad
    assert gradient is not None
    assert bool((gradient.abs().amax((1, 2)) > 0).all())
    unused = [n for n, p in model.memory.named_parameters() if p.grad is None or not bool(p.grad.any())]
    # A key's bias moves all scores of a query alike, unless the query's own slot has another key.
    assert [n for n in unused if "key.bias" not in n] == []


@pairs
def test_whole_models_and_adapters_come_back_exactly(memory, host, tmp_path):
    model = build(memory, host)
    with torch.no_grad():
        expected = model(TURNS[0], labels=REPLY)
    mnemic.save(model, tmp_path / "whole", whole=True)
    mnemic.save(model, tmp_path / "adapter")
    mnemic.save_state(model, expected.memory_state, tmp_path / "state")
    again = mnemic.load(tmp_path / "whole")
    adapted = mnemic.load(tmp_path / "adapter", host=tiny_encoder_decoder(host))
    for loaded in (again, adapted):
        assert type(loaded).__name__ == type(model).__name__
        with torch.no_grad():
            output = loaded.eval()(TURNS[0], labels=REPLY)
        assert torch.equal(output.logits, expected.logits)
        assert output.memory_state.equal(expected.memory_state)
        assert mnemic.load_state(loaded, tmp_path / "state").equal(expected.memory_state)


@pairs
def test_detaching_gives_the_host_back(memory, host):
    model = tiny_encoder_decoder(host)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    name, options = MEMORIES[memory]
    with torch.no_grad():
        expected = model(TURNS[0], labels=REPLY).logits
        mnemic.attach(model, name, segment=SEGMENT, **options)(TURNS[0], labels=REPLY)
        assert mnemic.is_attached(model)
        mnemic.detach(model)
        assert torch.equal(model(TURNS[0], labels=REPLY).logits, expected)
    fresh = tiny_encoder_decoder(host)
    assert type(model) is type(fresh)
    assert set(vars(model)) == set(vars(fresh))
    assert model.config._attn_implementation == fresh.config._attn_implementation
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


@pairs
def test_float64_and_eager_attention(memory, host):
    with torch.no_grad():
        expected = build(memory, host)(TURNS[0], labels=REPLY)
        state = expected.memory_state
        mask = torch.ones_like(TURNS[1])
        mask[0, :2] = 0
        expected = build(memory, host)(TURNS[1], mask, labels=REPLY, memory_state=state)
        eager = build(memory, host, attn_implementation="eager")(TURNS[1], mask, labels=REPLY, memory_state=state)
        close(eager.logits, expected.logits)
        torch.set_default_dtype(torch.float64)
        try:
            model = build(memory, host)
            output = model(TURNS[0], labels=REPLY)
            alone = model(TURNS[0][1:2], labels=REPLY[1:2])
        finally:
            torch.set_default_dtype(torch.float32)
    assert output.logits.dtype == reset_slots(output.memory_state).dtype == torch.float64
    torch.testing.assert_close(output.logits[1:2], alone.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory, host", [("membart", "bart"), ("membart", "pegasus"), ("memformer", "t5")])
def test_activation_checkpointing_gives_the_same_gradients(memory, host):
    found = []
    for enabled in (False, True):
        model = build(memory, host).train()
        if enabled:
            checkpointing(model, use_reentrant=False)
        state = model.read(TURNS[0]).memory_state
        model(TURNS[1], labels=REPLY, memory_state=state).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_trainer_of_transformers_trains_it(tmp_path):
    model = build().train()
    before = model.memory.bias.detach().clone()
    data: Any = [{"input_ids": ids, "labels": REPLY[i]} for i, ids in enumerate(TURNS[0])]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        disable_tqdm=True, use_cpu=True, learning_rate=1e-2,
    )  # fmt: skip
    result = Seq2SeqTrainer(model, arguments, train_dataset=data).train()
    assert 0 < result.training_loss < 10
    assert not torch.equal(model.memory.bias, before)


def test_a_stack_of_both_is_the_first_while_the_second_changes_nothing():
    stack, alone = tiny_encoder_decoder(), tiny_encoder_decoder()
    mnemic.attach(alone, "membart", segment=SEGMENT, num_slots=3)
    mnemic.attach(stack, [memory_config("membart", num_slots=3), "memformer:attach"], segment=SEGMENT)
    stack.memory.members["membart"].load_state_dict(alone.memory.state_dict())
    with torch.no_grad():
        before, first = stack.read(TURNS[0]).memory_state, alone.read(TURNS[0]).memory_state
        got = stack(TURNS[1], labels=REPLY, memory_state=before)
        expected = alone(TURNS[1], labels=REPLY, memory_state=first)
    close(got.logits, expected.logits)
    assert set(got.memory_state) == {"membart/1/slots", "memformer/slots"}


def test_lora_trains_beside_the_memory_and_is_saved_with_it(tmp_path):
    model = build()
    wrapped = mnemic.add_lora(model, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "v_proj"]))
    state = model.read(TURNS[0]).memory_state
    wrapped(input_ids=TURNS[1], labels=REPLY, memory_state=state).loss.backward()
    assert all(p.grad is not None for p in model.memory.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        expected = wrapped.eval()(input_ids=TURNS[1], labels=REPLY, memory_state=state.detach())
        mnemic.save(wrapped, tmp_path)
        again = mnemic.load(tmp_path, host=tiny_encoder_decoder()).eval()
        got = again(input_ids=TURNS[1], labels=REPLY, memory_state=state.detach())
    assert torch.equal(got.logits, expected.logits)
    assert not torch.equal(got.logits, build()(TURNS[1], labels=REPLY, memory_state=state.detach()).logits)


def test_a_config_builds_the_host():
    model = mnemic.attach(tiny_encoder_decoder().config, "membart", num_slots=2, segment=SEGMENT)
    assert type(model).__name__ == "BartForConditionalGeneration"
    assert model(TURNS[0], labels=REPLY).memory_state[model.memory.slots].shape == (3, 2, 32)


# What is refused


def classifier():
    return BartForSequenceClassification(tiny_encoder_decoder().config)


def dropping():
    return tiny_encoder_decoder(encoder_layerdrop=0.1)


@pytest.mark.parametrize(
    "host, memory, options, error, message",
    [
        (tiny_encoder_decoder, "lm2", {}, HostError, r"'lm2' stands, but of the kind 'encoder-decoder'.*membart"),
        (tiny_encoder_decoder, "rmt-1m", {}, HostError, "of the kind 'encoder-decoder'"),
        (tiny_encoder_decoder, ["membart", "lm2"], {}, HostError, "'lm2' stands, but of the kind 'encoder-decoder'"),
        (tiny_host, "membart", {}, HostError, "of the kind 'decoder'"),
        (lambda: tiny_encoder_decoder("t5"), "membart", {}, HostError, r"no self_attn.q_proj.*BART.*memformer.*T5"),
        (classifier, "membart", {}, HostError, "no vocabulary head"),
        (dropping, "membart", {}, HostError, "LayerDrop 0.1.*encoder_layerdrop=0"),
        (tiny_encoder_decoder, "membart", {"segment": 65}, ConfigError, "65 positions, but .* has 64; use segment=64"),
        (tiny_encoder_decoder, "membart", {"segment": 0}, ConfigError, "at least 1"),
        (tiny_encoder_decoder, "membart", {"num_slots": -1}, ConfigError, "num_slots = -1"),
    ],
)  # fmt: skip
def test_hosts_and_settings_that_do_not_fit_are_refused(host, memory, options, error, message):
    model = host()
    with pytest.raises(error, match=message):
        mnemic.attach(model, memory, **options)
    assert not mnemic.is_attached(model)
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


IDS = TURNS[0]


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({}, InputError, "either input_ids or inputs_embeds"),
        ({"input_ids": IDS[0]}, InputError, r"expected \(batch, tokens\)"),
        ({"input_ids": IDS.float()}, InputError, "int64"),
        ({"input_ids": IDS + 61}, InputError, "expected 0 to 60"),
        ({"inputs_embeds": torch.zeros(3, 5, 31)}, InputError, "width 31"),
        ({"input_ids": IDS, "attention_mask": torch.ones(3, 2)}, InputError, "attention_mask of shape"),
        ({"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}, InputError, "Every row"),
        ({"input_ids": IDS, "memory_reset": torch.tensor([True, False, True])}, InputError, "memory_reset"),
        ({"input_ids": IDS, "memory_state": mnemic.State({"bank": torch.zeros(3, 3)})}, StateError, "bank"),
        ({"encoder_outputs": BaseModelOutput(torch.zeros(3, 5, 32))}, InputError, r"what read\(\) returned"),
        ({"input_ids": IDS, "output_attentions": True}, UnsupportedError, "output_attentions"),
    ],
)
def test_input_that_cannot_be_read_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        build()(**given, labels=REPLY)


def test_states_that_do_not_fit_are_refused():
    model = build()
    with pytest.raises(InputError, match="memory_state has 2 rows, the input 3"):
        model(IDS, labels=REPLY, memory_state=model.memory.initial_state(2))
    with pytest.raises(InputError, match="carry their state"):
        model(encoder_outputs=model.read(IDS), labels=REPLY, memory_state=model.memory.initial_state(3))
    with pytest.raises(HostError, match="already has the memory 'membart'"):
        mnemic.attach(model, "membart")
