"""The block of PMI: perception, memory, inference (2023, arXiv 2310.09297).

N slots of a working memory W and C banks of a long-term memory M, all of width D; tokens X (T, D). One set of
projections serves every attention, with H heads and scores that are neither scaled nor, after a choice of the k
largest, normalised again:

    A(a; b)    P = softmax((a W_q)(b W_k)^T) for each head;  P <- P where it is among the k largest of its row, else 0
               A = P (b W_v), heads side by side

    write      m = LN1(W + A_k(W; X));  z = relu(F relu(F m));  W' = LN2(m + z)
               M_c <- LN3(M_c + (sum_d M_c[n, d]) W'[n])
               [i ; f] = U mean_t relu(w X_t) + u + V_n tanh(W) + v_n
               W <- sigmoid(i + b_i) tanh(W') + sigmoid(f + b_f) W
    read       R = A(X; W);  L = A_k(X; mean_c M_c);  O = mixing R + (1 - mixing) A(L; R)

LN3 makes every row of M sum to zero until it has learned weights, so after its first write the long-term memory keeps
still at the start of training: a write multiplies by that sum. Only a first one, of rows drawn from [0, 1), moves it.

A(L; R) lets every token look at what all others read; `seen` says at which. An encoder writes first and lets all see
all (`forward`); a language model must read what was written before its tokens, and each sees the earlier ones only.
"""

import torch
from torch import Tensor, nn


def attend(query: Tensor, keys: Tensor, values: Tensor, top_k: int | None = None, seen: Tensor | None = None) -> Tensor:
    """A, from projected tensors.

    Args:
        query: (..., H, n, e). keys, values: (..., H, N, e). top_k: how many weights of a row are kept; None or N for
            all. seen: bool, to fit (..., H, n, N); a query that sees nothing reads zeros.

    Returns: (..., n, H e).
    """
    scores = query @ keys.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if seen is not None:
        weights = weights * seen
    if top_k is not None and top_k < weights.shape[-1]:
        chosen = weights.topk(top_k, dim=-1).indices
        weights = weights * torch.zeros_like(weights).scatter(-1, chosen, 1.0)
    return (weights @ values).transpose(-2, -3).flatten(-2)


