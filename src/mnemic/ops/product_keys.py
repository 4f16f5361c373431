"""A sparse table read through product keys: n^2 rows of values, addressed exactly with two sets of n half-keys.

Row i n + j has the key [c1_i; c2_j], so its score for a query [q1; q2] is s1_i + s2_j (Lample et al. 2019,
arXiv 1907.05242, section 3.1). Shapes: h heads, e = k_dim / 2, n half-keys a set, k rows kept, d_v value width.
`...` is any number of token dimensions. The floor of a read is 2 h n e products, h k rows of d_v and the selection.
`naive_select`, `naive_lookup` and `naive_expert_lookup` say the same densely or with loops; they are the reference
of the tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def init_subkeys_(subkeys: Tensor, width: int) -> Tensor:
    """Uniform in +-1/sqrt(width), in place. PKM: width is e, that of a half-key; Memory+: k_dim, that of a key."""
    return torch.nn.init.uniform_(subkeys, -(width**-0.5), width**-0.5)


def init_values_(values: Tensor) -> Tensor:
    """Normal with standard deviation 1/sqrt(d_v), in place (PKM and Memory+)."""
    return torch.nn.init.normal_(values, std=values.shape[-1] ** -0.5)


def select(query: Tensor, subkeys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k rows of every head, best first; exact up to ties.

    The choice itself is not differentiated; the scores are.

    Args:
        query: (..., h, 2, e). subkeys: (h, 2, n, e). top_k: 1 to n.

    Returns: scores (..., h, k) in the dtype of the products, rows (..., h, k) int64 in 0 .. n^2 - 1.

    Raises: ValueError if the shapes do not fit or top_k is not in 1 .. n.
    """
    n = _check(query, subkeys, top_k)
    halves = torch.einsum("...hpe,hpne->...hpn", query, subkeys)
    with torch.no_grad():
        best = _largest(halves, top_k)
        pairs = _pairs(top_k, query.device).expand(*query.shape[:-1], -1)
        kept = _largest(halves.gather(-1, best).gather(-1, pairs).sum(-2), top_k)
        chosen = best.gather(-1, pairs.gather(-1, kept.unsqueeze(-2).expand_as(best)))
        rows = chosen[..., 0, :] * n + chosen[..., 1, :]
    # Reading the scores again by index leaves one scatter in the backward pass.
    return halves.gather(-1, chosen).sum(-2), rows


