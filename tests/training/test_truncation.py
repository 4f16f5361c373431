"""Truncation against the loop that everybody writes by hand: read a segment, detach, read the next."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mnemic
from mnemic import Truncation
from tests.tiny import random_ids, tiny_host

SEGMENT = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "lm2": {"preset": "default", "num_slots": 6},
    "rmt": {"num_tokens": 3},
    "armt": {"num_tokens": 3},
    "gated-deltanet": {"num_heads": 2},
}


def _model(memory: str) -> Any:
    torch.manual_seed(0)
    model = mnemic.attach(tiny_host().double(), memory, segment=SEGMENT, **OPTIONS[memory])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.train()


def _detached_at(policy: str, depth: int, segment: int, segments: int) -> bool:
    if policy == "tail":
        # The last loss reaches `depth` segments before its own.
        return segment < segments - depth
    return segment % depth == 0


def _by_hand(model: Any, ids: Tensor, policy: str, depth: int) -> Tensor:
    """Logits of one row, (1, Q, V), its state detached where the policy says."""
    parts, state, logits = ids.split(SEGMENT, dim=1), None, []
    for s, part in enumerate(parts):
        if state is not None and _detached_at(policy, depth, s, len(parts)):
            state = mnemic.State({name: tensor.detach() for name, tensor in state.items()})
        output = model(part, memory_state=state)
        state = output.memory_state
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    # A gradient that stops before a parameter is no gradient in one way of reading and zeros in another.
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("policy, depth", [("tail", d) for d in (0, 1, 2, 9)] + [("chunk", d) for d in (1, 2, 3)])
@pytest.mark.parametrize("memory", OPTIONS)
def test_every_gradient_is_that_of_the_detaching_loop(memory: str, policy: Any, depth: int):
    """Rows of four segments, of two, and of two and a part: each counts its own."""
    model, lengths = _model(memory), (32, 16, 19)
    ids, mask = random_ids(3, 32), torch.zeros(3, 32, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    weights = torch.randn(
        3, 32, model.config.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    weights = weights * mask[:, :, None]

    logits = model(ids, attention_mask=mask, truncation=Truncation(policy, depth)).logits
    found = _gradients(model, (logits.tanh() * weights).sum())
    by_hand = [
        (_by_hand(model, ids[row : row + 1, :n], policy, depth).tanh() * weights[row : row + 1, :n]).sum()
        for row, n in enumerate(lengths)
    ]
    expected = _gradients(model, torch.stack(by_hand).sum())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11 * float(gradient.abs().max() + 1))


def test_truncation_is_felt():
    """The loop above would prove nothing if the state carried no gradient."""
    model, ids = _model("lm2"), random_ids(1, 32)
    cut, full = (_gradients(model, _by_hand(model, ids, "tail", depth)[:, -1].square().sum()) for depth in (0, 4))
    name = next(n for n, _ in model.memory.named_parameters() if (full[f"memory.{n}"] - cut[f"memory.{n}"]).any())
    assert not torch.allclose(full[f"memory.{name}"], cut[f"memory.{name}"], rtol=1e-2)
