"""Compressed activations: exact forward, gradients right on average, what is left alone, and what is saved."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mnemic
from mnemic.training.compression import CompressedActivations, Packed, pack
from tests.tiny import host_config, random_ids


def attached(memory: str = "rmt") -> Any:
    options = {"rmt": {"num_tokens": 2}, "lm2": {"preset": "default", "num_slots": 8}}.get(memory, {})
    config = host_config("llama", hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.02)
    torch.manual_seed(0)
    return mnemic.attach(config, memory, segment=16, **options).train()


def gradient(model: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Loss, all gradients in one vector, and the compression that was on."""
    model.zero_grad(set_to_none=True)
    saved = None
    if options:
        with CompressedActivations(model.parameters(), **options) as saved:
            loss = model(ids, labels=ids, use_cache=False).loss
    else:
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), saved


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("memory", ["rmt", "lm2"])
def test_the_forward_pass_is_exact_and_gradients_are_close(memory):
    model, ids = attached(memory), random_ids(2, 48)
    loss, expected, _ = gradient(model, ids)
    same, one, saved = gradient(model, ids, seed=0)
    assert torch.equal(same, loss)
    assert float(F.cosine_similarity(one, expected, dim=0)) >= 0.9999
    assert error(one, expected) <= 0.013
    # Groups of a head's 32 numbers, and wider ones elsewhere.
    assert saved.before / saved.after >= 3.6


def test_gradients_are_right_on_average():
    model, ids = attached(), random_ids(1, 32)
    expected, seeds = gradient(model, ids)[1], 10
    single = [gradient(model, ids, seed=s)[1] for s in range(seeds)]
    one = sum(error(g, expected) for g in single) / seeds
    # Noise goes down with the root of the number of runs; what rounding does to all of them alike would stay.
    assert error(torch.stack(single).mean(0), expected) <= 1.2 * one / seeds**0.5


def test_rounding_at_random_is_unbiased():
    x, generator = torch.rand(1, 64, dtype=torch.float64), torch.Generator().manual_seed(0)
    packed = pack(x.repeat(20_000, 1), levels=15, generator=generator)
    assert packed is not None
    mean = packed.unpack(torch.Size([20_000, 64])).mean(0)
    # Standard deviation of one rounding is half a step at the most: five of those of the mean.
    torch.testing.assert_close(mean, x[0], atol=5 * 0.5 / 15 / 20_000**0.5, rtol=0)


@pytest.mark.parametrize("dtype, ratio", [(torch.float32, 3.85), (torch.bfloat16, 1.9)])
def test_bytes(dtype, ratio):
    packed = pack(torch.randn(64, 512).to(dtype))
    assert packed is not None
    assert 64 * 512 * dtype.itemsize / packed.nbytes >= ratio


def test_values_come_back_within_a_step():
    x = torch.randn(7, 333, dtype=torch.float64)
    packed = pack(x, group=100, generator=torch.Generator().manual_seed(0))
    assert packed is not None
    back = packed.unpack(x.shape)
    assert back.dtype == x.dtype
    assert float((back - x).abs().max()) <= float(packed.width.max()) / 255
    constant = pack(torch.full((600,), 3.5))
    assert constant is not None
    assert torch.equal(constant.unpack(torch.Size([600])), torch.full((600,), 3.5))


def test_accumulated_gradients_are_those_of_the_parts():
    model, parts = attached(), [random_ids(2, 32, seed=s) for s in range(2)]
    separate = [gradient(model, ids, seed=s)[1] for s, ids in enumerate(parts)]
    model.zero_grad(set_to_none=True)
    losses = []
    # Both forward passes before any backward pass: ranges that were shared would be those of the second.
    for seed, ids in enumerate(parts):
        with CompressedActivations(model.parameters(), seed=seed):
            losses.append(model(ids, labels=ids, use_cache=False).loss)
    for loss in losses:
        loss.backward()
    both = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(both, separate[0] + separate[1], atol=1e-6, rtol=0)


def saved_by(run: Any, **options: Any) -> tuple[list[torch.Tensor], CompressedActivations]:
    """What was left exact."""
    exact, saver = [], CompressedActivations([], **options)
    plain = saver._save
    saver._save = lambda t: exact.append(t) or t if (kept := plain(t)) is t else kept
    with saver:
        saver.kept = run()
    return exact, saver


