"""A first-in-first-out bank whose new rows are gated with the newest one.

L banks side by side, batch B, m rows of a bank (oldest first), n candidates, width d. For each candidate c in order,
with `old` the newest row: g = sigmoid([c ; old] W + b), the new row is g c + (1 - g) old, and the oldest row is
dropped. An empty bank is zeros.
"""

import torch
from torch import Tensor


def push(candidates: Tensor, bank: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The banks (L, B, m, d), m at least 1, after candidates (L, B, n, d). weight: (L, 2 d, d). bias: (L, d)."""
    width = candidates.shape[-1]
    # One product for all candidates: only what the old row says has to wait for it.
    given = torch.baddbmm(bias[:, None], candidates.flatten(1, 2), weight[:, :width]).view_as(candidates)
    old, rows = bank[:, :, -1], []
    for candidate, drive in zip(candidates.unbind(2), given.unbind(2), strict=True):
        gate = torch.sigmoid(torch.baddbmm(drive, old, weight[:, width:]))
        old = torch.lerp(old, candidate, gate)
        rows.append(old)
    return torch.cat([bank, torch.stack(rows, dim=2)], dim=2)[:, :, -bank.shape[2] :]
