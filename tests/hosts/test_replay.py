"""Replay gives the loss and the gradients of full back-propagation, and keeps states only."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainingArguments

import mnemic
from benchmarks.replay import LiveBytes
from mnemic import Truncation
from mnemic.training import Collator, MemoryTrainer
from tests.contract.cases import CASES, SEGMENT, Case, case, checkpointing
from tests.tiny import random_ids, tiny_host

SEGMENTS = 6
EVERY_MEMORY = [
    pytest.param(c, id=c.id, marks=() if c.usual else pytest.mark.slow) for c in CASES if "llama" in c.hosts
]


def _loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
    """transformers' causal loss without its rounding to float32."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    flat = functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    loss = functional.cross_entropy(logits.flatten(0, 1), flat, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _model(of: Case, host: str = "llama", dtype: torch.dtype = torch.float64, dropout: float = 0.1) -> Any:
    torch.manual_seed(2)
    plain: Any = tiny_host(host)
    model = of.attach(plain.to(dtype))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    for module in model.modules():
        for name in ("p", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, dropout)
    if dtype == torch.float64:
        model.loss_function = _loss
    return model.train()


def _gradients(model: Any, ids: Tensor, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    output = model(ids, **{"labels": ids, **inputs})
    output.loss.backward()
    return output, {n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.grad is not None}


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any gradient, relative to the largest entry of that gradient."""
    assert found.keys() == expected.keys()
    assert any(bool(g.any()) for g in expected.values())
    floor = 1e-6 * max(float(g.abs().max()) for g in expected.values())
    return max(float((found[n] - g).abs().max()) / max(float(g.abs().max()), floor) for n, g in expected.items())


def _compare(model: Any, ids: Tensor, bound: float, **inputs: Any) -> tuple[Any, Any]:
    whole, expected = _gradients(model, ids, **inputs)
    replayed, found = _gradients(model, ids, replay=True, **inputs)
    assert abs(replayed.loss.item() / whole.loss.item() - 1) < bound
    worst = _worst(found, expected)
    assert worst < bound, worst
    return whole, replayed


@pytest.mark.parametrize("of", EVERY_MEMORY)
def test_replay_is_full_back_propagation_or_refused(of: Case):
    model, ids = _model(of), random_ids(2, SEGMENTS * SEGMENT)
    if model.memory.continuous:
        with pytest.raises(mnemic.UnsupportedError, match=r"reads without segments.*gradient_checkpointing"):
            model(ids, labels=ids, replay=True)
        return
    whole, replayed = _compare(model, ids, 1e-12)
    assert replayed.logits is None
    assert (whole.memory_loss is None) == (replayed.memory_loss is None)
    for name, tensor in whole.memory_state.items():
        torch.testing.assert_close(replayed.memory_state[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("id", ["lm2", "rmt", "armt"])
def test_replay_in_float32_with_the_hosts_loss(id: str):
    _compare(_model(case(id), dtype=torch.float32), random_ids(2, SEGMENTS * SEGMENT), 1e-6)


@pytest.mark.parametrize("id", ["lm2", "rmt", "armt", "transformer_xl", "memory_decoder"])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_rows_of_different_lengths(id: str, side: str):
    """Every column carries a label, as without replay: padding predicts with the last real token before it."""
    ids, mask = random_ids(4, 37), torch.ones(4, 37, dtype=torch.long)
    for row, real in enumerate((37, 9, 24, 0)):
        mask[row, real:] = 0
    if side == "left":
        mask = mask.flip(1)
    if side == "holes":
        mask = mask * (random_ids(4, 37, seed=5) % 3 > 0)
    _compare(_model(case(id)), ids, 1e-12, attention_mask=mask)


@pytest.mark.parametrize("policy, depth", [("tail", 0), ("tail", 2), ("chunk", 1), ("chunk", 2)])
@pytest.mark.parametrize("id", ["lm2", "lm2_update_every", "rmt"])
def test_truncation_with_replay(id: str, policy: Any, depth: int):
    model, ids = _model(case(id)), random_ids(2, 4 * SEGMENT + 3)
    _, full = _gradients(model, ids)
    _compare(model, ids, 1e-12, truncation=Truncation(policy, depth))
    _, cut = _gradients(model, ids, truncation=Truncation(policy, depth), replay=True)
    assert _worst(cut, {name: full[name] for name in cut}) > 1e-3


def test_labels_and_kept_columns():
    model, ids = _model(case("lm2")), random_ids(3, 4 * SEGMENT)
    labels = ids.clone()
    labels[0, :20], labels[1], labels[2, 5:25] = -100, -100, -100
    _compare(model, ids, 1e-12, labels=labels)
    _compare(model, ids, 1e-12, labels=labels, logits_to_keep=9, num_items_in_batch=torch.tensor(17))
    # A segment whose logits nobody wants keeps none; a call without targets has the loss of the host's own function.
    nothing = torch.full_like(ids, -100)
    assert model(ids, labels=nothing, replay=True).loss.isnan()
    assert model(ids, labels=nothing, replay=True, num_items_in_batch=4).loss == 0


def test_dropout_inside_layers_and_before_them():
    model, ids = _model(case("rmt"), "gpt2"), random_ids(2, SEGMENTS * SEGMENT)
    _compare(model, ids, 1e-12)
    # Without the random numbers of the first run the gradients would be others: dropout is felt.
    _, found = _gradients(model, ids, replay=True)
    _, still = _gradients(_model(case("rmt"), "gpt2", dropout=0.0), ids)
    assert _worst(found, still) > 1e-2


@pytest.mark.parametrize("id", ["lm2", "rmt"])
def test_layers_may_be_checkpointed_too(id: str):
    model, ids = _model(case(id)), random_ids(2, 3 * SEGMENT)
    _, expected = _gradients(model, ids)
    checkpointing(model)
    _, found = _gradients(model, ids, replay=True)
    assert _worst(found, expected) < 1e-12


def test_state_and_gradients_from_an_earlier_call():
    model, ids = _model(case("lm2"), dropout=0.0), random_ids(2, 5 * SEGMENT)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    found = []
    for replay in (False, True):
        first = model(inputs_embeds=embeds[:, :16], labels=ids[:, :16], replay=replay)
        second = model(inputs_embeds=embeds[:, 16:], labels=ids[:, 16:], memory_state=first.memory_state, replay=replay)
        (first.loss + second.loss).backward()
        found.append({"embeds": embeds.grad})
        embeds.grad = None
    assert _worst(found[1], found[0]) < 1e-12


def test_running_statistics_and_diagnostics_are_those_of_one_run():
    pkm, ids = _model(case("pkm")), random_ids(2, 3 * SEGMENT)
    buffers = {n: b.clone() for n, b in pkm.memory.named_buffers()}
    _gradients(pkm, ids)
    expected = {n: b.clone() for n, b in pkm.memory.named_buffers()}
    assert any(not torch.equal(buffers[n], b) for n, b in expected.items())
    for name, buffer in pkm.memory.named_buffers():
        buffer.data.copy_(buffers[name])
    _gradients(pkm, ids, replay=True)
    for name, buffer in pkm.memory.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    lm2 = _model(case("lm2"))
    whole, replayed = (_gradients(lm2, ids, replay=r, memory_diagnostics=True)[0] for r in (False, True))
    assert whole.memory_diagnostics.keys() == replayed.memory_diagnostics.keys() != set()
    for name, value in whole.memory_diagnostics.items():
        torch.testing.assert_close(replayed.memory_diagnostics[name], value)


def test_only_states_are_kept():
    """After the forward pass autograd holds states and token ids."""
    model, ids = _model(case("rmt")), random_ids(2, 16 * SEGMENT)
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept = []
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for replay in (False, True):
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model(ids, labels=ids, replay=replay)
        kept.append(sum(n for p, n in held.items() if p not in weights))
    assert kept[1] == 15 * output.memory_state.nbytes + ids.nbytes
    assert kept[0] > 50 * kept[1]


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"labels": None}, "give labels"),
        ({"use_cache": True}, "use_cache=False"),
        ({"logits_to_keep": torch.tensor([1])}, "number of last columns"),
        ({"labels": random_ids(2, 7)}, r"labels of shape \(2, 7\), expected \(2, 20\)"),
    ],
)
def test_calls_that_cannot_be_replayed(inputs: dict[str, Any], words: str):
    ids = random_ids(2, 20)
    with pytest.raises((mnemic.InputError, mnemic.UnsupportedError), match=words):
        _model(case("rmt"))(ids, **{"labels": ids, "replay": True, **inputs})


def test_without_gradients_the_loss_is_the_same():
    model, ids = _model(case("lm2")).eval(), random_ids(2, 20)
    with torch.no_grad():
        whole, replayed = (model(ids, labels=ids, use_cache=False, replay=r) for r in (False, True))
    torch.testing.assert_close(replayed.loss, whole.loss, rtol=1e-12, atol=0)


def test_trainer_replays_in_training_and_not_in_evaluation(tmp_path: Any):
    rows = [{"input_ids": (ids := random_ids(24, seed=i).tolist()), "labels": ids} for i in range(8)]
    weights, losses = [], []
    for replay in (False, True):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
            save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True, learning_rate=1e-2,
            dataloader_pin_memory=False, optim="sgd",
        )  # fmt: skip
        model = _model(case("lm2"))
        trainer = MemoryTrainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=Collator(), replay=replay
        )
        losses.append(trainer.train().training_loss)
        evaluated: Any = rows[:2]
        logits: Any = trainer.predict(evaluated).predictions
        assert logits.shape[:2] == (2, 24)
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-10, atol=1e-12)


def test_the_backward_pass_holds_one_segment():
    model, peaks = _model(case("rmt"), dropout=0.0), {}
    _gradients(model, random_ids(2, 2 * SEGMENT))
    for replay in (False, True):
        for segments in (4, 16):
            ids = random_ids(2, segments * SEGMENT)
            with LiveBytes() as counter:
                model(ids, labels=ids, replay=replay).loss.backward()
            peaks[replay, segments] = counter.peak
    states = 16 * model(random_ids(2, SEGMENT)).memory_state.nbytes
    # Beside states: token ids and where they are predicted.
    assert peaks[True, 16] < peaks[True, 4] + states + 16 * 1024
    assert peaks[False, 16] > 3 * peaks[False, 4]
