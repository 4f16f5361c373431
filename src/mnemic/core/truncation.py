"""Truncation: how far gradients reach back through the state."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .errors import ConfigError


@dataclass(frozen=True)
class Truncation:
    """Truncated back-propagation through time; without one, gradients reach every earlier segment of the call.

    tail: the state entering segment s of n is cut iff s <= n - 1 - depth, so the last loss reaches `depth` earlier
        segments (for answers at the end). chunk: it is cut iff s is a multiple of `depth` (for losses everywhere).
    A stream's learned first state is a parameter, not a past: it is never cut.
    """

    policy: Literal["tail", "chunk"]
    depth: int

    def __post_init__(self) -> None:
        lowest = 0 if self.policy == "tail" else 1
        if self.policy not in ("tail", "chunk") or self.depth < lowest:
            raise ConfigError(
                f"truncation {self.policy!r} with depth {self.depth}: expected 'tail' with depth >= 0 "
                "or 'chunk' with depth >= 1."
            )

    def cuts(self, index: Tensor, total: Tensor) -> Tensor:
        """Rows whose state is to be cut, (B,) bool; index and total are the s and n of each row, (B,)."""
        return index <= total - 1 - self.depth if self.policy == "tail" else index % self.depth == 0
