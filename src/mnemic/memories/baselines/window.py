"""Sliding window: the host, each token seeing the last `segment` tokens in every layer (Mistral, arXiv 2310.06825).

The baseline that a memory has to beat at the same attention span. Keys and values of the last tokens stay in the
cache, at their own positions; older ones are dropped. Without a cache (training) the whole call is one pass with a
banded mask. Information travels further than the window through the layers, as in any stack of sliding windows.
On hosts with a table of positions (GPT-2, OPT) reading ends with the table, as it does for the host itself.
"""

from dataclasses import dataclass

from ...core.memory import Memory, MemoryConfig


@dataclass(frozen=True, kw_only=True)
class WindowConfig(MemoryConfig):
    name = "window"


class Window(Memory):
    name = "window"
    config_class = WindowConfig
    paper = "baseline: sliding-window attention (Mistral 7B, 2023, arXiv 2310.06825)"
    state_size = "2 * L * Hkv * e * T"
    continuous = True

    @property
    def identity_at_attach(self) -> bool:
        return True

    def window(self, segment: int) -> int:
        return segment
