"""The host's loss without the logits of a whole sample, which are the largest tensor of a long one.

While it is on, the host's head hands its input on, so that what the segments give is hidden states, and the host's loss
puts the head on a chunk of tokens at a time. The numbers are those of the usual loss.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from ..core.errors import ConfigError, UnsupportedError
from ..hosts import base_model
from ..ops.chunked_cross_entropy import chunked_cross_entropy


class ChunkedLoss:
    """Loss of `model` over `chunk` tokens at a time. Works with replay, checkpointing, DDP and FSDP2.

    Raises:
        ConfigError: a chunk below 1. UnsupportedError: a memory that mixes logits, a host whose logits are not its
        head's (soft-capped ones) or whose loss is not the usual one, or a compiled step.
    """

    def __init__(self, model: Any, chunk: int):
        base = base_model(model)
        host = base.mnemic.host_class.__name__
        if not isinstance(chunk, int) or chunk < 1:
            raise ConfigError(f"chunked_loss = {chunk!r}, expected a number of tokens of at least 1.")
        if base.memory.uses("logits"):
            raise UnsupportedError(
                f"chunked_loss: the memory {base.memory.name!r} changes logits, so it needs them all."
            )
        if base.loss_function is not ForCausalLMLoss:
            raise UnsupportedError(f"chunked_loss: {host} has a loss of its own ({base.loss_function}); leave it out.")
        if base.mnemic.step is not None:
            raise UnsupportedError("chunked_loss: the compiled step holds the head; use compile_step or chunked_loss.")
        self.base, self.chunk, self.bare = base, chunk, False
        self._check(host)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Forward and backward pass in here take the loss in chunks; outputs have hidden states for logits."""
        head = self.base.get_output_embeddings()
        own = head.forward
        self.base.loss_function, self.bare = self._loss, True
        try:
            with _forward(head, lambda x: x if self.bare else own(x)):
                yield
        finally:
            self.bare = False
            del self.base._loss_function

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As transformers' loss of causal language models, from hidden states in place of logits."""
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        count = num_items_in_batch
        count = count.to(logits.device) if isinstance(count, Tensor) else count
        return chunked_cross_entropy(
            logits, self._head, shift_labels.to(logits.device), self.chunk, count, ignore_index
        )

    def _head(self, hidden: Tensor) -> Tensor:
        # Called as a module: FSDP2 gathers its weights, adapters and hooks take part.
        self.bare, before = False, self.bare
        try:
            return self.base.get_output_embeddings()(hidden)
        finally:
            self.bare = before

    def _check(self, host: str) -> None:
        """What the host makes of its head's output must be that output, or a multiple of it."""
        head, given = self.base.get_output_embeddings(), []

        def wide(x: Tensor) -> Tensor:
            # As large as only capped logits would not be.
            given.append(torch.linspace(-1e4, 1e4, x.numel(), dtype=x.dtype, device=x.device).view_as(x))
            return given[-1]

        ids = torch.zeros(1, 2, dtype=torch.long, device=self.base.device)
        with torch.no_grad(), _forward(head, wide):
            found = self.base.mnemic.host_class.forward(self.base, input_ids=ids, use_cache=False).logits
        scale = found.flatten()[-1] / given[-1].flatten()[-1]
        if not torch.allclose(found, scale * given[-1], rtol=1e-2) or (
            scale != 1 and getattr(head, "bias", None) is not None
        ):
            raise UnsupportedError(
                f"chunked_loss: the logits of {host} are not what its head gives (capped ones, for example); leave it "
                "out."
            )


@contextmanager
def _forward(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`function` in the place of the module's `forward`; hooks on the module run as before."""
    own = vars(module)
    placed = own.get("forward")
    own["forward"] = function
    try:
        yield
    finally:
        if placed is None:
            del own["forward"]
        else:
            own["forward"] = placed
