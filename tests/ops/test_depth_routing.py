"""Depth routing: both forms against loops over layers and heads, values and gradients, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnemic.ops import depth_routing as depth

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
few = settings(max_examples=15, deadline=None, derandomize=True)


def tensors(layers: int, heads: int, batch: int, tokens: int, width: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Keys and values of each layer (B, H, T, e), and the router of the last one: all leaves."""
    make = torch.Generator().manual_seed(0)
    new = lambda *size: torch.randn(size, generator=make, dtype=torch.float64, requires_grad=True)  # noqa: E731
    keys = [new(batch, heads, tokens, width) for _ in range(layers)]
    values = [new(batch, heads, tokens, width) for _ in range(layers)]
    return keys, values, new(heads, layers * heads)


def naive_route(layers: list[Tensor], router: Tensor) -> Tensor:
    """sum over j, g' of R[g, j H + g'] x_j[g'] for keys or for values, by loops."""
    batch, heads, tokens, width = layers[0].shape
    rows = []
    for b in range(batch):
        for g in range(heads):
            row = torch.zeros(tokens, width, dtype=router.dtype)
            for j, layer in enumerate(layers):
                for other in range(heads):
                    row = row + router[g, j * heads + other] * layer[b, other]
            rows.append(row)
    return torch.stack(rows).view(batch, heads, tokens, width)


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=make, dtype=o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


@few
@given(shapes)
def test_a_list_equals_loops_with_gradients(shape):
    keys, values, router = tensors(*shape)
    fast = depth.route([depth.pack(k, v) for k, v in zip(keys, values, strict=True)], router)
    slow = (naive_route(keys, router), naive_route(values, router))
    leaves = [*keys, *values, router]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for a, b in zip(gradients(fast, leaves), gradients(slow, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@few
@given(shapes)
def test_a_buffer_equals_loops_at_every_layer(shape):
    keys, values, _ = tensors(*shape)
    layers, heads = shape[:2]
    with torch.no_grad():
        buffer = depth.new_buffer(layers, keys[0]).fill_(float("nan"))
        for layer in range(layers):
            # Rows of later layers are still NaN: a layer that read them would show it.
            depth.store(buffer, layer, keys[layer], values[layer])
            router = torch.randn(heads, (layer + 1) * heads, dtype=torch.float64)
            routed = depth.route(buffer, router)
            for fast, parts in zip(routed, (keys, values), strict=True):
                torch.testing.assert_close(fast, naive_route(parts[: layer + 1], router), rtol=0, atol=1e-10)


def test_an_unchanging_buffer_has_the_gradients_of_the_list():
    keys, values, router = tensors(3, 2, 2, 3, 4)
    layers = [depth.pack(k, v) for k, v in zip(keys, values, strict=True)]
    leaves = [*keys, *values, router]
    by_list = gradients(depth.route(layers, router), leaves)
    by_buffer = gradients(depth.route(torch.cat(layers), router), leaves)
    for a, b in zip(by_list, by_buffer, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_last_router_reaches_the_first_layer():
    keys, values, _ = tensors(4, 2, 1, 3, 2)
    router = depth.initial_router(3, 2, dtype=torch.float64).requires_grad_()
    routed = depth.route([depth.pack(k, v) for k, v in zip(keys, values, strict=True)], router)
    for grad in torch.autograd.grad(sum(x.square().sum() for x in routed), [keys[0], values[0], router]):
        assert bool((grad != 0).all())


def test_tokens_and_rows_do_not_mix():
    keys, values, router = tensors(3, 2, 2, 4, 3)
    layers = [depth.pack(k, v) for k, v in zip(keys, values, strict=True)]
    moved, _ = depth.route(layers, router)
    for grad in torch.autograd.grad(moved[0, :, 2].sum(), keys):
        reached = (grad != 0).any(1).any(-1)
        assert reached.nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("layer, heads", [(1, 1), (1, 4), (5, 3)])
def test_identity_start_hands_over_the_layers_own_keys_and_values(layer, heads):
    keys, values, _ = tensors(layer + 1, heads, 2, 3, 4)
    router = depth.initial_router(layer, heads, "identity", dtype=torch.float64)
    routed = depth.route([depth.pack(k, v) for k, v in zip(keys, values, strict=True)], router)
    assert torch.equal(routed[0], keys[-1])
    assert torch.equal(routed[1], values[-1])


def test_random_start_is_uniform_with_the_identity_for_the_own_layer():
    layer, heads = 15, 32
    router = depth.initial_router(layer, heads, generator=torch.Generator().manual_seed(0))
    bound = (3 / (16 * 32)) ** 0.5
    others = router[:, :-heads]
    assert torch.equal(router[:, -heads:], torch.eye(heads))
    assert float(others.abs().max()) <= bound
    assert float(others.abs().max()) > 0.99 * bound
    # Variance 1 / n of each of the n numbers that a head sums.
    assert float(others.std()) == pytest.approx((16 * 32) ** -0.5, rel=0.02)
    assert float(others.mean()) == pytest.approx(0, abs=3e-4 * 3)
    assert torch.equal(router, depth.initial_router(layer, heads, generator=torch.Generator().manual_seed(0)))


def test_the_number_of_parameters():
    for layers, heads in ((1, 4), (2, 3), (6, 2)):
        routers = [depth.initial_router(layer, heads) for layer in range(1, layers)]
        assert depth.num_router_parameters(layers, heads) == sum(r.numel() for r in routers)
    assert depth.num_router_parameters(16, 32) == 138_240


def test_a_float32_router_serves_narrower_keys():
    layers = [torch.randn(2, 2, 1, 3, 4).bfloat16() for _ in range(2)]
    router = depth.initial_router(1, 2, "random").requires_grad_()
    keys, values = depth.route(layers, router)
    assert keys.dtype == values.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(keys.sum() + values.sum(), router)
    assert grad.dtype == torch.float32
    assert keys.stride(-1) == 1


def test_what_cannot_be_routed_is_refused():
    layers = [torch.zeros(2, 2, 1, 1, 1)] * 3
    with pytest.raises(ValueError, match=r"\(2, 4\) for 3 layers of 2 heads"):
        depth.route(layers, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no layers"):
        depth.route([], torch.zeros(2, 4))
    with pytest.raises(ValueError, match="4 rows"):
        depth.route(torch.zeros(4, 2, 1, 1, 1), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"\(H, n H\)"):
        depth.route(torch.zeros(4, 2, 1, 1, 1), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no router for layer 0"):
        depth.initial_router(0, 2)
    with pytest.raises(ValueError, match="'random' or 'identity'"):
        depth.initial_router(1, 2, "zero")
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        depth.store(torch.zeros(4, 2, 1, 1, 1), 0, torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1))
