"""No memory: the host alone, read segment by segment like every memory, so that only the memory differs.

Each segment is a fresh context; nothing is carried from one to the next.
"""

from dataclasses import dataclass

from ...core.memory import Memory, MemoryConfig


@dataclass(frozen=True, kw_only=True)
class NoneConfig(MemoryConfig):
    name = "none"


class NoMemory(Memory):
    name = "none"
    config_class = NoneConfig
    paper = "baseline: the host alone"
    state_size = "0"

    @property
    def identity_at_attach(self) -> bool:
        return True
