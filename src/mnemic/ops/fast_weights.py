"""Fast weights: small networks whose weights are a state, trained token by token inside the forward pass.

Titans (arXiv 2501.00663), Eq 8-15. Per row and head a memory M with layers W_1..W_L, without biases:

    M(x) = [x +] W_L gelu(... gelu(W_1 x))                  the residual x is there by default from L = 2 on
    S_t = eta_t S_{t-1} - theta_t s_t g_t                   momentum
    W_t = (1 - alpha_t) W_{t-1} + alpha_t W_to + S_t        W_to is 0 unless `decay_to` is given
    y_t = M(q_t; W_t)                                       the read sees the write of its own token

g_t is the gradient of the inner loss l(M(k_t) - v_t) at the weights from the START of the chunk that holds t, so the
chunk length b is part of the model, not a matter of speed; b = 1 is the exact rule. s_t is 1, or with `max_norm` c
the soft clamp s_t = (1 + |g_t|^2 / c^2)^(-1/2) with |g_t| the norm over all layers, so that |s_t g_t| < c.

In layer l, g_t is the outer product of an error e_t and an activation a_t (key side). With per-token scalars

    beta_t = prod (1 - alpha),  m_t = prod eta,  G and N lower triangular (`_schedule`),

a chunk that starts at (W, S) needs no weights of single tokens: W_t x = beta_t W x + f_t S x - sum_j G_tj e_j (a_j x).

Shapes: B rows, T tokens, h heads, d width, b chunk length, C chunks, R = B h. W_l is (B, h, out_l, in_l).
`naive` says the same with loops and autograd; it is the reference of the tests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunk_grid import chunk_grid

Layers = tuple[Tensor, ...]
Loss = Literal["half_sum", "sum", "mean"]

# Numbers in a (rows, chunks, b, b) table that may exist at once: bounds the memory of long calls without gradients.
_TABLE = 2**23


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the numbers mean: a state made under one rule continues only under the same.

    chunk: tokens that share the weights at which their gradients are taken.
    loss: half_sum is 1/2 |M(k) - v|^2, sum is twice that, mean is the sum divided by the width of v.
    residual: M adds its input. None: from two layers on.
    max_norm: bound of the inner gradient norm of each token; None: no bound.
    """

    chunk: int
    loss: Loss = "half_sum"
    residual: bool | None = None
    max_norm: float | None = None

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"A chunk holds at least one token, not {self.chunk}.")
        if self.loss not in ("half_sum", "sum", "mean"):
            raise ValueError(f"Unknown inner loss {self.loss!r}: half_sum, sum or mean.")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm is a positive number or None, not {self.max_norm}.")

    def adds_input(self, depth: int) -> bool:
        return depth > 1 if self.residual is None else self.residual

    def scale(self, width: int) -> float:
        """d loss / d M(k) divided by M(k) - v."""
        return {"half_sum": 1.0, "sum": 2.0, "mean": 2.0 / width}[self.loss]


class FastWeights(NamedTuple):
    """The state: 3 P numbers per row and head, P of one memory.

    weights, momentum, start (the weights at the start of the open chunk): tuples of (B, h, out_l, in_l) by layer.
    position: (B,) int64, tokens in the open chunk, 0 <= position < chunk. At 0, start equals weights.
    """

    weights: Layers
    momentum: Layers
    start: Layers
    position: Tensor

    def named(self) -> dict[str, Tensor]:
        """Flat: w1, s1, c1, w2, ... and n."""
        parts = zip("wsc", self[:3], strict=True)
        return {f"{letter}{i + 1}": t for letter, part in parts for i, t in enumerate(part)} | {"n": self.position}

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> "FastWeights":
        """Inverse of `named`; KeyError where a tensor is missing. Other names are left alone."""
        depth = next(i for i in range(len(named) + 1) if f"w{i + 1}" not in named)
        w, s, c = (tuple(named[f"{letter}{i + 1}"] for i in range(depth)) for letter in "wsc")
        return cls(w, s, c, named["n"])


def first(weights: Layers, batch: int) -> FastWeights:
    """The state before the first token: every row at the learned weights, a tuple of (h, out_l, in_l), no momentum."""
    if not weights or any(a.shape[-2] != b.shape[-1] for a, b in pairwise(weights)):
        raise ValueError(f"Memory layers must chain, (h, out, in) each; got {[tuple(w.shape) for w in weights]}.")
    rows = tuple(w.expand(batch, *w.shape) for w in weights)
    zeros = tuple(torch.zeros_like(w, memory_format=torch.contiguous_format) for w in rows)
    return FastWeights(rows, zeros, rows, torch.zeros(batch, dtype=torch.int64, device=weights[0].device))


