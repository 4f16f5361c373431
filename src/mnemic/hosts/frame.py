"""Frame: what the hooks of one step may see, and what they leave behind.

It travels through the host as the keyword argument `memory_frame`, so that a layer replayed by activation
checkpointing meets the same values again. Hooks are empty objects: they hold no reference to a model or memory, and
a deep copy of the model copies them rightly.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.memory import Memory, Trace

KEYWORD = "memory_frame"


class Frame:
    """One step: the memory and its prepared reads go in; traces and the last hidden state come out."""

    def __init__(self, memory: Memory, reads: Mapping[str, Tensor]):
        self.memory, self.reads = memory, reads
        self.trace: dict[int, Trace] = {}
        self.hidden: Tensor | None = None


class ResidualHook:
    """Forward hook of an attention module: the memory's part joins what attention adds to the residual stream."""

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        frame = kwargs.get(KEYWORD)
        if frame is None:
            return None
        x = output[0] if isinstance(output, tuple) else output
        source = args[0] if args else kwargs["hidden_states"]
        x, trace = frame.memory.residual(x, source, self.layer, frame.reads | _before(frame, self.layer))
        frame.trace[self.layer] = trace
        return (x, *output[1:]) if isinstance(output, tuple) else x


class LastHiddenHook:
    """Forward hook of the module that runs the layers: keeps its last hidden state for memory tokens."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        frame = kwargs.get(KEYWORD)
        if frame is not None:
            frame.hidden = output[0]


def _before(frame: Frame, layer: int) -> dict[str, Tensor]:
    """What the memory's previous block left, for memories that hand something up through the blocks."""
    earlier = [i for i in frame.trace if i < layer]
    return {f"below/{name}": t for name, t in frame.trace[max(earlier)].items()} if earlier else {}
