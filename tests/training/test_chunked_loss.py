"""Loss in chunks: the usual loss and gradients through any memory, replay and checkpointing; what it cannot do."""

import contextlib
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import mnemic
from mnemic.training import Collator, MemoryTrainer
from mnemic.training.budget import saved_bytes
from mnemic.training.chunked_loss import ChunkedLoss
from tests.contract.cases import checkpointing
from tests.tiny import VOCABULARY, random_ids, tiny_host

COMPANION: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def attached(memory: str = "rmt", host: str = "llama", **changes: Any) -> Any:
    options = {"rmt": {"num_tokens": 2}, "lm2": {"preset": "default", "num_slots": 4}}.get(memory, {})
    return mnemic.attach(tiny_host(host, **changes), memory, segment=8, **options).double().train()


def gradients(model: Any, chunk: int | None, **given: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    with contextlib.nullcontext() if chunk is None else ChunkedLoss(model, chunk).on():
        loss = model(use_cache=False, **given).loss
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    ids = random_ids(3, 27)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0 if left else 1
    mask[1, 20:] = 1 if left else 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("memory, host", [("rmt", "llama"), ("lm2", "gpt2"), ("none", "opt")])
def test_loss_and_gradients_are_the_usual_ones(memory, host, left):
    model, given = attached(memory, host), batch(left)
    loss, expected = gradients(model, None, **given)
    same, found = gradients(model, 5, **given)
    # transformers takes its loss in float32.
    torch.testing.assert_close(same, loss, atol=1e-6, rtol=0, check_dtype=False)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("saver", ["replay", "checkpointing", "tied"])
def test_other_savers_take_part(saver):
    model = attached("rmt", tie_word_embeddings=saver == "tied")
    given = batch()
    loss, expected = gradients(model, None, **given)
    if saver == "checkpointing":
        checkpointing(model)
    same, found = gradients(model, 5, **given, **({"replay": True} if saver == "replay" else {}))
    torch.testing.assert_close(same, loss, atol=1e-6, rtol=0, check_dtype=False)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=0)


def test_the_logits_of_a_sample_are_not_kept():
    model, ids = attached(vocab_size=5000), random_ids(2, 64)
    with saved_bytes(tuple(model.parameters())) as plain:
        loss = model(ids, labels=ids, use_cache=False).loss
        whole = plain.total
    del loss
    chunked = ChunkedLoss(model, 8)
    with chunked.on(), saved_bytes(tuple(model.parameters())) as kept:
        loss = model(ids, labels=ids, use_cache=False).loss
        less = kept.total
    assert loss.requires_grad
    # Log-probabilities of 2 x 64 tokens, float32, at the least.
    assert whole - less >= 0.99 * 2 * 64 * 5000 * 4


def test_the_model_is_as_before_afterwards():
    model, ids = attached(), random_ids(1, 8)
    before = model(ids, use_cache=False).logits
    function = model.loss_function
    with pytest.raises(RuntimeError, match="stop"), ChunkedLoss(model, 4).on():
        raise RuntimeError("stop")
    assert model.loss_function is function
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert before.shape[-1] == VOCABULARY


def test_the_trainer_takes_it(tmp_path):
    losses = []
    for chunk in (None, 7):
        rows = [{"input_ids": i, "labels": i} for i in (random_ids(24, seed=s).tolist() for s in range(8))]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        model = mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=2)
        torch.manual_seed(0)
        trainer = MemoryTrainer(model, arguments, train_dataset=rows, data_collator=Collator(), chunked_loss=chunk)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        # Evaluation has logits as ever.
        assert model.eval()(random_ids(1, 8)).logits.shape[-1] == VOCABULARY
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-5, rtol=0)


def test_capped_logits_are_refused():
    with pytest.raises(mnemic.UnsupportedError, match="Gemma2"):
        ChunkedLoss(attached(host="gemma2"), 4)


def test_memories_that_change_logits_are_refused():
    model = mnemic.attach(tiny_host(), "memory-decoder", segment=8, model=COMPANION)
    with pytest.raises(mnemic.UnsupportedError, match="memory-decoder"):
        ChunkedLoss(model, 4)


def test_other_cases_are_refused():
    model = attached()
    with pytest.raises(mnemic.ConfigError, match="chunked_loss = 0"):
        ChunkedLoss(model, 0)
    model.loss_function = lambda **given: None
    with pytest.raises(mnemic.UnsupportedError, match="loss of its own"):
        ChunkedLoss(model, 4)
    del model._loss_function
    model.compile_step(backend="eager")
    with pytest.raises(mnemic.UnsupportedError, match="compiled"):
        ChunkedLoss(model, 4)