def read(query: Tensor, state: FastWeights, rule: Rule) -> Tensor:
    """M(q; W), nothing is written. query (B, T, h, in_1); returns (B, T, h, out_L) in its dtype."""
    with torch.autocast(query.device.type, enabled=False):
        x = given = query.transpose(1, 2).to(state.weights[0].dtype)
        for i, w in enumerate(state.weights):
            x = (F.gelu(x) if i else x) @ w.mT
        x = x + given if rule.adds_input(len(state.weights)) else x
        return x.transpose(1, 2).to(query.dtype)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    theta: Tensor,
    alpha: Tensor,
    state: FastWeights,
    rule: Rule,
    *,
    real: Tensor | None = None,
    decay_to: Layers | None = None,
) -> tuple[Tensor, FastWeights]:
    """Write T tokens and read after each. How a stream is cut into calls does not matter; rows need not be in step.

    Args:
        q, k: (B, T, h, in_1). v: (B, T, h, out_L).
        eta, theta, alpha: (B, T, h): momentum decay, learning rate, forget rate.
        state: from `first` or an earlier call; computation runs in its dtype, float32 or float64.
        real: (B, T) bool, False for tokens that change nothing, wherever they stand. None: all are real.
        decay_to: (h, out_l, in_l) by layer, the weights that alpha pulls to. None: zero.

    Returns: y (B, T, h, out_L) in the dtype of q, zero where not real, and the state after the last token.

    Raises ValueError on shapes that do not fit. Differentiable once in all inputs and the state; uses no autograd
    itself. T > 1 waits once for the device, to learn where the rows stand.
    """
    _check(q, k, v, (eta, theta, alpha), state, rule, real, decay_to)
    dtype = state.weights[0].dtype
    inputs = [x.to(dtype) for x in (q, k, v, eta, theta, alpha)]
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[1] == 1:
            y, state = _step(inputs, state, rule, real, decay_to)
        else:
            y, state = _chunks(inputs, state, rule, real, decay_to)
    return y.to(q.dtype), state


def _check(q, k, v, gates, state, rule, real, decay_to) -> None:
    batch, heads = state.weights[0].shape[:2]
    tokens, ins, outs = q.shape[1], state.weights[0].shape[-1], state.weights[-1].shape[-2]
    for name, x, width in (("q", q, ins), ("k", k, ins), ("v", v, outs)):
        if x.shape != (batch, tokens, heads, width):
            raise ValueError(
                f"{name} must be (B, T, h, width) = {(batch, tokens, heads, width)}, not {tuple(x.shape)}."
            )
    for name, x in zip(("eta", "theta", "alpha"), gates, strict=True):
        if x.shape != (batch, tokens, heads):
            raise ValueError(f"{name} must be (B, T, h) = {(batch, tokens, heads)}, not {tuple(x.shape)}.")
    if real is not None and (real.shape != (batch, tokens) or real.dtype != torch.bool):
        raise ValueError(f"real must be bool {(batch, tokens)}, not {real.dtype} {tuple(real.shape)}.")
    if rule.adds_input(len(state.weights)) and ins != outs:
        raise ValueError(f"A residual memory needs equal widths in and out, not {ins} and {outs}; use residual=False.")
    if decay_to is not None and [w.shape for w in decay_to] != [w.shape[1:] for w in state.weights]:
        raise ValueError("decay_to must hold one (h, out, in) tensor per layer, shaped as the learned weights.")


def _gradient(
    k: Tensor, target: Tensor, start: list[Tensor], scale: float, rule: Rule
) -> tuple[list[Tensor], list[Tensor]]:
    """The inner gradient in factors: activations (R, b, in_l) and errors (R, b, out_l), without theta and `scale`.

    k (R, b, in_1), target (R, b, out_L) is v - k for a residual memory, else v; start: (R, out_l, in_l).
    """
    activations, before = [k], []
    for w in start[:-1]:
        before.append(activations[-1] @ w.mT)
        activations.append(F.gelu(before[-1]))
    errors = [torch.baddbmm(target, activations[-1], start[-1].mT, beta=-1)]
    for w, z in zip(reversed(start[1:]), reversed(before), strict=True):
        # gelu_backward(e, z) is e gelu'(z) in one pass, and autograd knows its derivative.
        errors.append(torch.ops.aten.gelu_backward(errors[-1] @ w, z))
    errors.reverse()
    if rule.max_norm is not None:
        # The norm of an outer product is the product of the norms. Squares only: a zero gradient has a derivative.
        pairs = zip(errors, activations, strict=True)
        squares = torch.stack([e.square().sum(-1) * a.square().sum(-1) for e, a in pairs]).sum(0)
        clamp = (1 + squares * (scale / rule.max_norm) ** 2).rsqrt().unsqueeze(-1)
        errors = [e * clamp for e in errors]
    return activations, errors


