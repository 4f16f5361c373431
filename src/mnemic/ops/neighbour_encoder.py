"""Neighbour encoder of RETRO (arXiv 2112.04426): retrieved tokens, read in the light of the text that asked for them.

Shapes: N chunks, k neighbours of r tokens each, m hidden states of a chunk, d host width, w encoder width, h heads.
Every layer, pre-norm, on each neighbour by itself: bidirectional self-attention over its r tokens (rotary positions),
cross-attention to the m hidden states, feed-forward of 4 w. Weights are the same for all neighbours and chunks.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .chunked_cross_attention import rotate


class EncoderLayer(nn.Module):
    """One layer; x (N, k, r, w) -> the same."""

    def __init__(self, width: int, heads: int, hidden_size: int, **factory):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width, **factory) for _ in range(3))
        self.joint = nn.Linear(width, 3 * width, bias=False, **factory)
        self.joint_out = nn.Linear(width, width, bias=False, **factory)
        self.query = nn.Linear(width, width, bias=False, **factory)
        self.key_value = nn.Linear(hidden_size, 2 * width, bias=False, **factory)
        self.cross_out = nn.Linear(width, width, bias=False, **factory)
        self.up = nn.Linear(width, 4 * width, **factory)
        self.down = nn.Linear(4 * width, width, **factory)

    def forward(self, x: Tensor, mask: Tensor, hidden: Tensor, angles: Tensor) -> Tensor:
        """mask (N, k, r) bool, with a key in every neighbour; hidden (N, m, d); angles (r, e / 2 or less)."""
        q, k, v = (self._split(t) for t in self.joint(self.norms[0](x)).flatten(0, 1).chunk(3, -1))
        q, k = rotate(q, angles), rotate(k, angles)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(0, 1)[:, None, None])
        x = x + self.joint_out(self._join(read)).view(x.shape)
        # All neighbours of a chunk look at the same states: one row of k r queries.
        q = self._split(self.query(self.norms[1](x)).flatten(1, 2))
        k, v = (self._split(t) for t in self.key_value(hidden).chunk(2, -1))
        x = x + self.cross_out(self._join(F.scaled_dot_product_attention(q, k, v))).view(x.shape)
        return x + self.down(F.gelu(self.up(self.norms[2](x))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(-2)


class NeighbourEncoder(nn.Module):
    """Embeddings (N, k, r, d) of retrieved tokens, mask (N, k, r) bool, hidden states (N, m, d) -> (N, k, r, w).

    What is made of masked tokens has no meaning. A neighbour without any token is encoded as if all were there.
    """

    def __init__(self, hidden_size: int, width: int, heads: int, layers: int, **factory):
        super().__init__()
        self.into = nn.Linear(hidden_size, width, bias=False, **factory)
        self.hidden_norm = nn.RMSNorm(hidden_size, **factory)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, hidden_size, **factory) for _ in range(layers))
        self.norm = nn.RMSNorm(width, **factory)

    def forward(self, embeddings: Tensor, mask: Tensor, hidden: Tensor, angles: Tensor) -> Tensor:
        """angles (r, n): rotation of the tokens of a neighbour, see `chunked_cross_attention.rotary`."""
        # A softmax over nothing is not a number on some backends.
        mask = mask | ~mask.any(-1, keepdim=True)
        x, hidden = self.into(embeddings), self.hidden_norm(hidden)
        for layer in self.layers:
            x = layer(x, mask, hidden, angles)
        return self.norm(x)
