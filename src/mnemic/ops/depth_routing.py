"""Depth routing: the keys and values of a layer as a learned mix of those of all layers up to it.

The memory over depth of LIMe (2025, arXiv 2502.09245). Shapes: B batch, H key-value heads, T tokens, e head width.
For layer l and head g, with one router R (H, (l + 1) H) a layer, applied to keys and values alike:

    (k, v)[g] = sum over layers j <= l and heads g' of R[g, j H + g'] (k, v)_j[g']

Keys come in before rotation and are rotated after routing; all layers need the same H and e. A layer takes
4 (l + 1) H^2 e operations a token, and at least reads (l + 1) layers and writes one.

Heads stand first in a packed layer, (H, 2, B, T, e), so that a router is one matrix product. Two forms:
- a list of packed layers, for training: products are summed layer by layer and nothing is copied. Concatenating the
  list measured slower from 128 tokens on, and keeps copies of O(L^2) layers for the backward pass.
- a preallocated buffer (L H, 2, B, T, e), without gradients: a layer is one product with a slice, and measured faster
  than the list at every size.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Start = Literal["random", "identity"]


def pack(keys: Tensor, values: Tensor) -> Tensor:
    """(B, H, T, e) twice -> one packed layer (H, 2, B, T, e)."""
    return torch.stack([keys.transpose(0, 1), values.transpose(0, 1)], dim=1)


def new_buffer(num_layers: int, keys: Tensor) -> Tensor:
    """An unwritten buffer (num_layers * H, 2, B, T, e) for layers whose keys are like `keys`, (B, H, T, e)."""
    batch, heads, tokens, width = keys.shape
    return keys.new_empty(num_layers * heads, 2, batch, tokens, width)


def store(buffer: Tensor, layer: int, keys: Tensor, values: Tensor) -> None:
    """Write the keys and values of a layer, (B, H, T, e) each, into its rows of the buffer.

    Raises:
        RuntimeError: gradients are enabled; what earlier layers need for their backward pass would be overwritten.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "depth routing: a preallocated buffer cannot be written while gradients are enabled; "
            "route a list of packed layers, or run under torch.no_grad()."
        )
    heads = keys.shape[1]
    rows = buffer[layer * heads : (layer + 1) * heads]
    rows[:, 0].copy_(keys.transpose(0, 1))
    rows[:, 1].copy_(values.transpose(0, 1))


def route(buffer: Sequence[Tensor] | Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed keys and values of layer l.

    Args:
        buffer: the packed layers 0..l, each (H, 2, B, T, e), or a buffer whose first (l + 1) H rows hold them.
        router: (H, (l + 1) H); taken in the dtype of the buffer.

    Returns: keys and values, (B, H, T, e) each: views of one tensor, e contiguous.

    Raises:
        ValueError: a router whose shape does not go with the layers.
    """
    heads, columns = router.shape
    if isinstance(buffer, Tensor):
        if columns % heads or columns > buffer.shape[0]:
            raise ValueError(
                f"depth routing: router {tuple(router.shape)} on a buffer of {buffer.shape[0]} rows; expected "
                "(H, n H) with n H at most the rows."
            )
        rows = buffer[:columns]
        mixed = router.to(rows.dtype) @ rows.flatten(1)
        shape = rows.shape[1:]
    else:
        if not buffer or columns != heads * len(buffer) or buffer[0].shape[0] != heads:
            found = f"{len(buffer)} layers of {buffer[0].shape[0]} heads" if buffer else "no layers"
            raise ValueError(
                f"depth routing: router {tuple(router.shape)} for {found}; expected (H, layers * H), layers >= 1."
            )
        blocks = router.to(buffer[0].dtype).split(heads, dim=1)
        shape = buffer[0].shape[1:]
        mixed = blocks[0] @ buffer[0].flatten(1)
        for block, layer in zip(blocks[1:], buffer[1:], strict=True):
            mixed = torch.addmm(mixed, block, layer.flatten(1))
    mixed = mixed.view(heads, *shape)
    return mixed[:, 0].transpose(0, 1), mixed[:, 1].transpose(0, 1)


def initial_router(
    layer: int,
    num_heads: int,
    start: Start = "random",
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """A router (H, (layer + 1) H) whose last block, the layer's own heads, is the identity.

    Args:
        layer: at least 1; layer 0 has nothing to mix and no router.
        start: the other blocks. "random": uniform between -sqrt(3 / n) and sqrt(3 / n), n = (layer + 1) H, as in the
            released code. "identity": zero, so that a pretrained host is unchanged.

    Raises:
        ValueError: layer 0, or another start.
    """
    if layer < 1:
        raise ValueError(f"depth routing: no router for layer {layer}; layers from 1 on have one.")
    columns = (layer + 1) * num_heads
    router = torch.zeros(num_heads, columns, dtype=dtype, device=device)
    if start == "random":
        bound = math.sqrt(3 / columns)
        router.uniform_(-bound, bound, generator=generator)
    elif start != "identity":
        raise ValueError(f"depth routing: start = {start!r}, expected 'random' or 'identity'.")
    router[:, -num_heads:] = torch.eye(num_heads, dtype=dtype, device=device)
    return router


def num_router_parameters(num_layers: int, num_heads: int) -> int:
    """Numbers in the routers of layers 1..L-1: the sum of (l + 1) H^2."""
    return num_heads**2 * (num_layers * (num_layers + 1) // 2 - 1)
