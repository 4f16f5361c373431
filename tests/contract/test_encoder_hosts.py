"""The contract on encoders: rows, padding, cuts, gradients, files, detaching, and what is refused."""

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertForQuestionAnswering, BertModel, Trainer, TrainingArguments

import mnemic
from mnemic import ConfigError, HostError, InputError, StateError, Truncation, UnsupportedError
from mnemic.hosts.encoder_step import encode_segment
from mnemic.training import MemoryTrainer
from tests.contract.cases import assert_states_close, checkpointing
from tests.contract.encoders import CLASSES, CLS, MEMORIES, SEGMENT, SEP, build, pairs, tiny_encoder
from tests.tiny import random_ids, tiny_host

LENGTH = 3 * SEGMENT + 5


def close(got, expected, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=atol)


@pairs
def test_two_calls_are_one_call_cut_at_the_same_place(memory, host):
    model, ids = build(memory, host, "token"), random_ids(2, LENGTH)
    cut = LENGTH - 2 * SEGMENT
    with torch.no_grad():
        whole = model(ids)
        first = model(ids[:, :cut])
        rest = model(ids[:, cut:], memory_state=first.memory_state)
    close(torch.cat([first.logits, rest.logits], 1), whole.logits)
    assert_states_close(rest.memory_state, whole.memory_state, 1e-5)


@pairs
@pytest.mark.parametrize("head", ["text", "token"])
def test_rows_and_padding_change_nothing(memory, host, head):
    model, ids, lengths = build(memory, host, head), random_ids(4, LENGTH), [LENGTH, 3, SEGMENT, 2 * SEGMENT + 1]
    left, right = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        left[row, LENGTH - length :] = right[row, :length] = 1
    shifted = torch.stack([row.roll(-(LENGTH - n)) for row, n in zip(ids, lengths, strict=True)])
    with torch.no_grad():
        padded = model(ids, attention_mask=left)
        behind = model(shifted, attention_mask=right)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, LENGTH - length :])
            if head == "text":
                close(padded.logits[row], alone.logits[0])
                close(behind.logits[row], alone.logits[0])
            else:
                close(padded.logits[row, LENGTH - length :], alone.logits[0])
                close(behind.logits[row, :length], alone.logits[0])
                assert not padded.logits[row, : LENGTH - length].any()
            close(padded.memory_state.select([row])[_first(model)], alone.memory_state[_first(model)])
            close(behind.memory_state.select([row])[_first(model)], alone.memory_state[_first(model)])


def _first(model) -> str:
    return next(iter(model.memory.initial_state(1)))


@pairs
def test_a_later_segment_changes_nothing_before_it(memory, host):
    model, ids = build(memory, host, "token"), random_ids(1, 3 * SEGMENT)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 50 + 3
    with torch.no_grad():
        difference = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    assert not difference[: 2 * SEGMENT].any()
    assert bool((difference[2 * SEGMENT :] > 0).all())


@pairs
def test_an_earlier_segment_reaches_the_answer(memory, host):
    model, ids = build(memory, host), random_ids(1, 4 * SEGMENT)
    other = ids.clone()
    other[0, 1] = (ids[0, 1] + 1) % 50 + 3
    with torch.no_grad():
        assert float((model(ids).logits - model(other).logits).abs().max()) > 1e-7


@pairs
def test_rows_without_text_keep_their_state_bit_for_bit(memory, host):
    model, ids = build(memory, host), random_ids(3, SEGMENT)
    with torch.no_grad():
        state = model(random_ids(3, 2 * SEGMENT, seed=3)).memory_state
        real = torch.ones(3, SEGMENT, dtype=torch.bool)
        real[1] = False
        embeds = model.get_input_embeddings()(ids)
        after = encode_segment(model.memory, state, model.mnemic.access, model.mnemic.stack, embeds, real).state
    # An archive has room for one more; row 1 has used none of it.
    kept = {n: t[:, : state[n].shape[1]] if n == "archive" else t for n, t in after.items()}
    assert all(torch.equal(kept[n][1], t[1]) for n, t in state.items())
    assert not torch.equal(after[_first(model)][0], state[_first(model)][0])


@pairs
def test_gradients_reach_the_first_state_and_the_first_segment(memory, host):
    model = build(memory, host)
    embeds = model.get_input_embeddings()(random_ids(2, LENGTH)).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=torch.tensor([0, 1])).loss.backward()
    assert bool(embeds.grad[:, :5].any(-1).all())
    assert [n for n, p in model.memory.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_truncation_gives_exact_zeros(depth):
    model = build("rmt_1m")
    embeds = torch.randn(2, 4 * SEGMENT, 32, requires_grad=True)
    mask = torch.ones(2, 4 * SEGMENT, dtype=torch.long)
    mask[1, :SEGMENT] = 0
    model(inputs_embeds=embeds, attention_mask=mask, truncation=Truncation("tail", depth)).logits.pow(
        2
    ).sum().backward()
    assert embeds.grad is not None
    reached = [[bool(part.any()) for part in row.split(SEGMENT)] for row in embeds.grad]
    assert reached == [[s >= 3 - depth for s in range(4)]] * 2


@pytest.mark.parametrize("head", ["text", "token", "vocabulary"])
def test_the_loss_is_the_hosts_own(head):
    model, ids = build("rmt_1m", "bert", head), random_ids(3, LENGTH)
    shape, classes = ((3,), CLASSES) if head == "text" else ((3, LENGTH), CLASSES if head == "token" else 61)
    labels = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(0))
    if head != "text":
        # A whole segment and most of a row without labels.
        labels[:, SEGMENT : 2 * SEGMENT], labels[1, 3:] = -100, -100
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, -2), labels.flatten())
    close(output.loss, expected)