def test_statistics_small_tensors_integers_and_masks_are_left_exact():
    x = torch.randn(2, 8, 64, 64, requires_grad=True)
    exact, _ = saved_by(lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True))
    assert any(t.shape == (2, 8, 64) for t in exact)
    assert all(t.dim() != 4 for t in exact)
    exact, _ = saved_by(lambda: F.layer_norm(x, (64,)))
    assert [t.numel() for t in exact] == [2 * 8 * 64] * 2
    exact, _ = saved_by(lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True), attention=False)
    assert any(t.dim() == 4 for t in exact)
    mask = torch.zeros(2, 8, 64, 64).masked_fill(torch.ones(64, 64).triu(1).bool(), torch.finfo(torch.float32).min)
    assert pack(mask) is None
    assert pack(torch.full((600,), float("inf"))) is None
    table, ids = torch.randn(50, 8, requires_grad=True), torch.arange(40)
    exact, _ = saved_by(lambda: F.embedding(ids.repeat(100), table))
    assert all(not t.is_floating_point() for t in exact)
    exact, saver = saved_by(lambda: torch.ones(31, requires_grad=True) * torch.ones(31))
    assert len(exact) == 1
    assert saver.before == 0


def test_parameters_are_never_packed():
    layer, x = torch.nn.Linear(64, 64), torch.randn(64, 64, requires_grad=True)
    with CompressedActivations(layer.parameters()) as saved:
        layer(x)
    assert saved.before == x.nbytes


def test_one_tensor_is_packed_once_but_its_changed_self_again():
    x = torch.randn(64, 64, requires_grad=True)
    y = x * 1.0
    with CompressedActivations([]) as saved:
        kept = y.sin() + y.cos() + y.view(-1).exp().view(64, 64) * 0
    # y, and the result of exp.
    assert saved.before == 2 * y.nbytes
    kept.sum().backward()
    with CompressedActivations([]) as saved:
        z = torch.randn(64, 64)
        one = x * z
        z.add_(1.0)
        two = x * z
    assert saved.before == 2 * z.nbytes
    x.grad = None
    (two - one).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x), atol=0.1, rtol=0)


def test_memory_that_is_given_out_again_is_not_taken_for_what_was_there():
    x = torch.ones(64, 64, requires_grad=True)
    total: Any = 0
    with CompressedActivations([]):
        for i in range(20):
            # Freed as soon as it is packed, so the next has its place.
            total = total + x * torch.full((64, 64), float(i))
    total.sum().backward()
    assert torch.equal(x.grad, torch.full((64, 64), float(sum(range(20)))))


def test_dropout_draws_what_it_would_have_drawn():
    x = torch.randn(64, 64, requires_grad=True)
    results = []
    for on in (False, True):
        torch.manual_seed(3)
        with CompressedActivations([], seed=5) if on else torch.enable_grad():
            results.append(F.dropout(x.sin(), 0.5))
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group": 1}, {"min_numel": 0}, {"rounding": "up"}])
def test_refuses(options):
    with pytest.raises(mnemic.ConfigError, match=next(iter(options))):
        CompressedActivations([], **options)


def test_packed_bytes_are_those_of_its_parts():
    packed = pack(torch.randn(1000), group=100)
    assert isinstance(packed, Packed)
    assert packed.nbytes == 1000 + 2 * 10 * 4


def _recall(steps: int, compressed: bool) -> float:
    """Accuracy of RMT, trained on naming the first token of the segment before, with or without compression."""
    config = host_config("llama", hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.04)
    torch.manual_seed(0)
    model = mnemic.attach(config, "rmt", segment=8, num_tokens=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)

    def batch(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = random_ids(size, 16, seed=seed)
        ids[:, 0] = 3 + ids[:, 0] % 8
        ids[:, 14], ids[:, 15] = 1, ids[:, 0]
        return ids, torch.where(torch.arange(16) == 15, ids, -100)

    for step in range(steps):
        ids, labels = batch(step, 32)
        with CompressedActivations(model.parameters(), seed=step) if compressed else torch.enable_grad():
            loss = model(ids, labels=labels, use_cache=False, logits_to_keep=2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, _ = batch(10**6, 1024)
    with torch.no_grad():
        logits = model.eval()(ids[:, :15], use_cache=False, logits_to_keep=1).logits[:, -1]
    return float((logits.argmax(-1) == ids[:, 15]).float().mean())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_training_ends_where_exact_training_does():
    exact, compressed = _recall(300, False), _recall(300, True)
    assert exact > 0.95
    assert abs(exact - compressed) <= 0.01
