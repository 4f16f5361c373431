"""Titans on a llama, written with loops over rows, tokens and heads; the inner gradients are autograd's."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


class Loop:
    """The neural memory of one block and one row, token by token."""

    def __init__(self, memory, config, prefix=None):
        self.m, self.c = memory, config
        self.w = [w.clone() for w in memory.first]
        self.s = [torch.zeros_like(w) for w in memory.first]
        self.start, self.n, self.seen, self.asked = list(self.w), 0, [], []
        self.prefix_outputs = [self.write(p) for p in ([] if prefix is None else prefix)]
        if self.prefix_outputs:
            self.start, self.n = list(self.w), 0

    def convolved(self, seen: list[Tensor], part: slice) -> Tensor:
        taps = self.m.convolution[part]
        total = torch.zeros_like(seen[-1])
        for back in range(min(4, len(seen))):
            total = total + taps[:, 3 - back] * seen[-1 - back]
        return total * torch.sigmoid(total)

    def net(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        z = x
        for i, w in enumerate(weights):
            z = w @ (F.gelu(z) if i else z)
        return x + z if len(weights) > 1 else z

    def out(self, y: list[Tensor], x: Tensor) -> Tensor:
        gate = self.m.gate.weight @ x
        normed = torch.cat([rms(one) for one in y]) * self.m.norm
        return self.m.output.weight @ (normed * torch.sigmoid(gate))

    def write(self, x: Tensor) -> Tensor:
        c, h, e, d = self.c, self.m.heads, self.c.head_dim, len(x)
        self.seen.append(self.m.qkv.weight @ x)
        mixed = self.convolved(self.seen, slice(0, 3 * d))
        q, k, v = (mixed[i * d : (i + 1) * d].view(h, e) for i in range(3))
        rates = torch.sigmoid(self.m.rates.weight @ x + self.m.rates.bias)
        alpha, theta = rates[:h], rates[h : 2 * h] * c.theta_max
        eta = rates[2 * h :] if c.momentum else torch.zeros(h, dtype=x.dtype)
        moved, after, read = [], [], []
        for a in range(h):
            at = [w[a] for w in self.start]
            error = self.net(unit(k[a]), at) - v[a]
            loss = {"half_sum": error.square().sum() / 2, "sum": error.square().sum(), "mean": error.square().mean()}
            grads = torch.autograd.grad(loss[c.loss_reduction], at, create_graph=True)
            size = torch.stack([g.square().sum() for g in grads]).sum()
            if c.max_norm is not None:
                grads = [g / (1 + size / c.max_norm**2).sqrt() for g in grads]
            s = [eta[a] * old[a] - theta[a] * g for old, g in zip(self.s, grads, strict=True)]
            to = [w[a] if c.decay_to_init else 0.0 for w in self.m.first]
            w = [(1 - alpha[a]) * o[a] + alpha[a] * t + n for o, t, n in zip(self.w, to, s, strict=True)]
            moved.append(s)
            after.append(w)
            read.append(self.net(unit(q[a]), w))
        self.s, self.w = ([torch.stack(part) for part in zip(*parts, strict=True)] for parts in (moved, after))
        self.n += 1
        if self.n == c.chunk:
            self.start, self.n = list(self.w), 0
        return self.out(read, x)

    def read(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        h, e, d = self.m.heads, self.c.head_dim, len(x)
        self.asked.append(self.m.qkv.weight[:d] @ x)
        q = self.convolved(self.asked, slice(0, d)).view(h, e)
        return self.out([self.net(unit(q[a]), [w[a] for w in weights]) for a in range(h)], x)


def turned(x: Tensor, place: int, base: float = 10000.0) -> Tensor:
    half = len(x) // 2
    # transformers keeps its angles in float32.
    angles = place * base ** -(torch.arange(half, dtype=torch.float32) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[:half], x[half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin])


def llama_logits(model, ids: Tensor, segment: int) -> Tensor:
    """(B, T, vocabulary) of a llama with titans."""
    rows = [model.lm_head(model.model.norm(_blocks(model, row, segment))) for row in ids]
    return torch.stack(rows)


def _blocks(model, ids: Tensor, segment: int) -> Tensor:
    x, titans = model.model.embed_tokens(ids), model.memory
    for layer, block in enumerate(model.model.layers):
        source = block.input_layernorm(x)
        if layer in titans.layers:
            out = _mixed(titans, titans.layers.index(layer), block.self_attn, source, segment)
        else:
            windows = titans.config.form in ("mag", "mal")
            out = torch.cat([_attention(block.self_attn, s, [], segment) for s in _pieces(source, segment, windows)])
        x = x + out
        x = x + block.mlp(block.post_attention_layernorm(x))
    return x


def _pieces(x: Tensor, segment: int, windows: bool) -> list[Tensor]:
    return [x] if windows else list(x.split(segment))


def _mixed(titans, i: int, attention, x: Tensor, segment: int) -> Tensor:
    c, memory = titans.config, titans.memories[i]
    persistent = [] if titans.persistent is None else list(titans.persistent[i])
    share = None if titans.columns is None else titans.columns[i]
    loop = Loop(memory, c, None if c.form == "mac" else persistent)
    if c.form == "lmm":
        m = torch.stack([loop.write(t) for t in x])
        beside = torch.cat([_attention(attention, s, [], segment) for s in x.split(segment)])
        return m if c.place == "replace" else beside + m
    if c.form == "mag":
        y = _attention(attention, x, persistent, segment, share=share)
        m = torch.stack([rms(loop.write(t)) for t in x]) * titans.scale[i]
        if c.identity_start:
            return y * 2 * torch.sigmoid(m)
        return F.silu(torch.stack([rms(t) for t in y]) * titans.scale_attention[i]) * F.silu(m)
    if c.form == "mal":
        made = [p + m for p, m in zip(persistent, loop.prefix_outputs, strict=True)]
        y = torch.stack([t + loop.write(t) for t in x])
        return _attention(attention, y, made, segment, share=share)
    parts = []
    for piece in x.split(segment):
        committed = list(loop.w)
        h = torch.stack([loop.read(t, committed) for t in piece])
        y = _attention(attention, piece, persistent, segment, recalled=h, share=share)
        m = torch.stack([rms(loop.write(rms(t))) for t in y]) * titans.scale[i]
        parts.append(y * 2 * torch.sigmoid(m))
    return torch.cat(parts)


def _attention(attention, x: Tensor, persistent: list[Tensor], window: int, recalled=None, share=None) -> Tensor:
    """Tokens x (T, d) at places 0..; each sees the last `window` ones, all of `persistent`, and h_j where it sees j."""
    heads, e = attention.config.num_attention_heads, attention.head_dim
    groups = heads // attention.config.num_key_value_heads
    q = attention.q_proj(x).view(len(x), heads, e)
    columns = lambda y: [p(y).view(len(y), -1, e) for p in (attention.k_proj, attention.v_proj)]  # noqa: E731
    (k, v), kept, told = columns(x), [], []
    if persistent:
        kept = list(zip(*columns(torch.stack(persistent)), strict=True))
    if recalled is not None:
        told = list(zip(*columns(recalled), strict=True))
    out = []
    for i in range(len(x)):
        per_head = []
        for a in range(heads):
            g = a // groups
            query = turned(q[i, a], i)
            near = range(max(0, i - window + 1), i + 1)
            own = [(query @ turned(k[j, g], j), v[j, g]) for j in near]
            extra = [(q[i, a] @ key[g], value[g]) for key, value in kept]
            extra += [(query @ turned(told[j][0][g], j), told[j][1][g]) for j in near if told]
            joint, plain = _softmax(own + extra, e), _softmax(own, e)
            per_head.append(joint if share is None else plain + share[a] * (joint - plain))
        out.append(attention.o_proj(torch.cat(per_head)))
    return torch.stack(out)


def _softmax(pairs: list[tuple[Tensor, Tensor]], e: int) -> Tensor:
    weights = torch.softmax(torch.stack([score for score, _ in pairs]) / math.sqrt(e), 0)
    return weights @ torch.stack([value for _, value in pairs])
