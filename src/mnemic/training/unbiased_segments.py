"""One training step of UIO-LLMs (2024, arXiv 2406.18173) over a text of any length.

`incremental_backward` with an attached host: of all segments' encodings only `live` keep their activations, and the
gradient is still right on average. The text of one segment at a time is in the graph beside them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ConfigError, InputError
from ..core.state import State
from ..hosts.attach import base_model, is_attached
from ..memories.recurrent.uio_llms import UIOLLMs
from .unbiased import incremental_backward


def unbiased_backward(
    model: Any, input_ids: Tensor, labels: Tensor | None = None, *, live: int, seed: int, weighted: bool = True
) -> Tensor:
    """Add an estimate of the gradient of the mean loss of a text to `.grad`.

    Each segment predicts its own tokens from those before them and from the memories of all segments before it; its
    first token is not predicted, for no segment sees the text of another.

    Args:
        model: attached with uio-llms. input_ids: (B, S) int64, no padding. labels: (B, S), -100 to ignore; None: the
            text itself. live, seed, weighted: see `incremental_backward`.

    Returns: the loss per predicted token, a detached scalar.

    Raises:
        ConfigError: another memory, or live below 1. InputError: shapes, or nothing to predict.
    """
    base = base_model(model)
    if not is_attached(base) or not isinstance(base.memory, UIOLLMs):
        raise ConfigError("unbiased_backward trains a host with the memory 'uio-llms'; attach it first.")
    labels = input_ids if labels is None else labels
    if input_ids.dim() != 2 or input_ids.is_floating_point() or labels.shape != input_ids.shape:
        raise InputError(
            f"input_ids {tuple(input_ids.shape)} of {input_ids.dtype} and labels {tuple(labels.shape)}; expected ids "
            "(batch, tokens) and labels of the same shape."
        )
    memory, rows, length = base.memory, len(input_ids), base.mnemic.layout.segment
    # A last segment of one token predicts nothing.
    pairs = list(zip(input_ids.split(length, 1), labels.split(length, 1), strict=True))
    pairs = [(ids, targets) for ids, targets in pairs if ids.shape[1] > 1]
    predicted = sum(int((targets[:, 1:] != -100).sum()) for _, targets in pairs)
    if not predicted:
        raise InputError("No token of this text is to be predicted; give labels other than -100 behind a first token.")

    def encode(pair: tuple[Tensor, Tensor]) -> State:
        empty = memory.initial_state(rows)
        embedded = base.get_input_embeddings()(pair[0])
        trace = base._write_pass(empty, State(), embedded, torch.zeros(rows, dtype=torch.long, device=embedded.device))
        return memory.made(trace)

    def loss(pair: tuple[Tensor, Tensor], memories: Sequence[State]) -> Tensor:
        ids, targets = pair
        # Without its last token a segment is not complete, and nothing is written.
        state = memory.appended(memory.initial_state(rows), memories[-memory.config.capacity :])
        logits = model(ids[:, :-1], memory_state=state, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum") / predicted

    return incremental_backward(pairs, encode, loss, live=live, seed=seed, weighted=weighted)
