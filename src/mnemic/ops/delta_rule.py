"""The gated delta rule: a matrix per head that maps keys to values, decayed, corrected and read at every token.

Per head, with state S (d_k, d_v):  S <- exp(g) S;  S <- S + beta k (v - S^T k)^T;  o = S^T q, after the write.
g = None (0 everywhere) is the plain delta rule. erase=False writes beta k v^T and erases nothing: gated linear
attention, the write of Mamba2. Queries are taken as they come: scale them, and normalise keys, before the call.

Sources: DeltaNet (arXiv 2406.06484, the chunk form by the WY representation), Gated DeltaNet (arXiv 2412.06464,
the chunk form with decay), Mamba2 (arXiv 2405.21060). Both delta papers print S transposed.

Shapes: B batch, T tokens, h heads, C chunk, N chunks. q, k (B, T, h, d_k); v (B, T, h, d_v); beta, log_decay
(B, T, h), log_decay finite and <= 0 or None; state (B, h, d_k, d_v); real (B, T) bool or None. A token that is not
real, wherever it stands, changes no state and gives zeros, whatever it holds. Grouped values: repeat q and k before.

Every function returns o (B, T, h, d_v) in the dtype of v and the state after the last real token. Arithmetic and
returned state are float32, or float64 if an argument is float64, also under autocast. No argument is changed.
All raise ValueError where shapes do not fit.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Result = tuple[Tensor, Tensor]

# Up to here a loop over tokens costs less than one chunk (4 heads of 64; wider heads and batches cross earlier).
SHORT = 4
# Up to here flash-linear-attention's own layers choose its recurrent kernel.
KERNEL_SHORT = 64
# The widest key that flash-linear-attention's chunk kernels take.
KERNEL_MAX_KEY = 256


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension: a zero vector stays zero, with a finite gradient."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    erase: bool = True,
    real: Tensor | None = None,
    kernel: Literal["auto", "torch"] = "auto",
) -> Result:
    """The form that suits the call; arguments and results as in the head of this file.

    auto: half-precision values on CUDA go to flash-linear-attention where it is installed (state float32,
    d_k <= 256; queries and keys are rounded to the dtype of v). Everything else, and torch: `recurrent` for up to 4
    tokens that need no gradient, `chunked` otherwise.

    Raises: ValueError for shapes that do not fit or an unknown kernel.
    """
    if kernel not in ("auto", "torch"):
        raise ValueError(f"Unknown kernel {kernel!r}: expected 'auto' or 'torch'.")
    inputs = (q, k, v, beta, log_decay, state)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    fits = v.dtype in (torch.bfloat16, torch.float16) and state.dtype == torch.float32
    if kernel == "auto" and q.is_cuda and fits and q.shape[1] > 0 and q.shape[-1] <= KERNEL_MAX_KEY:
        short = q.shape[1] <= KERNEL_SHORT and not needs_grad
        result = _flash_linear_attention(*inputs, erase, real, short)
        if result is not None:
            return result
    if q.shape[1] <= SHORT and not needs_grad:
        return recurrent(*inputs, erase=erase, real=real)
    return chunked(*inputs, erase=erase, real=real)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    erase: bool = True,
    real: Tensor | None = None,
) -> Result:
    """One token after another: for decoding. Arguments and results as in the head of this file."""
    _check(q, k, v, beta, log_decay, state, real)
    batch, tokens, heads, d_k = q.shape
    out_dtype, d_v, rows = v.dtype, v.shape[-1], batch * heads
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_decay = _only_real(q, k, v, beta, log_decay, real)
        q, k, v, beta, log_decay, state = _widened(q, k, v, beta, log_decay, state)
        if tokens == 0:
            return v.to(out_dtype), state
        # S^T q after the write is exp(g) S^T q + (k . q) delta, so that q and k read the old state in one product.
        readers = torch.stack((q, k), -2).transpose(0, 1).reshape(tokens, rows, 2, d_k).unbind(0)
        keys = k.transpose(0, 1).reshape(tokens, rows, d_k, 1).unbind(0)
        values = v.transpose(0, 1).reshape(tokens, rows, 1, d_v).unbind(0)
        overlaps = (q * k).sum(-1).transpose(0, 1).reshape(tokens, rows, 1, 1).unbind(0)
        rates = beta.transpose(0, 1).reshape(tokens, rows, 1, 1).unbind(0)
        decays = None
        if log_decay is not None:
            decays = log_decay.exp().transpose(0, 1).reshape(tokens, rows, 1, 1).unbind(0)
        s = state.flatten(0, 1)
        outputs = []
        for t in range(tokens):
            read = readers[t] @ s
            if decays is not None:
                read = read * decays[t]
                s = s * decays[t]
            delta = (values[t] - read[:, 1:] if erase else values[t]) * rates[t]
            outputs.append(torch.addcmul(read[:, :1], overlaps[t], delta))
            s = torch.baddbmm(s, keys[t], delta)
        o = torch.stack(outputs).view(tokens, batch, heads, d_v).transpose(0, 1)
        return o.to(out_dtype), s.unflatten(0, (batch, heads))


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    chunk: int = 64,
    *,
    erase: bool = True,
    real: Tensor | None = None,
) -> Result:
    """All chunks at once but for a light scan of the states: for training. The result does not depend on `chunk`.

    With G = cumsum(g) in a chunk, Gam_ij = exp(G_i - G_j) for i >= j else 0, b = beta:
    A = I + stril(diag(b) K K^T o Gam);  [U, W] = A^-1 diag(b) [V, K e^G], for all chunks in one solve;
    then chunk by chunk D = U - W S, S <- e^{G_C} S + (K e^{G_C - G})^T D;
    then for all chunks O = (Q e^G) S + (Q K^T o Gam) D. Without erasing, D = diag(b) V.
    Rounding adds a relative error of about |G_C| times that of the dtype: recurrent is the finer one at strong decay.
    """
    _check(q, k, v, beta, log_decay, state, real)
    if chunk < 1:
        raise ValueError(f"A chunk has at least one token: chunk={chunk}.")
    batch, tokens, heads, _ = q.shape
    out_dtype, d_v = v.dtype, v.shape[-1]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_decay = _only_real(q, k, v, beta, log_decay, real)
        q, k, v, beta, log_decay, state = _widened(q, k, v, beta, log_decay, state)
        if tokens == 0:
            return v.to(out_dtype), state
        chunk = min(chunk, tokens)
        q, k, v, beta = (_to_chunks(x, chunk) for x in (q, k, v, beta.unsqueeze(-1)))
        scores, k_beta, d = q @ k.mT, k * beta, v * beta
        between = enter = leave = whole = None
        if log_decay is None:
            scores = scores.tril()
        else:
            total = _to_chunks(log_decay.unsqueeze(-1), chunk).cumsum(-2)
            # Above the diagonal the exponent is positive and would overflow: it is masked before exp too. -80 stands
            # for all below it, because exp is many times slower where it underflows (also for a mask of -inf).
            between = (total - total.mT).tril().clamp(min=-80).exp().tril()
            enter, leave = total.exp(), (total[..., -1:, :] - total).exp()
            whole = enter[..., -1:, :].unbind(0)
            scores = scores * between
        k_out = k if leave is None else k * leave
        starts = []
        s = state.flatten(0, 1)
        if erase:
            # The solve reads only what is strictly below the diagonal.
            system = k_beta @ k.mT if between is None else (k_beta @ k.mT) * between
            right = torch.cat((d, k_beta if enter is None else k_beta * enter), -1)
            solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
            u, w, k_out = solved[..., :d_v].unbind(0), solved[..., d_v:].unbind(0), k_out.mT.unbind(0)
            deltas = []
            for n in range(len(u)):
                starts.append(s)
                deltas.append(torch.baddbmm(u[n], w[n], s, alpha=-1))
                s = torch.baddbmm(s if whole is None else s * whole[n], k_out[n], deltas[n])
            d = torch.stack(deltas)
        else:
            for n, written in enumerate((k_out.mT @ d).unbind(0)):
                starts.append(s)
                s = s + written if whole is None else torch.addcmul(written, s, whole[n])
        o = (q if enter is None else q * enter) @ torch.stack(starts) + scores @ d
        o = o.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        return o[:, :tokens].to(out_dtype), s.unflatten(0, (batch, heads))


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    erase: bool = True,
    real: Tensor | None = None,
) -> Result:
    """Reference of the others: the definition, token by token and head by head, in the dtype of its arguments."""
    batch, tokens, heads, _ = q.shape
    out = [[[torch.zeros_like(v[0, 0, 0])] * heads for _ in range(tokens)] for _ in range(batch)]
    last = []
    for b in range(batch):
        for a in range(heads):
            s = state[b, a]
            for t in range(tokens):
                if real is not None and not real[b, t]:
                    continue
                key, value = k[b, t, a], v[b, t, a]
                if log_decay is not None:
                    s = log_decay[b, t, a].exp() * s
                old = s.T @ key if erase else torch.zeros_like(value)
                s = s + beta[b, t, a] * torch.outer(key, value - old)
                out[b][t][a] = s.T @ q[b, t, a]
            last.append(s)
    o = torch.stack([torch.stack([torch.stack(row) for row in rows]) for rows in out])
    return o, torch.stack(last).view_as(state)


def _check(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, real: Tensor | None
) -> None:
    if q.dim() != 4:
        raise ValueError(f"Queries are (batch, tokens, heads, d_k): q has shape {tuple(q.shape)}.")
    batch, tokens, heads, d_k = q.shape
    d_v = v.shape[-1]
    for name, tensor, shape in (
        ("k", k, (batch, tokens, heads, d_k)),
        ("v", v, (batch, tokens, heads, d_v)),
        ("beta", beta, (batch, tokens, heads)),
        ("log_decay", log_decay, (batch, tokens, heads)),
        ("state", state, (batch, heads, d_k, d_v)),
        ("real", real, (batch, tokens)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"With q {tuple(q.shape)} and v {tuple(v.shape)}, {name} must have shape {shape}, not "
                f"{tuple(tensor.shape)}. Where values have more heads than keys, repeat q and k first."
            )
    if real is not None and real.dtype != torch.bool:
        raise ValueError(f"real must be a bool tensor, not {real.dtype}: pass real.bool().")


def _only_real(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, real: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    if real is None:
        return q, k, v, beta, log_decay
    pad = ~real.unsqueeze(-1)
    # beta = 0 and no decay suffice for finite inputs; zero q, k and v as well keep what pads hold (NaN) from spreading.
    q, k, v = (x.masked_fill(pad.unsqueeze(-1), 0) for x in (q, k, v))
    return q, k, v, beta.masked_fill(pad, 0), None if log_decay is None else log_decay.masked_fill(pad, 0)


def _widened(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    inputs = (q, k, v, beta, log_decay, state)
    wide = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in inputs) else torch.float32
    decay = None if log_decay is None else log_decay.to(wide)
    return q.to(wide), k.to(wide), v.to(wide), beta.to(wide), decay, state.to(wide)


def _to_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, T, h, d) -> (N, B h, C, d), zeros after the last token."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk)) if x.shape[1] % chunk else x
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


def _flash_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    erase: bool,
    real: Tensor | None,
    short: bool,
) -> Result | None:
    """The library's kernels; None where it is not installed. Only for a GPU: without one its Triton breaks others."""
    try:
        from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
            chunk_gated_delta_rule,
            fused_recurrent_gated_delta_rule,
        )
        from fla.ops.simple_gla import (  # pyright: ignore[reportMissingImports]
            chunk_simple_gla,
            fused_recurrent_simple_gla,
        )
    except ImportError:
        return None
    _check(q, k, v, beta, log_decay, state, real)
    dtype = v.dtype
    if log_decay is None:
        log_decay = torch.zeros_like(beta, dtype=torch.float32)
    q, k, v, beta, log_decay = _only_real(q, k, v, beta, log_decay, real)
    q, k = q.to(dtype), k.to(dtype)
    options = {"g": log_decay, "scale": 1.0, "initial_state": state, "output_final_state": True}
    if erase:
        run = fused_recurrent_gated_delta_rule if short else chunk_gated_delta_rule
        return run(q, k, v, beta=beta, **options)
    run = fused_recurrent_simple_gla if short else chunk_simple_gla
    return run(q, k, (v * beta.unsqueeze(-1)).to(dtype), **options)