def test_special_tokens_of_a_tokenizer_are_not_read_as_text():
    model, ids = build("rmt_1m", "bert", "token"), random_ids(2, LENGTH)
    ends = [torch.full((2, 1), token) for token in (CLS, SEP)]
    with torch.no_grad():
        bare, dressed = model(ids), model(torch.cat([ends[0], ids, ends[1]], 1))
        ragged = torch.cat([ends[0], ids, ends[1], torch.zeros(2, 4, dtype=torch.long)], 1)
        padded = model(ragged, attention_mask=(ragged != 0).long())
    close(dressed.logits[:, 1:-1], bare.logits)
    close(padded.logits[:, 1 : LENGTH + 1], bare.logits)
    assert not dressed.logits[:, [0, -1]].any()


def test_embeddings_and_ids_give_the_same():
    model, ids = build("rmt_1m"), random_ids(2, LENGTH)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(inputs_embeds=model.get_input_embeddings()(ids)).logits)


def test_a_reset_row_starts_anew():
    model, ids = build("rmt_1m"), random_ids(2, LENGTH)
    with torch.no_grad():
        state = model(random_ids(2, LENGTH, seed=1)).memory_state
        mixed = model(ids, memory_state=state, memory_reset=torch.tensor([True, False])).logits
        close(mixed[0], model(ids).logits[0])
        close(mixed[1], model(ids, memory_state=state).logits[1])


def test_memformer_leaves_the_host_as_it_was_at_first():
    host, ids = tiny_encoder("bert"), random_ids(2, SEGMENT)
    with torch.no_grad():
        expected = host(ids).logits
        model = mnemic.attach(host, "memformer", segment=SEGMENT, num_slots=4)
        assert torch.equal(model(ids).logits, expected)


@pairs
def test_whole_models_and_adapters_come_back_exactly(memory, host, tmp_path):
    model, ids = build(memory, host), random_ids(2, LENGTH)
    with torch.no_grad():
        expected = model(ids)
    mnemic.save(model, tmp_path / "whole", whole=True)
    mnemic.save(model, tmp_path / "adapter")
    again = mnemic.load(tmp_path / "whole")
    adapted = mnemic.load(tmp_path / "adapter", host=tiny_encoder(host))
    for loaded in (again, adapted):
        assert type(loaded).__name__ == type(model).__name__
        with torch.no_grad():
            output = loaded.eval()(ids)
        assert torch.equal(output.logits, expected.logits)
        assert output.memory_state.equal(expected.memory_state)


def test_a_state_comes_back_from_its_file(tmp_path):
    for memory in ("rmt_1m", "rmt_1m_retrieve"):
        model, ids = build(memory), random_ids(1, LENGTH)
        with torch.no_grad():
            state = model(ids).memory_state
        mnemic.save_state(model, state, tmp_path / memory)
        assert mnemic.load_state(model, tmp_path / memory).equal(state)


@pairs
def test_detaching_gives_the_host_back(memory, host):
    model, ids = tiny_encoder(host), random_ids(2, LENGTH)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
        name, options = MEMORIES[memory]
        mnemic.attach(model, name, segment=SEGMENT, **options)(ids)
        mnemic.detach(model)
        assert torch.equal(model(ids).logits, expected)
    assert set(vars(model)) == set(vars(tiny_encoder(host)))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


@pairs
def test_float64(memory, host):
    torch.set_default_dtype(torch.float64)
    try:
        model, ids = build(memory, host, "token"), random_ids(2, LENGTH)
        with torch.no_grad():
            output, alone = model(ids), model(ids[1:])
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.logits.dtype == output.memory_state[_first(model)].dtype == torch.float64
    torch.testing.assert_close(output.logits[1:], alone.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Trainer, MemoryTrainer], ids=lambda kind: kind.__name__)
def test_it_is_trained(kind, tmp_path):
    model = build("rmt_1m").train()
    before = model.memory.first_tokens.detach().clone()
    data = [{"input_ids": row, "labels": i % CLASSES} for i, row in enumerate(random_ids(4, LENGTH))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        disable_tqdm=True, use_cpu=True, learning_rate=1e-2,
    )  # fmt: skip
    result = kind(model, arguments, train_dataset=data).train()
    # Of batches of two, accumulated: the loss is theirs, not doubled.
    assert 0.2 < result.training_loss < 4
    assert not torch.equal(model.memory.first_tokens, before)


