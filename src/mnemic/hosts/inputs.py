"""Checks of what a caller gives, in words that say what was expected."""

import torch
from torch import Tensor

from ..core.errors import InputError


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, embeddings: Tensor) -> Tensor:
    """The input, ids (B, Q) or embeddings (B, Q, d); `embeddings` is the host's table of them.

    Raises:
        InputError: both or none given, or of the wrong shape, width, dtype or range.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("Give either input_ids or inputs_embeds.")
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    assert tokens is not None
    width = 2 if inputs_embeds is None else 3
    if tokens.dim() != width or 0 in tokens.shape:
        shape = "(batch, tokens)" if width == 2 else "(batch, tokens, width)"
        raise InputError(f"Input of shape {tuple(tokens.shape)}, expected {shape} with at least one token.")
    if width == 3 and tokens.shape[2] != embeddings.shape[1]:
        raise InputError(f"inputs_embeds have width {tokens.shape[2]}, expected the host's {embeddings.shape[1]}.")
    if width == 2:
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise InputError(f"input_ids have dtype {tokens.dtype}, expected int64 token ids.")
        # Elsewhere the check would cost a synchronisation; streams check before they move ids to a device.
        if tokens.device.type == "cpu":
            check_vocabulary(tokens, embeddings.shape[0])
    return tokens


def check_vocabulary(ids: Tensor, size: int) -> None:
    """Raises `InputError` unless all ids lie in 0 .. size - 1."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise InputError(f"Token ids run from {low} to {high}, expected 0 to {size - 1}: is this the host's tokenizer?")
