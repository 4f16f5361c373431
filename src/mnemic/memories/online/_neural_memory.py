"""The neural memory of one block: a network whose weights are the state, with all that stands around it.

Titans (arXiv 2501.00663), Sec 3 and 4.4. From inputs x (B, T, d), h heads of width e, d = h e:

    q, k, v = silu(conv4(x W_QKV));  q, k = q / |q|, k / |k|
    eta, theta, alpha = sigmoid(x W_r + b) for each head;  theta times theta_max
    y = M(q; W) after the write of (k, v)                            (ops.fast_weights)
    m = (RMSNorm(y) * sigmoid(x W_G)) W_O

State of a row: "w1", "s1", "c1", "w2", ... and "n" (weights, momentum, weights at the start of the chunk, tokens in
it) and "tail", the last 3 inputs of the convolutions. It is float32, or float64 where the parameters are.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import fast_weights
from ...ops.fast_weights import FastWeights, Rule
from ...ops.short_convolution import short_convolution

KERNEL = 4
# Forget rates start near 0.01, momentum decay and learning rate in the middle.
FIRST_FORGET = -4.6

Named = dict[str, Tensor]


class NeuralMemory(nn.Module):
    """M of one block. Parameters: 5 d^2 + 12 d + the rates' 3 h (d + 1) + the first weights W_0 (h, out, in) by layer.

    Args:
        width: d. head_dim: e. depth: layers of the network; 1 is a matrix, which starts at zero. expansion: width of
            its hidden layers / e. momentum: False fixes eta at 0. decay_to_init: alpha pulls to W_0, not to zero.
        closed: W_O starts at zero.
    """

    def __init__(
        self,
        width: int,
        head_dim: int,
        depth: int,
        expansion: int,
        rule: Rule,
        *,
        theta_max: float = 1.0,
        momentum: bool = True,
        decay_to_init: bool = False,
        closed: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.heads, self.head_dim, self.rule = width // head_dim, head_dim, rule
        self.theta_max, self.momentum, self.decay_to_init = theta_max, momentum, decay_to_init
        self.qkv = nn.Linear(width, 3 * width, bias=False, **factory)
        self.convolution = nn.Parameter(torch.empty(3 * width, KERNEL, **factory).uniform_(-0.5, 0.5))
        self.rates = nn.Linear(width, (3 if momentum else 2) * self.heads, **factory)
        with torch.no_grad():
            self.rates.bias.zero_()[: self.heads] = FIRST_FORGET
        sizes = [head_dim, *[expansion * head_dim] * (depth - 1), head_dim]
        self.first = nn.ParameterList(
            torch.zeros(self.heads, out, into, **factory).uniform_(-1, 1) * (math.sqrt(6 / (into + out)) * (depth > 1))
            for into, out in pairwise(sizes)
        )
        self.norm = nn.Parameter(torch.ones(width, **factory))
        self.gate = nn.Linear(width, width, bias=False, **factory)
        self.output = nn.Linear(width, width, bias=False, **factory)
        if closed:
            nn.init.zeros_(self.output.weight)

    def first_weights(self) -> tuple[Tensor, ...]:
        """W_0 in the dtype of the state."""
        wide = torch.float64 if self.first[0].dtype == torch.float64 else torch.float32
        return tuple(w.to(wide) for w in self.first)

    def initial(self, prefix: Tensor | None = None) -> Named:
        """The state of one row that has read nothing, or `prefix` (N, d). What follows the prefix opens a new chunk."""
        weights = self.first_weights()
        named = fast_weights.first(weights, 1).named()
        named["tail"] = weights[0].new_zeros(1, KERNEL - 1, 3 * self.qkv.in_features)
        if prefix is None or not len(prefix):
            return named
        _, named = self.write(prefix[None], named, None)
        state = FastWeights.of(named)
        closed = FastWeights(state.weights, state.momentum, state.weights, torch.zeros_like(state.position))
        return {**closed.named(), "tail": named["tail"]}

    def write(self, x: Tensor, past: Mapping[str, Tensor], real: Tensor | None) -> tuple[Tensor, Named]:
        """Every token writes and reads after it: m (B, T, d) and the state after the last. real: (B, T) bool."""
        mixed, tail = short_convolution(self.qkv(x), self.convolution, past["tail"], real)
        q, k, v = mixed.unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        rates = self.rates(x).to(past["w1"].dtype).sigmoid().split(self.heads, dim=-1)
        alpha, theta, eta = rates if self.momentum else (*rates, torch.zeros_like(rates[0]))
        pull = self.first_weights() if self.decay_to_init else None
        y, state = fast_weights.run(
            _unit(q), _unit(k), v, eta, theta * self.theta_max, alpha, FastWeights.of(past), self.rule,
            real=real, decay_to=pull,
        )  # fmt: skip
        return self._out(y, x), {**state.named(), "tail": tail}

    def read(self, x: Tensor, weights: tuple[Tensor, ...], tail: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Nothing is written: m (B, T, d) at weights (B, h, out, in) by layer, and the new tail (B, 3, d)."""
        width = x.shape[-1]
        queries = F.linear(x, self.qkv.weight[:width])
        queries, tail = short_convolution(queries, self.convolution[:width], tail, real)
        queries = _unit(queries.unflatten(-1, (self.heads, self.head_dim)))
        y = fast_weights.read(queries, FastWeights(weights, (), (), torch.empty(0)), self.rule)
        return self._out(y, x), tail

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        normed = F.rms_norm(y, (self.head_dim,)).flatten(2) * self.norm
        return self.output(normed * torch.sigmoid(self.gate(x)))


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; zero stays zero."""
    return F.normalize(x, dim=-1)