class PerceptionMemory(nn.Module):
    """Weights of one block, and its three operations; see the module for the symbols.

    Args:
        width: D. num_slots: N. num_banks: C; 0 for no long-term memory: O = R. num_heads: H, divides D. top_k: k.
        mixing: share of the reading of the working memory. correction: False for O = mixing R + (1 - mixing) L.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(
        self, width: int, *, num_slots: int = 8, num_banks: int = 5, num_heads: int = 8, top_k: int = 5,
        mixing: float = 0.7, correction: bool = True, **factory,
    ):  # fmt: skip
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads = {num_heads} does not divide the width {width}.")
        self.num_slots, self.num_banks, self.num_heads = num_slots, num_banks, num_heads
        self.top_k, self.mixing, self.correction = top_k, mixing, correction
        self.input = nn.Linear(width, width, **factory)
        self.query, self.key, self.value = (nn.Linear(width, width, **factory) for _ in range(3))
        self.feed_forward = nn.Linear(width, width, **factory)
        self.norm1, self.norm2 = nn.LayerNorm(width, **factory), nn.LayerNorm(width, **factory)
        self.norm3 = nn.LayerNorm(width, **factory) if num_banks else None
        self.gate_scale = nn.Parameter(torch.randn(width, **factory))
        self.gate_input = nn.Linear(width, 2 * width, **factory)
        bound = (2 * width) ** -0.5
        self.gate_slots = nn.Parameter(torch.empty(num_slots, width, 2 * width, **factory).uniform_(-bound, bound))
        self.gate_slots_bias = nn.Parameter(torch.empty(num_slots, 2 * width, **factory).uniform_(-bound, bound))
        self.input_bias = nn.Parameter(torch.zeros((), **factory))
        self.forget_bias = nn.Parameter(torch.ones((), **factory))

    def heads(self, x: Tensor) -> Tensor:
        """(..., n, D) -> (..., H, n, D / H)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def keys_values(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """What is attended to, (..., N, D), as keys and values (..., H, N, D / H)."""
        return self.heads(self.key(slots)), self.heads(self.value(slots))

    def gates(self, tokens: Tensor, working: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Input and forget gate (B, N, D)."""
        raised = torch.relu(self.gate_scale * tokens)
        if real is None:
            mean = raised.mean(1)
        else:
            mean = (raised * real[:, :, None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
        slots = torch.einsum("bnd,ndf->bnf", working.tanh(), self.gate_slots) + self.gate_slots_bias
        put, keep = (self.gate_input(mean)[:, None] + slots).chunk(2, dim=-1)
        return torch.sigmoid(put + self.input_bias), torch.sigmoid(keep + self.forget_bias)

    def write(
        self, tokens: Tensor, working: Tensor, long_term: Tensor | None, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Both memories after tokens (B, T, D), which went through `input`.

        Args:
            working: (B, N, D). long_term: (B, C, N, D), None without banks. real: (B, T) bool, the tokens that count.
        """
        keys, values = self.keys_values(tokens)
        seen = None if real is None else real[:, None, None]
        slots = self.norm1(working + attend(self.heads(self.query(working)), keys, values, self.top_k, seen))
        made = slots
        for _ in range(2):
            made = torch.relu(self.feed_forward(made))
        slots = self.norm2(slots + made)
        if self.norm3 is not None:
            assert long_term is not None
            long_term = self.norm3(long_term + long_term.sum(-1, keepdim=True) * slots[:, None])
        put, keep = self.gates(tokens, working, real)
        return put * slots.tanh() + keep * working, long_term

    def readings(
        self, tokens: Tensor, working: tuple[Tensor, Tensor], long_term: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """R and L (B, T, D), of tokens (B, T, D); the memories as `keys_values`."""
        query = self.heads(self.query(tokens))
        slow = None if long_term is None else attend(query, *long_term, self.top_k)
        return attend(query, *working), slow

    def joined(self, fast: Tensor, slow: Tensor | None, others: tuple[Tensor, Tensor], seen: Tensor | None) -> Tensor:
        """O (B, T, D) of R and L.

        Args:
            others: keys and values (B, H, K, D / H) of R of the tokens that may be seen. seen: bool, to fit
                (B, H, T, K); None for all of them.
        """
        if slow is None:
            return fast
        if self.correction:
            slow = attend(self.heads(self.query(slow)), *others, seen=seen)
        return self.mixing * fast + (1 - self.mixing) * slow

    def first(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Both memories of those who have seen nothing: unit vectors, cut or padded with zeros, (B, N, D), and numbers
        from [0, 1), (B, C, N, D), the same in every row."""
        like = self.query.weight
        width = like.shape[1]
        working = torch.eye(self.num_slots, width, dtype=like.dtype, device=like.device).expand(batch_size, -1, -1)
        if not self.num_banks:
            return working, None
        drawn = torch.rand(self.num_banks, self.num_slots, width, generator=generator).to(working)
        return working, drawn.expand(batch_size, -1, -1, -1)

    def forward(
        self, x: Tensor, working: Tensor, long_term: Tensor | None, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The block in an encoder, where nothing is causal: write, then read. O (B, T, D) of x (B, T, D), in place of
        self-attention, and the memories for the next layer."""
        tokens = self.input(x)
        working, long_term = self.write(tokens, working, long_term, real)
        slow = None if long_term is None else self.keys_values(long_term.mean(1))
        fast, slow = self.readings(tokens, self.keys_values(working), slow)
        seen = None if real is None else real[:, None, None]
        return self.joined(fast, slow, self.keys_values(fast), seen), working, long_term
