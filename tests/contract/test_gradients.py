"""Gradients reach everything that is trained, stop exactly where truncation says, and survive checkpointing."""

import pytest
import torch

import mnemic
from mnemic import Truncation
from tests.contract.cases import (
    CASES,
    LENGTH,
    SEGMENT,
    build,
    case,
    checkpointing,
    pairs,
    random_ids,
    unused_parameters,
)

WHOLE_SEGMENT = [c for c in CASES if c.every == SEGMENT]
NUM_SEGMENTS = 4


def _skip_unless_gradients_flow(case):
    case.skip_unless("segmented")
    case.needs("gradients through the state")
    # The tests that ask this tell by the gradient of embeddings what is reached.
    case.needs("input embeddings")


def _embeds(model, batch=2, length=NUM_SEGMENTS * SEGMENT):
    return model.get_input_embeddings()(random_ids(batch, length)).detach().requires_grad_()


def _labels(ids):
    labels = ids.clone()
    labels[:, :3] = -100
    return labels


def _backward(model, ids, **inputs):
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=_labels(ids), **inputs).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@pairs()
def test_gradients_reach_every_parameter(case, host):
    case.needs("gradients to every parameter")
    model = build(case, host).train()
    _, grads = _backward(model, random_ids(4, LENGTH))
    unused = unused_parameters(model)
    assert unused.isdisjoint(grads)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in unused:
            assert name in grads, f"{name} has no gradient"
            assert grads[name].isfinite().all(), name
            assert grads[name].any(), f"the gradient of {name} is zero"


@pairs(hosts=("llama", "gpt2"))
def test_gradients_equal_with_a_carried_state(case, host):
    """The loss of three segments in one call is the mean of two calls joined by the state."""
    _skip_unless_gradients_flow(case)
    model = build(case, host).train()
    embeds = _embeds(model)
    whole = model(inputs_embeds=embeds)
    whole.logits.square().sum().backward()
    expected, embeds.grad = embeds.grad, None
    first = model(inputs_embeds=embeds[:, :16])
    second = model(inputs_embeds=embeds[:, 16:], memory_state=first.memory_state)
    (first.logits.square().sum() + second.logits.square().sum()).backward()
    torch.testing.assert_close(embeds.grad, expected, atol=1e-3, rtol=1e-3)


def _reached(model, truncation, carried=None):
    """Which tokens the loss of the last token reaches, (T,) bool."""
    embeds = _embeds(model)
    logits = model(inputs_embeds=embeds, truncation=truncation, memory_state=carried).logits
    logits[:, -1].square().sum().backward()
    return embeds.grad.abs().amax((0, 2)) > 0


def _first_reached(case, truncation):
    """The first token within reach: commits cut the state, attention reaches back to the start of the segment."""
    total = NUM_SEGMENTS * SEGMENT // case.every
    block = total - 1
    while True:
        start = block * case.every // SEGMENT * SEGMENT
        # Attention within a segment reaches its earlier blocks, and what they read.
        earliest = start // case.every
        entering = range(earliest, block + 1)
        cut = [bool(truncation.cuts(torch.tensor(s), torch.tensor(total))) for s in entering]
        if earliest == 0 or cut[0]:
            return start
        block = earliest - 1


@pytest.mark.parametrize(
    "truncation",
    [
        pytest.param(Truncation(policy, depth), id=f"{policy}{depth}", marks=() if usual else pytest.mark.slow)
        for policy, depth, usual in [
            *(("tail", 0, False), ("tail", 1, True), ("tail", 2, False)),
            *(("chunk", 1, False), ("chunk", 2, True), ("chunk", 3, False)),
        ]
    ],
)
@pairs(usual_hosts=("llama", "gpt2", "gemma2", "qwen3_moe"))
def test_truncation_is_exact(case, host, truncation):
    _skip_unless_gradients_flow(case)
    model = build(case, host).train()
    reached = _reached(model, truncation)
    first = _first_reached(case, truncation)
    assert not reached[:first].any()
    assert reached[first:].any()
    # The last tokens of the oldest segment within reach are among those felt.
    assert reached[first : first + SEGMENT].any()


@pairs(usual_hosts=("llama", "gpt2", "gemma2", "qwen3_moe"))
def test_without_truncation_the_first_segment_is_reached(case, host):
    _skip_unless_gradients_flow(case)
    reached = _reached(build(case, host).train(), None)
    assert reached[:SEGMENT].any()