def test_diagnostics_are_means_over_the_segments():
    model, found = build("memformer"), []
    output = model(random_ids(2, LENGTH), memory_diagnostics=True, memory_sink=found.append)
    assert set(output.memory_diagnostics) == {"block1/kept", "block1/turned"}
    assert found[0] is output


def test_activation_checkpointing_gives_the_same_gradients():
    found = []
    for enabled in (False, True):
        model = build("memformer").train()
        if enabled:
            checkpointing(model, use_reentrant=False)
        model(random_ids(2, LENGTH), labels=torch.tensor([0, 1])).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


# What is refused


def bert(cls):
    return lambda: cls(BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ))  # fmt: skip


@pytest.mark.parametrize(
    "host, memory, options, error, message",
    [
        (tiny_encoder, "lm2", {}, HostError, r"BertFor.* 'lm2' stands, but of the kind 'encoder'.*memformer.*rmt-1m"),
        (tiny_encoder, ["rmt-1m", "lm2"], {}, HostError, "of the kind 'encoder'"),
        (tiny_host, "membart", {}, HostError, r"'membart' stands, but of the kind 'decoder'"),
        (tiny_encoder, "rmt-1m", {"segment": 60}, ConfigError, r"needs 70 positions, but .* has 64; use segment=54"),
        (tiny_encoder, "rmt-1m", {"segment": 0}, ConfigError, "at least 1"),
        (tiny_encoder, "rmt-1m", {"sep_id": 61}, ConfigError, "special token 61 is none of the host's 61 tokens"),
        (bert(BertModel), "rmt-1m", {}, HostError, "BertModel"),
        (bert(BertForPreTraining), "rmt-1m", {}, HostError, "prediction_logits.*ForSequenceClassification"),
        (bert(BertForQuestionAnswering), "rmt-1m", {}, HostError, "start_logits.*ForTokenClassification"),
    ],
)
def test_hosts_and_settings_that_do_not_fit_are_refused(host, memory, options, error, message):
    model = host()
    with pytest.raises(error, match=message):
        mnemic.attach(model, memory, **options)
    assert not mnemic.is_attached(model)
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


def test_a_second_memory_is_refused():
    with pytest.raises(HostError, match="already has the memory 'rmt-1m'"):
        mnemic.attach(build("rmt_1m"), "rmt-1m")


IDS = random_ids(2, LENGTH)
EMPTY = torch.ones_like(IDS)
EMPTY[1] = 0


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({}, InputError, "either input_ids or inputs_embeds"),
        ({"input_ids": IDS[0]}, InputError, r"expected \(batch, tokens\)"),
        ({"input_ids": IDS.float()}, InputError, "int64"),
        ({"input_ids": IDS + 61}, InputError, "expected 0 to 60"),
        ({"inputs_embeds": torch.zeros(2, 5, 31)}, InputError, "width 31"),
        ({"input_ids": IDS, "attention_mask": EMPTY[:, 1:]}, InputError, "attention_mask of shape"),
        ({"input_ids": IDS, "attention_mask": EMPTY}, InputError, r"Rows \[1\] have no text"),
        ({"input_ids": torch.tensor([[CLS, SEP], [3, 4]])}, InputError, r"Rows \[0\] have no text"),
        ({"input_ids": IDS, "token_type_ids": EMPTY}, InputError, "second part"),
        ({"input_ids": IDS, "output_hidden_states": True}, UnsupportedError, "forward hook"),
        ({"input_ids": IDS, "replay": True}, UnsupportedError, "causal language models"),
        ({"input_ids": IDS, "memory_reset": torch.tensor([True, False])}, InputError, "memory_reset"),
        ({"input_ids": IDS, "memory_state": mnemic.State({"bank": torch.zeros(2, 3)})}, StateError, "bank"),
    ],
)
def test_input_that_cannot_be_read_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        build("rmt_1m")(**given)


def test_states_of_other_batches_and_labels_of_other_shapes_are_refused():
    model = build("rmt_1m")
    with pytest.raises(InputError, match="memory_state has 3 rows, the input 2"):
        model(IDS, memory_state=model.memory.initial_state(3))
    with pytest.raises(InputError, match="expected one a token"):
        build("rmt_1m", head="token")(IDS, labels=torch.zeros(2, 3, dtype=torch.long))
    grown = build("rmt_1m_retrieve")
    with pytest.raises(UnsupportedError, match="grows"):
        grown(IDS, memory_state=grown(IDS).memory_state, memory_reset=torch.tensor([True, False]))
    with pytest.raises(StateError, match="archive"):
        grown(IDS, memory_state=model(IDS).memory_state)


def test_a_causal_stack_is_no_encoder():
    from mnemic.hosts import encoder_attach
    from mnemic.hosts.anatomy import Anatomy

    host: Any = tiny_host("gpt2")
    anatomy = Anatomy(tuple(host.transformer.h), host.transformer, 128, True)
    with pytest.raises(HostError, match="left to right only"):
        encoder_attach.check_host(host, anatomy)
