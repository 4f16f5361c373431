"""Checks of a work before it waits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..hosts.host import MemoryHost
from .errors import InvalidRequest, TooLarge
from .requests import Limits, Work


def check_work(work: Work, base: MemoryHost, vocabulary: int, limits: Limits, tokenizer: Any) -> Tensor:
    """The prompt as int64 ids (n,) on the CPU.

    Raises:
        InvalidRequest, TooLarge: see the messages; `param` names the field.
    """
    sampling, stream = work.sampling, work.stream
    if len(work.prompt) > limits.max_prompt:
        raise TooLarge(
            f"The prompt has {len(work.prompt):,} tokens, the server takes {limits.max_prompt:,} in one request; feed "
            "a session in parts.",
            param="prompt",
        )
    if sampling.max_tokens > limits.max_tokens:
        raise InvalidRequest(
            f"max_tokens = {sampling.max_tokens:,}, expected at most {limits.max_tokens:,}.", param="max_tokens"
        )
    if stream is not None and (stream.base is not base or stream.batch_size != 1):
        raise InvalidRequest("The stream is of another model, or of more than one row.", param="session")
    if sampling.stop and tokenizer is None:
        raise InvalidRequest("Stop strings need a tokenizer, and this server has none.", param="stop")
    if not isinstance(work.tenant, str):
        raise InvalidRequest(f"tenant = {work.tenant!r}, expected a string.")
    if work.deadline is not None and not (math.isfinite(work.deadline) and work.deadline > 0):
        raise InvalidRequest(f"deadline = {work.deadline!r}, expected seconds above 0.", param="deadline")
    if any(token >= vocabulary for token in sampling.logit_bias):
        raise InvalidRequest(
            f"logit_bias names token {max(sampling.logit_bias)}, expected ids below {vocabulary}.", param="logit_bias"
        )
    prompt = _ids(work.prompt, "prompt", vocabulary)
    _ids(work.closing, "closing", vocabulary)
    if not len(prompt) and (sampling.max_tokens == 0 or stream is None or stream.cache.last_logits is None):
        raise InvalidRequest("The prompt is empty: expected at least one token to read.", param="prompt")
    return prompt


def _ids(values: Sequence[int] | Tensor, name: str, vocabulary: int) -> Tensor:
    try:
        ids = values.detach().cpu() if isinstance(values, Tensor) else torch.tensor(list(values))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidRequest(f"{name}: expected token ids ({error}).", param=name) from error
    if not ids.numel():
        return torch.zeros(0, dtype=torch.long)
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidRequest(f"{name}: expected one list of token ids.", param=name)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InvalidRequest(f"{name}: token ids run from {low} to {high}, expected 0 to {vocabulary - 1}.", param=name)
    return ids.long()
