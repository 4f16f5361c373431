"""Mixtures and the nearest-neighbour loss against explicit dense formulas, values and gradients, in float64."""

import pytest
import torch
from torch import Tensor

from mnemic.ops.mixture import knn_loss, mix_logits, sum_by_token


def random(*shape: int, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64).requires_grad_()


def explicit(base: Tensor, memory: Tensor, alpha: float | Tensor) -> Tensor:
    size = min(base.shape[-1], memory.shape[-1])
    return (alpha * memory[..., :size].softmax(-1) + (1 - alpha) * base[..., :size].softmax(-1)).log()


@pytest.mark.parametrize("sizes", [(7, 7), (9, 7), (7, 9)])
@pytest.mark.parametrize("alpha", [0.25, "scalar", "rows"])
def test_mixture_is_normalised_and_equals_the_explicit_one(sizes, alpha):
    base, memory = random(2, 3, sizes[0]), random(2, 3, sizes[1], seed=1)
    if alpha == "scalar":
        alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    if alpha == "rows":
        alpha = torch.rand(2, 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    mixed, slow = mix_logits(base, memory, alpha), explicit(base, memory, alpha)
    torch.testing.assert_close(mixed, slow, rtol=0, atol=1e-10)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))
    leaves = [base, memory] + ([alpha] if isinstance(alpha, Tensor) else [])
    pull = random(*mixed.shape, seed=3).detach()
    for a, b in zip(*(torch.autograd.grad((o * pull).sum(), leaves) for o in (mixed, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_numbers_zero_and_one_hand_the_logits_over():
    base, memory = random(4, 6), random(4, 6, seed=1)
    assert mix_logits(base, memory, 0) is base
    assert mix_logits(base, memory, 0.0) is base
    assert mix_logits(base, memory, 1.0) is memory
    longer = random(4, 8, seed=2)
    torch.testing.assert_close(mix_logits(base, longer, 0.0), base.log_softmax(-1))
    torch.testing.assert_close(mix_logits(base, longer, 1.0), longer[:, :6].log_softmax(-1))


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_weights_at_the_edges_have_finite_exact_gradients(edge):
    base, memory = random(3, 5), random(3, 5, seed=1)
    alpha = torch.tensor([[edge], [0.5], [edge]], dtype=torch.float64, requires_grad=True)
    mixed = mix_logits(base, memory, alpha)
    expected = (memory if edge else base).log_softmax(-1)
    assert torch.equal(mixed[0], expected[0])
    leaves = [base, memory, alpha]
    for a, b in zip(
        torch.autograd.grad(mixed[:, 0].sum(), leaves),
        torch.autograd.grad(explicit(base, memory, alpha)[:, 0].sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_second_derivatives():
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(mix_logits, (random(2, 3), random(2, 3, seed=1), alpha))


def test_forbidden_tokens_stay_forbidden_and_unlikely_ones_finite():
    base = torch.tensor([[0.0, -float("inf"), 1.0, -200.0]], requires_grad=True)
    memory = torch.tensor([[0.0, -float("inf"), -float("inf"), -300.0]], requires_grad=True)
    mixed = mix_logits(base, memory, 0.5)
    assert mixed[0, 1] == -float("inf")
    assert bool(mixed[0, [0, 2, 3]].isfinite().all())
    for grad in torch.autograd.grad(mixed[0, [0, 2, 3]].sum(), (base, memory)):
        assert bool(grad.isfinite().all())


def test_half_precision_is_mixed_in_float32():
    base, memory = random(3, 50).detach().bfloat16(), random(3, 50, seed=1).detach().bfloat16()
    mixed = mix_logits(base, memory, torch.tensor(0.3, dtype=torch.bfloat16))
    assert mixed.dtype == torch.float32
    exact = explicit(base.double(), memory.double(), float(torch.tensor(0.3, dtype=torch.bfloat16)))
    torch.testing.assert_close(mixed.double(), exact, rtol=0, atol=1e-5)


def test_mixture_refuses():
    with pytest.raises(ValueError, match="same tokens"):
        mix_logits(random(2, 5), random(3, 5), 0.5)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        mix_logits(random(2, 5), random(2, 5), 1.5)


def dense_targets(tokens: Tensor, weights: Tensor, vocabulary: int) -> Tensor:
    dense = torch.zeros(len(tokens), vocabulary, dtype=torch.float64)
    for row in range(len(tokens)):
        for token, weight in zip(tokens[row].tolist(), weights[row].tolist(), strict=True):
            dense[row, token] += weight
    return dense / dense.sum(-1, keepdim=True)


def targets(n: int = 6, k: int = 9, vocabulary: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """More neighbours than tokens, so that every row has duplicates; some weights are zero."""
    make = torch.Generator().manual_seed(4)
    tokens = torch.randint(vocabulary, (n, k), generator=make)
    weights = torch.rand(n, k, generator=make, dtype=torch.float64)
    weights[:, -2:] = 0
    return tokens, weights, torch.randint(vocabulary, (n,), generator=make)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_loss_equals_dense_divergence_and_cross_entropy(beta):
    tokens, weights, labels = targets()
    logits = random(6, 5)
    target = dense_targets(tokens, weights, 5)
    log_memory = logits.log_softmax(-1)
    divergence = torch.where(target > 0, target * (target.log() - log_memory), 0).sum(-1).mean()
    entropy = -log_memory[torch.arange(6), labels].mean()
    slow = beta * divergence + (1 - beta) * entropy
    fast = knn_loss(logits, tokens, weights, labels, beta)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (fast, slow))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x: knn_loss(x, tokens, weights, labels, beta), logits)


def test_loss_from_stored_precision_and_forbidden_tokens_without_weight():
    tokens, weights, labels = targets()
    forbidden = torch.full((6, 1), 5)
    tokens, weights = torch.cat([tokens, forbidden], -1), torch.cat([weights, torch.zeros(6, 1)], -1)
    logits = torch.cat([random(6, 5).detach(), torch.full((6, 1), -float("inf"))], -1).requires_grad_()
    loss = knn_loss(logits, tokens.int(), weights.half(), labels, 0.5)
    again = knn_loss(logits[:, :5], tokens[:, :-1], weights[:, :-1].half(), labels, 0.5)
    torch.testing.assert_close(loss, again)
    (grad,) = torch.autograd.grad(loss, logits)
    assert bool(grad.isfinite().all())


def test_no_divergence_from_itself():
    tokens, weights, labels = targets()
    logits = (dense_targets(tokens, weights, 5) + 1e-300).log()
    assert float(knn_loss(logits, tokens, weights, labels, 1.0)) == pytest.approx(0, abs=1e-12)


def test_sums_by_token():
    tokens, weights = sum_by_token(
        torch.tensor([[7, 2, 7, 2], [1, 1, 1, 1]]), torch.tensor([[1.0, 2, 4, 8], [1.0] * 4])
    )
    assert tokens.tolist() == [[2, 7, 0, 0], [1, 0, 0, 0]]
    assert weights.tolist() == [[10, 5, 0, 0], [4, 0, 0, 0]]


def test_loss_refuses():
    tokens, weights, labels = targets()
    with pytest.raises(ValueError, match="beta is 2"):
        knn_loss(random(6, 5), tokens, weights, labels, 2)
    with pytest.raises(ValueError, match=r"expected \(N, V\)"):
        knn_loss(random(6, 5), tokens, weights[:, :3], labels, 0.5)
    with pytest.raises(ValueError, match="N at least 1"):
        knn_loss(random(0, 5), tokens[:0], weights[:0], labels[:0], 0.5)
    with pytest.raises(ValueError, match="all need N"):
        knn_loss(random(6, 5), tokens[:5], weights[:5], labels, 0.5)
