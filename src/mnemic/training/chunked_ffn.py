"""Feed-forward in chunks: a block's feed-forward part over a chunk of tokens at a time, made again when it is needed.

What is kept for the backward pass is its input; its wide inner tensors exist for one chunk only. The numbers are the
same. Source: Blockwise Parallel Transformer (2023, arXiv 2305.19370), which does so for the attention too; fused
attention keeps none of its inner tensors already.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import ConfigError, HostError, UnsupportedError
from ..hosts import base_model
from ..hosts.anatomy import examine, feed_forward_of
from ..hosts.probe import evaluating


class ChunkedFFN:
    """The `forward` of a feed-forward module whose tokens do not see each other; its weights, hooks and adapters
    stay where they are."""

    def __init__(self, module: nn.Module, chunk: int):
        self.module, self.chunk = module, chunk

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, T, d) -> (B, T, d), or (T, d) -> (T, d)."""
        if not torch.is_grad_enabled() or x.shape[-2] <= self.chunk:
            return self.own(x)
        parts = x.split(self.chunk, dim=-2)
        return torch.cat([checkpoint(self._part, part, use_reentrant=False) for part in parts], dim=-2)

    def _part(self, x: Tensor) -> Tensor:
        # Some feed-forward parts insist on it; the copy is not kept.
        return self.own(x.contiguous())

    def own(self, x: Tensor) -> Tensor:
        return type(self.module).forward(self.module, x)


def chunk_feed_forward(model: Any, chunk: int) -> None:
    """Run the feed-forward part of every block of a host, with or without a memory, over `chunk` tokens at a time.

    Raises:
        ConfigError: a chunk below 1. UnsupportedError: experts, whose balance is counted over all tokens, or a memory
        that takes part in the feed-forward. HostError: a block without a feed-forward module of its own.
    """
    base = base_model(model)
    name = getattr(getattr(base, "mnemic", None), "host_class", type(base)).__name__
    if not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(f"chunk = {chunk!r}, expected a number of tokens of at least 1.")
    modules = [feed_forward_of(name, block) for block in _layers(base)]
    for module in modules:
        if "forward" in vars(module):
            raise UnsupportedError(
                f"The feed-forward parts of {name} are run by other code (a memory in their place, or chunks already); "
                "save their activations by layer, with gradient checkpointing."
            )
        if any("expert" in n or "router" in n for n, _ in module.named_modules()):
            raise UnsupportedError(
                f"{name} has experts in its feed-forward part, whose balance is counted over all tokens; save "
                "activations by layer, with gradient checkpointing."
            )
    with evaluating(base), torch.no_grad():
        _check(name, modules[0], base)
    for module in modules:
        vars(module)["forward"] = ChunkedFFN(module, chunk)


def _check(name: str, module: nn.Module, base: Any) -> None:
    width = base.config.get_text_config(decoder=True).hidden_size
    probe = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(base.device, base.dtype)
    whole = module(probe)
    if not isinstance(whole, Tensor) or whole.shape != probe.shape:
        raise HostError(f"The feed-forward part of {name} returns more than one tensor, so it cannot be cut.")
    if not torch.allclose(whole, torch.cat([module(p) for p in probe.split(1, dim=1)], dim=1), atol=1e-3, rtol=1e-2):
        raise HostError(f"The feed-forward part of {name} mixes tokens, so it cannot be cut.")


def _layers(base: Any) -> list[nn.Module]:
    stack = base.mnemic.stack if hasattr(base, "mnemic") else examine(base).stack
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    return next(list(m) for m in stack.children() if isinstance(m, nn.ModuleList) and len(m) == count)
