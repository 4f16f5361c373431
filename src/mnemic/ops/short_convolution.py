"""Depthwise causal convolution over ragged rows, with a tail that carries it from call to call.

y_t = act(sum_j w_j x_{t - K + 1 + j}) per channel, over the real tokens of a row as if the others were not there:
the short convolution in front of the queries, keys and values of linear-attention layers (Mamba, arXiv 2312.00752;
DeltaNet, arXiv 2406.06484: K = 4, SiLU, no bias).

Shapes: B batch, T tokens, C channels, K kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to here K shifted products cost less than the convolution, which also has to turn tokens and channels around.
SHORT = 64


def short_convolution(
    x: Tensor, weight: Tensor, tail: Tensor, real: Tensor | None = None, activation: bool = True
) -> tuple[Tensor, Tensor]:
    """Convolve the real tokens of each row behind its tail.

    Args:
        x: (B, T, C). weight: (C, K), the last column meets the current token.
        tail: (B, K - 1, C), the last K - 1 real inputs before this call, oldest first; zeros at the start of a row.
        real: (B, T) bool, True for tokens that count, anywhere in the row; None: all count. Rows whose real tokens
            come first cost nothing extra. The answer is looked up on the host, which waits for a GPU once; not for
            T = 1.
        activation: apply SiLU.

    Returns: y (B, T, C) in the dtype of x, also under autocast, finite at tokens that are not real; and the new tail
    in the dtype of the old. No argument is changed.

    Raises: ValueError where shapes do not fit.
    """
    batch, tokens, channels = x.shape
    kernel = weight.shape[-1]
    if kernel < 1 or weight.shape != (channels, kernel):
        raise ValueError(
            f"weight must be ({channels} channels, kernel >= 1) for x {tuple(x.shape)}: it is {weight.shape}."
        )
    if tail.shape != (batch, kernel - 1, channels):
        raise ValueError(
            f"tail must have shape {(batch, kernel - 1, channels)}, not {tuple(tail.shape)}: kernel - 1 inputs a row, "
            "zeros before the first call."
        )
    if real is not None:
        if real.shape != (batch, tokens) or real.dtype != torch.bool:
            raise ValueError(f"real must be bool {(batch, tokens)}, not {real.dtype} {tuple(real.shape)}.")
        x = x.masked_fill(~real.unsqueeze(-1), 0)
    if tokens == 0:
        return x, tail

    back = None
    if real is not None and tokens > 1 and bool((real[:, 1:] > real[:, :-1]).any()):
        # Real tokens move to the front of their row, their order kept; afterwards each output goes back to its place.
        x = _take(x, real.logical_not().long().argsort(dim=1, stable=True))
        back = (real.long().cumsum(1) - 1).clamp_(min=0)

    line = torch.cat((tail.to(x.dtype), x), 1)
    y = _convolve(line, weight.to(x.dtype), tokens)
    if activation:
        y = F.silu(y)
    if back is not None:
        y = _take(y, back)
    if real is None:
        new_tail = line[:, tokens:]
    else:
        last = torch.arange(kernel - 1, device=x.device)
        new_tail = _take(line, real.sum(1, keepdim=True) + last)
    return y, new_tail.to(tail.dtype)


def naive_short_convolution(
    x: Tensor, weight: Tensor, tail: Tensor, real: Tensor | None = None, activation: bool = True
) -> tuple[Tensor, Tensor]:
    """Reference: token by token; zeros at tokens that are not real."""
    batch, tokens, _ = x.shape
    kernel = weight.shape[-1]
    rows, tails = [], []
    for b in range(batch):
        seen, row = list(tail[b]), []
        for t in range(tokens):
            if real is not None and not real[b, t]:
                row.append(torch.zeros_like(x[b, t]))
                continue
            seen.append(x[b, t])
            y = torch.stack([weight[:, j] * seen[len(seen) - kernel + j] for j in range(kernel)]).sum(0)
            row.append(y * y.sigmoid() if activation else y)
        rows.append(torch.stack(row))
        tails.append(torch.stack(seen[len(seen) - kernel + 1 :]) if kernel > 1 else tail[b])
    return torch.stack(rows), torch.stack(tails)


def _convolve(line: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """(B, K - 1 + T, C), (C, K) -> (B, T, C)."""
    if tokens > SHORT:
        # Autocast would round the inputs of the convolution but not those of the products below.
        with torch.autocast(line.device.type, enabled=False):
            return F.conv1d(line.mT, weight.unsqueeze(1), groups=weight.shape[0]).mT
    columns = weight.unbind(1)
    y = line[:, :tokens] * columns[0]
    for j, column in enumerate(columns[1:], 1):
        y = torch.addcmul(y, line[:, j : j + tokens], column)
    return y


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of each row by index: x (B, L, C), index (B, M) -> (B, M, C). Whole rows move, unlike in gather."""
    offset = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, (index + offset).flatten()).unflatten(0, index.shape)