class _Flush(torch.autograd.Function):
    """0 below the root of the smallest normal number (1e-19 in float32); derivative 1 everywhere.

    So small a share shows in no sum, but numbers below the normal ones slow the matrix products several times.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return F.hardshrink(x, torch.finfo(x.dtype).tiny ** 0.5)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


def _flush(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        # The same in plain operations, which a compiler can trace.
        return x + (F.hardshrink(x, torch.finfo(x.dtype).tiny ** 0.5) - x).detach()
    return cast(Tensor, _Flush.apply(x))


def _products(x: Tensor) -> tuple[Tensor, Tensor]:
    """Lower triangular M_ts = x_{s+1} ... x_t, (..., b, b), and the products from the first on, (..., b).

    Built by joining blocks of doubling length: no quotients and no logarithms, so zeros are exact, as are their
    derivatives.
    """
    length = x.shape[-1]
    whole = F.pad(x, (0, (1 << (length - 1).bit_length()) - length), value=1.0)[..., None]
    table = torch.ones_like(whole)[..., None]
    while whole.shape[-2] > 1:
        left, right = table.unflatten(-3, (-1, 2)).unbind(-3)
        a, b = whole.unflatten(-2, (-1, 2)).unbind(-2)
        upper = torch.cat([left, torch.zeros_like(left)], -1)
        lower = torch.cat([_flush(b[..., :, None] * left[..., -1:, :]), right], -1)
        table = torch.cat([upper, lower], -2)
        whole = torch.cat([a, _flush(a[..., -1:] * b)], -1)
    return table[..., 0, :length, :length], whole[..., 0, :length]


class _Schedule(NamedTuple):
    """Scalars of chunks; theta and the factor of the loss are inside mix, mix_end.

    With X = (W, S) at the start of the chunk, W_t x = sum_i look_ti X_i x - sum_j mix_tj e_j (a_j x), and after the
    chunk X_i = sum_k carry_ik X_k - sum_j mix_end_ji e_j a_j.
    """

    look: Tensor  # (C, R, b, 2, 1)
    mix: Tensor  # (C, R, b, b)
    carry: Tensor  # (C, R, 2, 2)
    mix_end: Tensor  # (C, R, b, 2, 1)


def _schedule(eta: Tensor, theta: Tensor, alpha: Tensor, here: Tensor | None) -> _Schedule:
    """Gates (C, R, b), already neutral (1, 0, 0) where `here` (C, R, b), 0 or 1, is 0; None: 1.

    With u = here: f_t = (1 - alpha_t) f_{t-1} + u_t m_t, and G likewise from N. A neutral token must not add S to W.
    """
    decays, keep = _products(1 - alpha)
    rolls, roll = _products(eta)
    sums = decays @ (rolls if here is None else here.unsqueeze(-1) * rolls)
    look = torch.stack([keep, eta[..., :1] * sums[..., 0]], -1)
    end, last = look[..., -1, :], roll[..., -1]
    carry = torch.stack([end, torch.stack([torch.zeros_like(last), last], -1)], -2)
    mix_end = torch.stack([sums[..., -1, :], rolls[..., -1, :]], -1) * theta.unsqueeze(-1)
    return _Schedule(look.unsqueeze(-1), sums * theta.unsqueeze(-2), carry, mix_end.unsqueeze(-1))


def _chunks(
    inputs: list[Tensor], state: FastWeights, rule: Rule, real: Tensor | None, decay_to: Layers | None
) -> tuple[Tensor, FastWeights]:
    """`run` for any T: a loop over chunks, everything else in matrix products."""
    q, k, v, eta, theta, alpha = inputs
    batch, tokens, heads = eta.shape
    if tokens == 0:
        return v, state
    grid, ends = chunk_grid(state.position, tokens, rule.chunk, real)
    scale, residual = rule.scale(v.shape[-1]), rule.adds_input(len(state.weights))
    here = None
    if not grid.full:
        here = grid.here.unflatten(1, (grid.count, -1)).permute(1, 0, 2).repeat_interleave(heads, 1).to(eta.dtype)
    q, k, v, theta, alpha = (grid.gather(x) for x in (q, k, v, theta * scale, alpha))
    eta = grid.gather(eta, neutral=1.0)
    target = v - k if residual else v
    # W and S side by side and transposed, (R, 2, in, out): one product reads both, one moves both.
    both = [torch.stack([w.mT, s.mT], 2).flatten(0, 1) for w, s in zip(state.weights, state.momentum, strict=True)]
    start = [c.flatten(0, 1) for c in state.start]
    pull = [] if decay_to is None else [_rows(t, q, batch).mT for t in decay_to]
    span = max(1, _TABLE // (batch * heads * grid.width**2))
    schedule: list[_Schedule] = []
    outputs = []
    for i, (query, key, wanted) in enumerate(zip(q.unbind(), k.unbind(), target.unbind(), strict=True)):
        if i % span == 0:
            part = slice(i, i + span)
            table = _schedule(eta[part], theta[part], alpha[part], None if here is None else here[part])
            schedule = [_Schedule(*scalars) for scalars in zip(*table, strict=True)]
        now = schedule[i % span]
        activations, errors = _gradient(key, wanted, start, scale, rule)
        outputs.append(_look(query, both, pull, activations, errors, now, residual))
        both = _advance(both, pull, activations, errors, now)
        border = (i + 1) * rule.chunk
        closed = ends >= border if isinstance(ends, Tensor) else [end >= border for end in ends]
        if isinstance(closed, list) and all(closed):
            start = [x.unbind(1)[0].mT for x in both]
        elif isinstance(closed, Tensor) or any(closed):
            mask = torch.as_tensor(closed, device=q.device).repeat_interleave(heads)[:, None, None]
            start = [torch.where(mask, x.unbind(1)[0].mT, c) for x, c in zip(both, start, strict=True)]
    y = grid.scatter(torch.stack(outputs), batch, real)
    after = state.position + (tokens if real is None else real.sum(1))
    weights, momentum = ([x.unbind(1)[part].mT.contiguous() for x in both] for part in range(2))
    return y, _state(weights, momentum, [c.contiguous() for c in start], after % rule.chunk, heads)


def _state(weights: list[Tensor], momentum: list[Tensor], start: list[Tensor], n: Tensor, heads: int) -> FastWeights:
    """From (B h, out, in)."""
    w, s, c = (tuple(t.unflatten(0, (-1, heads)) for t in part) for part in (weights, momentum, start))
    return FastWeights(w, s, c, n)


def _rows(weight: Tensor, like: Tensor, batch: int) -> Tensor:
    """(h, out, in) to (B h, out, in) in the dtype of the state."""
    return weight.to(like.dtype).expand(batch, *weight.shape).flatten(0, 1)


def _look(
    q: Tensor,
    both: list[Tensor],
    pull: list[Tensor],
    activations: list[Tensor],
    errors: list[Tensor],
    now: _Schedule,
    residual: bool,
) -> Tensor:
    """M(q_t; W_t) for the tokens of one chunk, (R, b, in_1) to (R, b, out_L)."""
    x = q
    for layer, (a, e) in enumerate(zip(activations, errors, strict=True)):
        x = F.gelu(x) if layer else x
        z = (x.unsqueeze(2) * now.look).flatten(2) @ both[layer].flatten(1, 2)
        if pull:
            z = torch.baddbmm(z, x * (1 - now.look[:, :, 0]), pull[layer])
        x = torch.baddbmm(z, (x @ a.mT) * now.mix, e, alpha=-1)
    return q + x if residual else x


def _advance(
    both: list[Tensor], pull: list[Tensor], activations: list[Tensor], errors: list[Tensor], now: _Schedule
) -> list[Tensor]:
    """Weights and momentum after a chunk, (R, 2, in, out) by layer."""
    moved = []
    for layer, (x, a, e) in enumerate(zip(both, activations, errors, strict=True)):
        carried = now.carry @ x.flatten(2)
        if pull:
            part = torch.stack([1 - now.carry[:, 0, 0], torch.zeros_like(now.carry[:, 0, 0])], -1)
            carried = torch.baddbmm(carried, part.unsqueeze(-1), pull[layer].flatten(1).unsqueeze(1))
        keys = (a.unsqueeze(2) * now.mix_end).flatten(2)
        rows = carried.view(x.shape[0], -1, x.shape[3])
        moved.append(torch.baddbmm(rows, keys.mT, e, alpha=-1).view(x.shape))
    return moved


def _step(
    inputs: list[Tensor], state: FastWeights, rule: Rule, real: Tensor | None, decay_to: Layers | None
) -> tuple[Tensor, FastWeights]:
    """`run` for T = 1: a few passes over the weights, no tables."""
    batch, heads = inputs[3].shape[0], inputs[3].shape[2]
    if real is not None:
        fills = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
        inputs = [x.masked_fill(~real.view(batch, *[1] * (x.dim() - 1)), f) for x, f in zip(inputs, fills, strict=True)]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in inputs[:3])
    eta, theta, alpha = (x.reshape(-1, 1, 1) for x in inputs[3:])
    scale, residual = rule.scale(v.shape[-1]), rule.adds_input(len(state.weights))
    weights, momentum, start = ([t.flatten(0, 1) for t in part] for part in state[:3])
    activations, errors = _gradient(k, v - k if residual else v, start, scale, rule)
    written = None if real is None else real.to(q.dtype).repeat_interleave(heads)[:, None, None]
    x = q
    for i, (a, e) in enumerate(zip(activations, errors, strict=True)):
        momentum[i] = torch.addcmul(momentum[i] * eta, (e * (theta * scale)).mT, a, value=-1)
        moved = momentum[i] if written is None else momentum[i] * written
        if decay_to is not None:
            moved = torch.addcmul(moved, _rows(decay_to[i], q, batch), alpha)
        weights[i] = torch.addcmul(moved, weights[i], 1 - alpha)
        x = (F.gelu(x) if i else x) @ weights[i].mT
    y = (x + q if residual else x).unflatten(0, (batch, heads)).transpose(1, 2)
    y = y if real is None else y.masked_fill(~real[..., None, None], 0.0)
    after = state.position + (1 if real is None else real[:, 0])
    closed = after == rule.chunk
    # On the CPU asking is free and mostly saves a pass over the weights; elsewhere asking would wait for the device.
    if closed.device.type != "cpu" or torch.compiler.is_compiling() or bool(closed.any()):
        mask = closed.repeat_interleave(heads)[:, None, None]
        start = [torch.where(mask, w, c) for w, c in zip(weights, start, strict=True)]
    return y, _state(weights, momentum, start, after.masked_fill(closed, 0), heads)


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    theta: Tensor,
    alpha: Tensor,
    state: FastWeights,
    rule: Rule,
    *,
    real: Tensor | None = None,
    decay_to: Layers | None = None,
) -> tuple[Tensor, FastWeights]:
    """Reference of `run`: rows, heads and tokens in loops, the inner gradient by autograd."""
    batch, tokens, heads = eta.shape
    residual = rule.adds_input(len(state.weights))

    def memory(x: Tensor, layers: list[Tensor]) -> Tensor:
        z = x
        for i, w in enumerate(layers):
            z = w @ (F.gelu(z) if i else z)
        return x + z if residual else z

    def loss(layers: list[Tensor], key: Tensor, value: Tensor) -> Tensor:
        squares = (memory(key, layers) - value).square()
        return {"half_sum": squares.sum() / 2, "sum": squares.sum(), "mean": squares.mean()}[rule.loss]

    ys, ends, position = [], [], state.position.clone()
    for b in range(batch):
        for h in range(heads):
            w, s, c = ([t[b, h] for t in part] for part in state[:3])
            n = int(state.position[b])
            for t in range(tokens):
                if real is not None and not real[b, t]:
                    ys.append(torch.zeros_like(v[b, t, h]))
                    continue
                with torch.enable_grad():
                    at = [x if x.requires_grad else x.detach().requires_grad_() for x in c]
                    grads = torch.autograd.grad(loss(at, k[b, t, h], v[b, t, h]), at, create_graph=True)
                if rule.max_norm is not None:
                    squares = torch.stack([g.square().sum() for g in grads]).sum()
                    grads = [g / (1 + squares / rule.max_norm**2).sqrt() for g in grads]
                for i in range(len(w)):
                    to = 0.0 if decay_to is None else decay_to[i][h]
                    s[i] = eta[b, t, h] * s[i] - theta[b, t, h] * grads[i]
                    w[i] = (1 - alpha[b, t, h]) * w[i] + alpha[b, t, h] * to + s[i]
                n += 1
                if n == rule.chunk:
                    c, n = list(w), 0
                ys.append(memory(q[b, t, h], w))
            ends.append((w, s, c))
            position[b] = n
    y = torch.stack(ys).unflatten(0, (batch, heads, tokens)).transpose(1, 2)
    w, s, c = ([torch.stack(rows) for rows in zip(*part, strict=True)] for part in zip(*ends, strict=True))
    return y, _state(w, s, c, position, heads)
