"""Right-aligned segments: a row's last segment is full, its first may be short.

What ends a text (a question, the token to classify) then never stands in a segment of its own, and all rows of a batch
end in the same step, however long they are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def right_aligned(lengths: Tensor, segment: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Per step, where each row's segment begins and how many tokens it has: `offset` and `take`, (B,) int64.

    lengths: (B,) int64, at least one of them above 0. Rows with fewer segments begin later, with a take of 0 until
    then; in every step some row reads.
    """
    steps = -(-int(lengths.max()) // segment)
    for left in reversed(range(steps)):
        stop = lengths - left * segment
        offset = (stop - segment).clamp_min(0)
        yield offset, (stop - offset).clamp_min(0)


def segments_of(lengths: Tensor, segment: int) -> Tensor:
    """Number of segments of each row, (B,)."""
    return torch.div(lengths + segment - 1, segment, rounding_mode="floor")
