"""Ring attention in a transformers model: an attention function, and a mask function that drops no mask in silence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..core.errors import UnsupportedError
from .ring import Sharding, ring_attention

NAME = "mnemic_ring"


@contextmanager
def over_ring(model: PreTrainedModel, sharding: Sharding, group: Any = None) -> Iterator[None]:
    """Forward and backward passes of `model` in here read `sharding.shard(...)` of each batch.

    Gradients are this process's part: sum them over the processes. For models without memory: a memory reads its
    segments in order, and no process has them all.

    Raises:
        UnsupportedError: a model with memory; in the forward pass, attention that is not plainly causal.
    """
    if hasattr(model, "mnemic"):
        name = getattr(model.memory, "name", "")
        raise UnsupportedError(
            f"The memory {name!r} reads its segments in order, and of a cut sequence no process has them "
            "all; shard the batch instead (DDP or FSDP2), or detach the memory."
        )
    config = model.config
    before = config._attn_implementation

    def function(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        refused = {"sliding_window": kwargs.get("sliding_window"), "softcap": kwargs.get("softcap")}
        refused |= {"dropout": kwargs.get("dropout") or None, "mask": attention_mask, "sinks": kwargs.get("s_aux")}
        if found := [name for name, value in refused.items() if value is not None]:
            raise UnsupportedError(
                f"{type(module).__name__} attends with {', '.join(found)}, which ring attention cannot honour; use a "
                "model of plain causal attention, without dropout and padding."
            )
        out, _ = ring_attention(query, key, value, sharding, scale=kwargs.get("scaling"), group=group)
        return out.transpose(1, 2), None

    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, _mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedError("Ring attention is causal over the whole sequence: rows with padding are refused.")