def address(query: Tensor, subkeys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`select` with a softmax over the k scores of each head: weights (..., h, k), rows (..., h, k)."""
    scores, rows = select(query, subkeys, top_k)
    return scores.softmax(-1), rows


def gather(rows: Tensor, weights: Tensor, values: Tensor, sparse: bool = False) -> Tensor:
    """sum over heads and k of weight * values[row].

    Sums, forward and backward, are in the widest of float32 and the two dtypes: the gradient of a bfloat16 table
    that embedding_bag accumulates in bfloat16 is off by most of its size once a row is read a few hundred times.
    Columns do not mix: slices of `values` along d_v give the slices of the result, bit for bit.

    Args:
        rows: (..., h, k) int64. weights: (..., h, k). values: (n^2, d_v).
        sparse: the gradient of `values` is a sparse tensor that holds each row read, once.

    Returns: (..., d_v) in the dtype of `weights`.
    """
    reads = rows.shape[-2] * rows.shape[-1]
    bags, per_row = rows.reshape(-1, reads), weights.reshape(-1, reads)
    wide = torch.promote_types(torch.promote_types(values.dtype, weights.dtype), torch.float32)
    if sparse or values.dtype != wide:
        # Only the rows read are widened, and duplicates meet before the table's own gradient is formed.
        read, bags = bags.unique(return_inverse=True)
        values = F.embedding(read, values, sparse=sparse).to(wide)
    out = F.embedding_bag(bags, values, mode="sum", per_sample_weights=per_row.to(wide))
    return out.to(weights.dtype).view(*rows.shape[:-2], values.shape[-1])


def lookup(query: Tensor, subkeys: Tensor, values: Tensor, top_k: int, sparse: bool = False) -> Tensor:
    """The whole read of PKM, softmax over the k rows of each head, heads summed; arguments as `select`, `gather`.

    Returns: (..., d_v).
    """
    weights, rows = address(query, subkeys, top_k)
    return gather(rows, weights, values, sparse)


def expert_gather(rows: Tensor, weights: Tensor, x: Tensor, down: Tensor, up: Tensor, sparse: bool = False) -> Tensor:
    """sum over heads and k of weight * gelu(down[row] . x) * up[row]: each row is an expert of rank 1.

    Args:
        rows, weights: (..., h, k). x: (..., d). down: (n^2, d). up: (n^2, d_v). sparse: as `gather`, both tables.

    Returns: (..., d_v) in the dtype of `weights`.
    """
    return gather(rows, weights * F.gelu(_row_dots(rows, x, down, sparse)), up, sparse)


def expert_lookup(
    query: Tensor, x: Tensor, subkeys: Tensor, down: Tensor, up: Tensor, top_k: int, sparse: bool = False
) -> Tensor:
    """The read of PEER (He 2024, arXiv 2407.04153, algorithm 1): the weights are the softmax of the k scores.

    `expert_gather` with the scores of `select` is the form without a softmax. Arguments as `select`, `expert_gather`.

    Returns: (..., d_v).
    """
    weights, rows = address(query, subkeys, top_k)
    return expert_gather(rows, weights, x, down, up, sparse)


class Usage:
    """How evenly a table of `size` rows is read, over any number of `update` calls; only real tokens should enter.

    `result` has 0-d float32 tensors: hit, the share of rows read at least once with weight > 0; kl, the divergence
    of the weight mass from uniform in nats (both PKM, section 4.3); entropy of the histogram of reads in nats, and
    top1, the mean over tokens and heads of the largest weight (both Memory+).
    """

    def __init__(self, size: int, device: torch.device | str | None = None) -> None:
        self.reads = torch.zeros(size, dtype=torch.int64, device=device)
        # Summed in float64: a frequent row outgrows what float32 can add to.
        self.mass = torch.zeros(size, dtype=torch.float64, device=device)
        self.top1 = torch.zeros((), dtype=torch.float64, device=device)
        self.heads = 0

    @torch.no_grad()
    def update(self, rows: Tensor, weights: Tensor) -> "Usage":
        """rows (..., h, k) int64, weights (..., h, k), non-negative."""
        read = rows[weights > 0]
        self.reads += read.bincount(minlength=len(self.reads))
        self.mass += rows.flatten().bincount(weights.flatten().double(), minlength=len(self.mass))
        self.top1 += weights.amax(-1).sum(dtype=torch.float64)
        self.heads += weights[..., 0].numel()
        return self

    def result(self) -> dict[str, Tensor]:
        """Raises ValueError if nothing was read."""
        if not self.heads:
            raise ValueError("Usage needs at least one read: call update(rows, weights) with one token or more.")
        size = len(self.mass)
        share, seen = self.mass / self.mass.sum(), self.reads / self.reads.sum()
        found = {
            "hit": (self.reads > 0).double().mean(),
            "kl": torch.special.xlogy(share, share * size).sum(),
            "entropy": -torch.special.xlogy(seen, seen).sum(),
            "top1": self.top1 / self.heads,
        }
        return {name: value.float() for name, value in found.items()}


def usage(rows: Tensor, weights: Tensor, size: int) -> dict[str, Tensor]:
    """`Usage` of one batch: rows, weights (..., h, k), size n^2."""
    return Usage(size, rows.device).update(rows, weights).result()


def _check(query: Tensor, subkeys: Tensor, top_k: int) -> int:
    heads, _, n, e = subkeys.shape
    if query.shape[-3:] != (heads, 2, e):
        raise ValueError(
            f"A query must end in (heads, 2, k_dim / 2) = {(heads, 2, e)} to fit its half-keys; it is "
            f"{tuple(query.shape)}. Reshape it, or change the number of heads or k_dim of one of them."
        )
    if not 1 <= top_k <= n:
        raise ValueError(f"top_k must be 1 to n = {n}, the half-keys of a set; it is {top_k}. Lower it or raise n.")
    return n


def _largest(scores: Tensor, k: int) -> Tensor:
    """Indices (..., k) of the k largest of the last dimension, best first; ties in any order."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or torch.compiler.is_compiling():
        return scores.topk(k, dim=-1).indices
    # topk on CPU costs several times the rest of a read. Sorting one integer, with the order of the floats in its
    # high half and the index in its low half, is a vectorised primitive of numpy.
    bits = scores.neg().view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    packed = ordered.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(scores.shape[-1]))
    packed.numpy().sort(axis=-1)
    return packed[..., :k] & 0xFFFFFFFF


