"""The coupling is undone by its inverse, starts as the identity, and is what a loop over its parts says."""

import pytest
import torch
from torch import Tensor

from mnemic.ops.coupling import Coupling

WIDTH = 10


def random(blocks: int, dtype: torch.dtype = torch.float64) -> Coupling:
    torch.manual_seed(0)
    coupling = Coupling(blocks, WIDTH, 7, dtype=dtype)
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.normal_(std=0.3)
    return coupling


def by_hand(coupling: Coupling, u: Tensor) -> Tensor:
    """One vector at a time; the halves change places between blocks, and back at the end."""
    rows = []
    for row in u.reshape(-1, WIDTH):
        a, b = row[: WIDTH // 2], row[WIDTH // 2 :]
        for r in range(len(coupling.down)):
            networks = [
                lambda x, r=r, part=part: (
                    torch.nn.functional.gelu(x @ coupling.down[r, part] + coupling.down_bias[r, part])
                    @ coupling.up[r, part]
                    + coupling.up_bias[r, part]
                )
                for part in (0, 1)
            ]
            v1 = a + networks[0](b)
            v2 = b + networks[1](v1)
            a, b = v2, v1
        rows.append(torch.cat([b, a] if len(coupling.down) % 2 else [a, b]))
    return torch.stack(rows).view_as(u)


@pytest.mark.parametrize("blocks", [0, 1, 2, 5])
def test_equals_a_loop_forward_and_backward(blocks):
    coupling, u = random(blocks), torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    mine, theirs = coupling(u), by_hand(coupling, u)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    weight, inputs = torch.randn_like(mine), [u, *coupling.parameters()]
    grads = [torch.autograd.grad((x * weight).sum(), inputs, allow_unused=not blocks) for x in (mine, theirs)]
    for a, b in zip(*grads, strict=True):
        if blocks or a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_inverse_undoes_it(dtype, within):
    coupling, u = random(8, dtype), torch.randn(4, 3, WIDTH, dtype=dtype)
    with torch.no_grad():
        v = coupling(u)
        assert float((v - u).abs().max()) > 0.3
        torch.testing.assert_close(coupling.inverse(v), u, rtol=0, atol=within)
        torch.testing.assert_close(coupling(coupling.inverse(u)), u, rtol=0, atol=within)


def test_it_is_undone_as_well_with_weights_in_half_precision():
    coupling, u = random(8, torch.bfloat16), torch.randn(4, WIDTH).bfloat16()
    with torch.no_grad():
        v = coupling(u)
        assert v.dtype == torch.float32
        torch.testing.assert_close(coupling.inverse(v), u.float(), rtol=0, atol=1e-5)


def test_gradients_of_the_inverse_are_the_inverse_of_the_gradients():
    coupling, u = random(3), torch.randn(WIDTH, dtype=torch.float64)
    forward = torch.autograd.functional.jacobian(coupling, u)
    back = torch.autograd.functional.jacobian(coupling.inverse, coupling(u).detach())
    torch.testing.assert_close(forward @ back, torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_it_starts_as_the_identity(blocks):
    u = torch.randn(5, WIDTH)
    with torch.no_grad():
        assert torch.equal(Coupling(blocks, WIDTH, 7)(u), u)


def test_an_odd_width_has_no_halves():
    with pytest.raises(ValueError, match="even"):
        Coupling(2, 7, 4)
