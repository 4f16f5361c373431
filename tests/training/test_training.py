"""Training: how samples get their segments, what the collator asks for, and what the trainer adds to transformers'."""

from itertools import islice
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import mnemic
from mnemic.training import Collator, MemoryTrainer, SegmentLaw, TextExamples, answer_example, word_tokenizer
from tests.tiny import random_ids, tiny_host


def test_law_draws_once_a_batch_and_follows_the_stages():
    law = SegmentLaw(least=2, most=(2, 5), batch=4, stage_batches=3)
    drawn = list(islice(law.draw(seed=1), 4 * 203))
    batches = [drawn[i : i + 4] for i in range(0, len(drawn), 4)]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert [batch[0] for batch in batches[:3]] == [2, 2, 2]
    later = [batch[0] for batch in batches[3:]]
    assert {2, 3, 4, 5} == set(later)
    assert drawn == list(islice(law.draw(seed=1), 4 * 203))


@pytest.mark.parametrize("least, most", [(0, (4,)), (3, (2,)), (1, ())])
def test_law_refuses(least: int, most: tuple[int, ...]):
    with pytest.raises(mnemic.ConfigError, match="least"):
        SegmentLaw(least, most, batch=1)


def test_collator_pads_and_asks_only_for_logits_with_a_loss():
    batch = Collator(pad_id=9)([answer_example([5, 6, 7], [8]), answer_example([5], [6, 7])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 7, 9]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8], [-100, 6, 7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    # The first label is at column 1, predicted at column 0: all four are needed.
    assert batch["logits_to_keep"] == 4
    model = mnemic.attach(tiny_host(), "none", segment=8)
    whole = model(**{k: v for k, v in batch.items() if k != "logits_to_keep"}, use_cache=False).loss
    torch.testing.assert_close(model(**batch, use_cache=False).loss, whole)


def test_fewer_logits_give_the_same_loss():
    model = mnemic.attach(tiny_host(), "lm2", segment=8, preset="default", num_slots=4)
    batch = Collator()([answer_example(random_ids(20, seed=i).tolist(), [7, 2]) for i in range(3)])
    assert batch["logits_to_keep"] == 3
    whole = model(**{k: v for k, v in batch.items() if k != "logits_to_keep"}, use_cache=False).loss
    torch.testing.assert_close(model(**batch, use_cache=False).loss, whole)


def test_text_examples_are_whole_segments_of_documents():
    documents = [list(range(100)), [1, 2, 3]]
    examples = TextExamples(documents, segment=8, law=SegmentLaw(1, (3,), batch=2))
    for example in islice(examples, 20):
        ids = example["input_ids"]
        assert len(ids) % 8 == 0
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert example["labels"] == ids
    with pytest.raises(mnemic.InputError, match="one segment"):
        TextExamples([[1, 2]], segment=8, law=SegmentLaw(1, (3,), batch=2))


def test_word_tokenizer_keeps_rare_words_that_it_must():
    tokenizer = word_tokenizer(["a b a b a b c"], vocab_size=6, always=["zebra ?"])
    assert tokenizer.decode(tokenizer("zebra ? a q")["input_ids"]) == "zebra ? a <unk>"
    ids = sorted(tokenizer.get_vocab().values())
    assert ids == list(range(len(tokenizer)))


def _trainer(tmp_path: Any, model: Any, **options: Any) -> MemoryTrainer:
    rows = [{"input_ids": random_ids(24, seed=i).tolist(), "labels": random_ids(24, seed=i).tolist()} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return MemoryTrainer(model, arguments, train_dataset=rows, data_collator=Collator(), **options)


def test_trainer_trains_host_and_memory_and_logs_the_memory(tmp_path):
    model = mnemic.attach(tiny_host(), "lm2", segment=8, preset="default", num_slots=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = _trainer(tmp_path, model, log_memory=True)
    trainer.train()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert 0 < logged[-1]["memory/block1/gate_forget"] < 1


def test_trainer_gives_the_memory_its_own_learning_rate(tmp_path):
    model = mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=2)
    trainer = _trainer(tmp_path, model, memory_learning_rate=0.5)
    groups = trainer.create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model.memory.first_tokens)] == 0.5
    assert len(rates) == len(list(model.parameters()))
    assert {rates[id(p)] for n, p in model.named_parameters() if not n.startswith("memory.")} == {1e-2}


def test_truncation_reaches_the_model(tmp_path):
    model = mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=2)
    trainer = _trainer(tmp_path, model, truncation=mnemic.Truncation("tail", 0))
    batch = Collator()([answer_example(random_ids(20, seed=i).tolist(), [7]) for i in range(2)])
    trainer.compute_loss(model, batch).backward()
    # The learned first state is read in segment 0, whose state no later segment's loss may reach.
    assert model.memory.first_tokens.grad is None or not model.memory.first_tokens.grad.any()


def test_gradients_are_clipped_by_value_too(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.extend(float(p.grad.abs().max()) for p in kwargs["model"].parameters() if p.grad is not None)

    model = mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=2)
    trainer = _trainer(tmp_path, model, max_grad_value=1e-3)
    trainer.args.max_grad_norm = float("inf")
    trainer.add_callback(Look())
    trainer.train()
    assert max(seen) == pytest.approx(1e-3)
    trainer.args.max_grad_norm = 0.0
    with pytest.raises(mnemic.ConfigError, match="max_grad_value"):
        MemoryTrainer(model, trainer.args, max_grad_value=1e-3)


def test_trainer_refuses_what_would_not_train(tmp_path):
    with pytest.raises(mnemic.HostError, match="no memory"):
        _trainer(tmp_path, tiny_host())
    model = mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=2)
    model.requires_grad_(False)
    with pytest.raises(mnemic.ConfigError, match="add_lora"):
        _trainer(tmp_path, model)