def _pairs(k: int, device: torch.device) -> Tensor:
    """The ranks (a, b), from 0, that can be among the k best sums of two sorted lists: (a + 1)(b + 1) <= k, (2, P).

    Any other pair has k or more pairs at least as good above it, so of k^2 candidates about k ln k are enough.
    """
    total = sum(k // (a + 1) for a in range(k))
    ranks = torch.arange(k, device=device)
    counts = k // (ranks + 1)
    first = ranks.repeat_interleave(counts, output_size=total)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=total)
    return torch.stack((first, torch.arange(total, device=device) - starts))


def _row_dots(rows: Tensor, x: Tensor, table: Tensor, sparse: bool) -> Tensor:
    """table[rows] . x, (..., h, k)."""
    if torch.compiler.is_compiling():
        # A compiler cannot trace a backward pass that differentiates; it fuses the product with the look-up instead.
        return (F.embedding(rows, table, sparse=sparse) * x[..., None, None, :]).sum(-1).to(x.dtype)
    return _RowDots.apply(rows, x, table, sparse)  # pyright: ignore[reportReturnType]


class _RowDots(torch.autograd.Function):
    """table[rows] . x without keeping the rows: (..., h, k), (..., d), (n^2, d) -> (..., h, k) in the dtype of x.

    It is the adjoint of `gather` in the weights, so its backward pass is a `gather` and the backward pass of one.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, x: Tensor, table: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(rows, x, table)
        ctx.sparse = sparse
        wide = torch.promote_types(torch.promote_types(table.dtype, x.dtype), torch.float32)
        bags, tokens = rows.reshape(-1, rows.shape[-2] * rows.shape[-1]), x.reshape(-1, x.shape[-1])
        out = x.new_empty(bags.shape)
        # About 2^19 numbers at a time stay in a cache near the core.
        step = max(1, 2**19 // max(1, bags.shape[1] * table.shape[1]))
        for bag, token, target in zip(bags.split(step), tokens.split(step), out.split(step), strict=True):
            target.copy_((F.embedding(bag, table).to(wide) @ token.to(wide).unsqueeze(-1)).squeeze(-1))
        return out.view(rows.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, x, table = ctx.saved_tensors
        table_wanted = ctx.needs_input_grad[2]
        with torch.enable_grad():
            leaf = table.detach().requires_grad_(table_wanted)
            to_x = gather(rows, grad.detach(), leaf, ctx.sparse)
            to_table = torch.autograd.grad(to_x, leaf, x)[0] if table_wanted else None
        return None, to_x.detach(), to_table, None


def naive_select(query: Tensor, subkeys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Reference of `select`: all n^2 keys, written out, and one top-k over their scores."""
    n = _check(query, subkeys, top_k)
    left = subkeys[:, 0, :, None].expand(-1, -1, n, -1)
    right = subkeys[:, 1, None].expand(-1, n, -1, -1)
    keys = torch.cat([left, right], dim=-1).flatten(1, 2)
    found = (keys @ query.flatten(-2).unsqueeze(-1)).squeeze(-1).topk(top_k, dim=-1)
    return found.values, found.indices


def naive_lookup(query: Tensor, subkeys: Tensor, values: Tensor, top_k: int) -> Tensor:
    """Reference of `lookup`: for every token and head a dense row of n^2 weights times the table."""
    scores, rows = naive_select(query, subkeys, top_k)
    dense = torch.full((*scores.shape[:-1], len(values)), float("-inf"), dtype=scores.dtype)
    return (dense.scatter(-1, rows, scores).softmax(-1) @ values).sum(-2)


def naive_expert_lookup(query: Tensor, x: Tensor, subkeys: Tensor, down: Tensor, up: Tensor, top_k: int) -> Tensor:
    """Reference of `expert_lookup`, by loops; query (N, h, 2, e), x (N, d)."""
    scores, rows = naive_select(query, subkeys, top_k)
    out = []
    for t in range(len(x)):
        total = torch.zeros_like(up[0])
        for a in range(query.shape[1]):
            for w, row in zip(scores[t, a].exp() / scores[t, a].exp().sum(), rows[t, a].tolist(), strict=True):
                total = total + w * F.gelu((down[row] * x[t]).sum()) * up[row]
        out.append(total)
    return torch.stack(out)