@pytest.mark.parametrize("carried", [False, True], ids=["new", "carried"])
@pairs(hosts=("llama",))
def test_truncation_changes_no_number(case, host, carried):
    case.skip_unless("segmented")
    model = build(case, host)
    ids = random_ids(2, LENGTH)
    state = model(random_ids(2, SEGMENT, seed=4)).memory_state if carried else None
    plain = model(ids, memory_state=state)
    cut = model(ids, memory_state=state, truncation=Truncation("tail", 0))
    assert torch.equal(plain.logits, cut.logits)


@pairs(hosts=("llama", "gpt2"))
def test_truncation_counts_for_each_row(case, host):
    """A row of two segments beside one of four: depth 1 reaches both segments of the short row."""
    _skip_unless_gradients_flow(case)
    if case.every != SEGMENT:
        pytest.skip("counts commits, checked in rows of equal length")
    model = build(case, host).train()
    embeds = _embeds(model)
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, :16] = 0
    logits = model(inputs_embeds=embeds, attention_mask=mask, truncation=Truncation("tail", 1)).logits
    logits[:, -1].square().sum().backward()
    felt = embeds.grad.abs().amax(2).view(2, NUM_SEGMENTS, SEGMENT).amax(2) > 0
    assert felt.tolist() == [[False, False, True, True], [False, False, True, True]]
    embeds.grad = None
    logits = model(inputs_embeds=embeds, attention_mask=mask, truncation=Truncation("tail", 0)).logits
    logits[1, -1].square().sum().backward()
    felt = embeds.grad.abs().amax(2).view(2, NUM_SEGMENTS, SEGMENT).amax(2) > 0
    assert felt.tolist() == [[False] * 4, [False, False, False, True]]


@pairs(WHOLE_SEGMENT)
def test_activation_checkpointing_changes_nothing(case, host):
    model = build(case, host).train()
    ids = random_ids(2, LENGTH)
    loss, grads = _backward(model, ids)
    checkpointing(model)
    again, same = _backward(model, ids)
    torch.testing.assert_close(again, loss, atol=1e-6, rtol=0)
    assert same.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(same[name], grad, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pairs(WHOLE_SEGMENT, usual_hosts=("llama", "gpt2"))
def test_activation_checkpointing_of_padded_rows(case, host):
    model = build(case, host).train()
    ids, mask = random_ids(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :12], mask[2, 20:] = 0, 0
    loss, grads = _backward(model, ids, attention_mask=mask)
    checkpointing(model)
    again, same = _backward(model, ids, attention_mask=mask)
    torch.testing.assert_close(again, loss, atol=1e-6, rtol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(same[name], grad, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("host", ["llama", "gpt2", "opt", "gemma2"])
def test_checkpointing_refuses_what_it_would_get_wrong(host):
    """Checkpointed layers drop the cache and, if reentrant, the gradients that leave them by the side."""
    ids = random_ids(2, LENGTH)
    model = build(case("lm2_update_every"), host).train()
    checkpointing(model)
    with pytest.raises(mnemic.UnsupportedError, match="update_every"):
        model(ids, labels=ids)
    with torch.no_grad():
        expected = model.eval()(ids, use_cache=False).logits
        checkpointing(model, False)
        assert torch.equal(model(ids, use_cache=False).logits, expected)

    model = build(case("lm2"), host).train()
    checkpointing(model)
    with pytest.raises(mnemic.UnsupportedError, match="eval"):
        model.generate(ids, max_new_tokens=2)
    checkpointing(model, use_reentrant=True)
    with pytest.raises(mnemic.UnsupportedError, match="use_reentrant"):
        model(ids, labels=ids)
    model.eval()(ids)


@pytest.mark.parametrize("host", ["llama", "gpt2"])
@pytest.mark.parametrize("id", ["lm2", "rmt"])
def test_frozen_host_trains_the_memory(id, host):
    model = mnemic.freeze_host(build(case(id), host)).train()
    _, grads = _backward(model, random_ids(2, LENGTH))
    assert grads
    assert all(n.startswith("memory.") and g.any() for n, g in grads.items())
    checkpointing(model)
    _, same = _backward(model, random_ids(2, LENGTH))
    assert all(torch.allclose(same[n], g, atol=1e-6) for n, g in grads.items())
