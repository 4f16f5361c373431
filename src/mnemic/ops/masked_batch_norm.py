"""Batch normalisation that padding does not enter."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedBatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d over the last dimension whose statistics, batch and running, are those of the real positions.

    Real positions are picked before anything is computed, so whatever stands in the padding, NaN included, changes
    no bit of their outputs, of the running statistics or of a gradient. Picking them makes the host wait for the
    device to count them; without a mask nothing waits.
    """

    def forward(self, input: Tensor, real: Tensor | None = None, track: bool = True) -> Tensor:
        """Normalise.

        Args:
            input: (..., C).
            real: (...) bool, False for padding. None: all are real.
            track: in training, move the running statistics; False for the replay of a batch that was counted.

        Returns: (..., C), 0 where there is padding.

        Raises: ValueError if `real` is not a bool tensor with the leading shape of `input`, or if there are fewer
        than two real positions to take statistics from.
        """
        positions = input.reshape(-1, input.shape[-1])
        if real is None:
            self._check_count(len(positions))
            return self._normal(positions, track).view(input.shape)
        if real.dtype != torch.bool or real.shape != input.shape[:-1]:
            raise ValueError(
                f"The mask must be bool with shape {tuple(input.shape[:-1])}, True for real positions; it is "
                f"{real.dtype} with shape {tuple(real.shape)}. Convert it with .bool() and drop added dimensions."
            )
        kept = real.reshape(-1).nonzero().squeeze(-1)
        self._check_count(len(kept))
        normal = self._normal(positions.index_select(0, kept), track)
        return normal.new_zeros(positions.shape).index_copy(0, kept, normal).view(input.shape)

    def _normal(self, positions: Tensor, track: bool) -> Tensor:
        if track or not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(positions)
        # Copies, not None: a replay must save as many tensors as the first pass.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(positions, mean, var, self.weight, self.bias, training=True, eps=self.eps)

    def _check_count(self, count: int) -> None:
        if count < 2 and (self.training or self.running_mean is None):
            raise ValueError(
                f"Batch statistics need at least two real positions; there are {count}. "
                "Use a larger batch, or eval() to normalise by the running statistics."
            )
