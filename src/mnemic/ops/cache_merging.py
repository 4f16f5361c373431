"""Dynamic Memory Compression: each token opens a cache slot or merges into the last one (arXiv 2403.09636).

Shapes: B batch, H query heads, Hkv key heads (H a multiple), T tokens, e width, W window. Per key head, with a_t the
logit of merging token t into the slot of t-1 and w_t its importance,

    b_t = [a_t > 0]                               hard, and b_0 = 0: the first token of a stream opens
    b_t = sigmoid((a_t + g_1 - g_2) / tau)        relaxed, g Gumbel
    r_t = b_t r_{t-1} + 1                         run: tokens in the slot so far
    c_tj = w_{t-j} prod_{i=t-j+1..t} b_i          weight of token t-j, j < W
    k'_t = sum_j c_tj k_{t-j} / sum_j c_tj        the slot after token t, v' alike; its position is t

so in runs longer than W the oldest tokens drop out. A query i sees its own column k'_i, and k'_j for j < i with
log(1 - b_{j+1}) added to the score: a slot that is overwritten is hidden. All keys are un-rotated here; a slot is
rotated at the position of its last token. Weights are float32 or wider whatever the dtype of the keys.

Running sums with the oldest term subtracted would drift, so the stream keeps the last W - 1 keys and values themselves:
the same memory, and one formula for one token and for many. `naive` and `naive_relaxed` are the loops of the tests.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]

WINDOW = 12
# Appending, and equal importances, are where training starts.
_OFFSET = 5.0
# The smallest importance: the machine epsilon of bfloat16.
_EPS = torch.finfo(torch.bfloat16).eps
# Tokens per matrix product: a band of W in C + W - 1 columns wastes operations as C grows, and copies as it shrinks.
_CHUNK = 32


class Decisions(NamedTuple):
    """q (B, H, T, e) and k (B, Hkv, T, e) without the deciding dimension; logits a, weights w (B, Hkv, T)."""

    q: Tensor
    k: Tensor
    logits: Tensor
    weights: Tensor


class Columns(NamedTuple):
    """k', v' (B, Hkv, T, e) of every token, and what is added to the scores of later queries, (B, Hkv, T)."""

    keys: Tensor
    values: Tensor
    hidden: Tensor


class Update(NamedTuple):
    """What T new tokens do to the slots of a stream; token order is that of the call.

    keys, values: (B, Hkv, T, e): the slot as it stands after the token, un-rotated. positions: (B, T) int64, the
    token's place in its row's stream, which is the slot's. opens, overwrites: (B, Hkv, T) bool, both False for tokens
    that are not real. survives: (B, Hkv, T) bool: the last real token of its slot within the call, to be stored.
    run: (B, Hkv, T) int64: tokens in the slot so far. At tokens that are not real, the rest means nothing.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    opens: Tensor
    overwrites: Tensor
    survives: Tensor
    run: Tensor


def zero_dimension(x: Tensor, dim: int = -1) -> Tensor:
    """A copy of x (..., e) with one dimension of e set to zero."""
    x = x.clone()
    x[..., dim] = 0.0
    return x


def decisions(q: Tensor, k: Tensor, dim: int = -1, offset: float = _OFFSET) -> Decisions:
    """Merge logits a = k[dim] - offset and importances w = sigmoid(mean over the query group of q[dim] + 5) + eps.

    Args:
        q: (B, H, T, e), k: (B, Hkv, T, e), before rotation; query head h belongs to key head h // (H / Hkv).
        dim: which dimension of e decides. offset: how far from merging a dimension of 0 is, 5 in the paper.

    Returns: `Decisions`; logits and weights are float32 or wider.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"The number of query heads must be a multiple of the key heads: {q.shape[1]}, {k.shape[1]}.")
    groups = q.shape[1] // k.shape[1]
    weights = torch.sigmoid(_wide(q[..., dim]).unflatten(1, (k.shape[1], groups)).mean(2) + _OFFSET) + _EPS
    return Decisions(zero_dimension(q, dim), zero_dimension(k, dim), _wide(k[..., dim]) - offset, weights)


def hard(logits: Tensor) -> Tensor:
    """Log-odds of hard decisions: +inf where logits > 0 (merge), else -inf. No gradient."""
    inf = torch.full_like(logits, float("inf")).detach()
    return torch.where(logits.detach() > 0, inf, -inf)


def relaxed(logits: Tensor, noise: Tensor | torch.Generator | None = None, tau: float = 0.1) -> Tensor:
    """Log-odds of relaxed decisions, (logits + g_1 - g_2) / tau; b = sigmoid of them.

    noise: g_1 - g_2 like logits, or the generator to draw it from (None: the default one). The difference of two
    Gumbel samples is logistic.
    """
    if not isinstance(noise, Tensor):
        uniform = torch.rand(logits.shape, generator=noise, dtype=logits.dtype, device=logits.device)
        noise = torch.logit(uniform, eps=torch.finfo(logits.dtype).eps)
    return (logits + noise) / tau


def straight_through(log_odds: Tensor) -> Tensor:
    """Hard decisions d = [log_odds > 0] with the gradient of sigmoid(log_odds)."""
    soft = log_odds.sigmoid()
    return soft + ((log_odds > 0).to(soft.dtype) - soft).detach()


def auxiliary_loss(decisions: Tensor, ratio: float, real: Tensor | None = None) -> Tensor:
    """Mean over rows of relu((1 - 1/ratio) - mean d), a scalar: how much merging is missing.

    Args:
        decisions: (B, ..., T) from `straight_through`; between B and T any of layers, heads.
        ratio: wanted tokens per slot, at least 1.
        real: (B, T) bool, tokens that count; None: all.
    """
    if ratio < 1:
        raise ValueError(f"A compression ratio is at least 1 (no compression), not {ratio}.")
    rows = decisions.flatten(1, -2).mean(1) if decisions.dim() > 2 else decisions
    if real is None:
        mean = rows.mean(-1)
    else:
        mean = rows.masked_fill(~real, 0.0).sum(-1) / real.sum(-1).clamp(min=1)
    return F.relu(1 - 1 / ratio - mean).mean()


def parallel(
    k: Tensor, v: Tensor, weights: Tensor, log_odds: Tensor, window: int = WINDOW, real: Tensor | None = None
) -> Columns:
    """All slots of whole rows at once, relaxed (for training) or hard.

    Args:
        k, v: (B, Hkv, T, e), un-rotated. weights: (B, Hkv, T), positive.
        log_odds: (B, Hkv, T), b = sigmoid(log_odds): from `relaxed` or `hard`. That of a row's first token is ignored.
        real: (B, T) bool, False for tokens that are not there: no window holds them, no query sees them.

    Returns: `Columns`; hidden is log(1 - b) of the next token, 0 for a row's last one, -inf where not real.
    """
    pack = None if real is None else _Packing(real)
    if pack is not None:
        k, v, weights, log_odds = (pack.pack(x) for x in (k, v, weights, log_odds))
    ahead = window - 1
    # What stands before the first token weighs nothing, so its b need not be 0.
    # Sums of log b run inside each window: differences of one long sum would be inf - inf, and lose digits.
    steps = F.pad(F.logsigmoid(log_odds), (ahead, 0)).unfold(-1, window, 1)[..., 1:]
    decay = F.pad(steps.flip(-1).cumsum(-1).flip(-1), (0, 1))
    shares = (F.pad(weights.log(), (ahead, 0), value=float("-inf")).unfold(-1, window, 1) + decay).softmax(-1)
    keys, values = (_mix(shares, F.pad(x, (0, 0, ahead, 0))).to(x.dtype) for x in (k, v))
    hidden = F.pad(F.logsigmoid(-log_odds[..., 1:]), (0, 1))
    if pack is None:
        return Columns(keys, values, hidden)
    steps_left = (pack.count[:, None] - 1 - torch.arange(hidden.shape[-1], device=hidden.device))[:, None]
    hidden = hidden.masked_fill(steps_left == 0, 0.0).masked_fill(steps_left < 0, float("-inf"))
    return Columns(pack.unpack(keys), pack.unpack(values), pack.unpack(hidden))


def attention_bias(hidden: Tensor) -> Tensor:
    """(B, Hkv, T, T) to add to the scores: 0 on the diagonal, `hidden` of column j before it, -inf after it."""
    tokens = hidden.shape[-1]
    ones = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device)
    past = hidden[..., None, :].masked_fill(ones.triu(1), float("-inf"))
    return past.masked_fill(torch.eye(tokens, dtype=torch.bool, device=hidden.device), 0.0)


def initial_state(
    batch_size: int,
    num_heads: int,
    key_width: int,
    value_width: int | None = None,
    window: int = WINDOW,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> State:
    """The state of `step` before the first token, a flat dict with the batch first.

    recent_keys, recent_values (B, Hkv, W - 1, e): the last tokens, newest at the end, in dtype.
    recent_weights (B, Hkv, W - 1): float32, or float64 where dtype is. run (B, Hkv) int64: tokens in the last slot, 0
    before the first token. seen (B,) int64: tokens so far.
    """
    if window < 1:
        raise ValueError(f"A window holds at least the token itself: window >= 1, not {window}.")
    value_width = key_width if value_width is None else value_width
    shape = (batch_size, num_heads, window - 1)
    keys = torch.zeros(*shape, key_width, dtype=dtype, device=device)
    return {
        "recent_keys": keys,
        "recent_values": torch.zeros(*shape, value_width, dtype=dtype, device=device),
        "recent_weights": _wide(keys[..., 0]).clone() if key_width else torch.zeros(shape, device=device),
        "run": torch.zeros(shape[:2], dtype=torch.int64, device=device),
        "seen": torch.zeros(batch_size, dtype=torch.int64, device=device),
    }


def step(
    state: State,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    merge: Tensor,
    real: Tensor | None = None,
    split_long_runs: bool = False,
) -> tuple[Update, State]:
    """Hard decisions for the next T tokens of every row; any split of a stream into calls gives the same.

    Args:
        state: of `initial_state` or the previous call; it is not changed.
        k, v: (B, Hkv, T, e), un-rotated. weights: (B, Hkv, T), positive. merge: (B, Hkv, T) bool, logits > 0.
        real: (B, T) bool, False for tokens that change nothing; None: all are real.
        split_long_runs: a slot of W tokens is full, and the next token opens another.

    Returns: `Update` and the next state.
    """
    tokens = k.shape[2]
    window = state["recent_keys"].shape[2] + 1
    pack = None if real is None else _Packing(real)
    if pack is not None:
        k, v, weights, merge = (pack.pack(x) for x in (k, v, weights, merge))
    places = torch.arange(tokens, device=k.device)
    opens, run = _runs(merge, state["run"], window if split_long_runs else None)

    recent = {
        name: torch.cat([state[name], x.to(state[name].dtype)], dim=2)
        for name, x in (("recent_keys", k), ("recent_values", v), ("recent_weights", weights))
    }
    # Oldest first; the token at distance j is in the slot if fewer than `run` tokens ago.
    distance = torch.arange(window - 1, -1, -1, device=k.device)
    shares = recent["recent_weights"].unfold(-1, window, 1) * (distance < run[..., None])
    shares = shares / shares.sum(-1, keepdim=True)
    keys = _mix(shares, recent["recent_keys"]).to(k.dtype)
    values = _mix(shares, recent["recent_values"]).to(v.dtype)
    survives = torch.cat([opens[..., 1:], torch.ones_like(opens[..., :1])], dim=-1)

    if pack is None:
        positions = state["seen"][:, None] + places
        # Cloned: a view would keep the whole call's keys alive.
        following = {name: x[:, :, tokens:].clone() for name, x in recent.items()}
        following["run"] = run[..., -1].clone() if tokens else state["run"]
        following["seen"] = state["seen"] + tokens
        return Update(keys, values, positions, opens, ~opens, survives, run), following

    count = pack.count
    there = (places < count[:, None])[:, None]
    survives = (survives | (places == count[:, None] - 1)[:, None]) & there
    newest = count[:, None] + torch.arange(window - 1, device=k.device)
    following = {name: _take(x, newest) for name, x in recent.items()}
    last = _take(run, (count - 1).clamp(min=0)[:, None])[..., 0]
    following["run"] = torch.where(count[:, None] > 0, last, state["run"])
    following["seen"] = state["seen"] + count
    positions = state["seen"][:, None] + pack.rank
    marks = (opens & there, ~opens & there, survives, run)
    return Update(pack.unpack(keys), pack.unpack(values), positions, *(pack.unpack(x) for x in marks)), following


def step_mask(update: Update, lengths: Tensor, capacity: int) -> Tensor:
    """What each new token sees, (B, Hkv, T, n + T) bool over [slots before the call ; the call's columns].

    Query i sees its own column, earlier columns that no token up to i overwrote, and of the n = capacity old slots
    those in use, lengths (B, Hkv), the last of them until a token overwrites it. Queries that are not real see at least
    their own column.
    """
    tokens = update.opens.shape[-1]
    device = update.opens.device
    slots = torch.arange(capacity, device=device)
    gone = ((update.overwrites & (update.opens.cumsum(-1) == 0)).cumsum(-1) > 0)[..., None]
    lengths = lengths[..., None, None]
    old = (slots < lengths) & ~(gone & (slots == lengths - 1))
    own = torch.eye(tokens, dtype=torch.bool, device=device)
    new = own | (update.survives[..., None, :] & torch.ones_like(own).tril(-1))
    return torch.cat([old, new], dim=-1)


def _runs(merge: Tensor, run: Tensor, longest: int | None) -> tuple[Tensor, Tensor]:
    """Which of (B, Hkv, T) tokens open a slot, and tokens in the slot so far; run (B, Hkv) is that before the call."""
    places = torch.arange(merge.shape[-1], device=merge.device)
    # The first token of a stream finds no slot to merge into.
    opens = ~merge | ((run == 0)[..., None] & (places == 0))
    if merge.shape[-1] == 0:
        return opens, places.expand_as(merge)
    start = torch.where(opens, places, -run[..., None]).cummax(-1).values
    length = places - start + 1
    if longest is None:
        return opens, length
    length = (length - 1) % longest + 1
    return length == 1, length


def _mix(shares: Tensor, x: Tensor) -> Tensor:
    """out_t = sum_m shares_tm x_{t+m}: shares (B, Hkv, T, W), x (B, Hkv, W - 1 + T, e); in shares' dtype.

    The band of each chunk of C tokens is a matrix (C, C + W - 1): one product per chunk, all in one call.
    """
    tokens, window = shares.shape[-2:]
    x = x.to(shares.dtype)
    if tokens <= 1:
        return shares @ x if tokens else x[:, :, window - 1 :]
    chunk = min(max(_CHUNK, window - 1), tokens)
    if chunk == tokens:
        return _band(shares) @ x
    chunks = -(-tokens // chunk)
    shares = F.pad(shares, (0, 0, 0, chunks * chunk - tokens)).unflatten(2, (chunks, chunk))
    x = F.pad(x, (0, 0, 0, (chunks + 1) * chunk - x.shape[2])).unflatten(2, (chunks + 1, chunk))
    x = torch.cat([x[:, :, :-1], x[:, :, 1:, : window - 1]], dim=-2)
    return (_band(shares) @ x).flatten(2, 3)[:, :, :tokens]


def _band(shares: Tensor) -> Tensor:
    """(..., C, W) -> (..., C, C + W - 1): row i moved right by i."""
    chunk, window = shares.shape[-2:]
    # Rows one longer than the result, cut as one line, start one place later each.
    flat = F.pad(shares, (0, chunk)).flatten(-2)
    return flat[..., : chunk * (chunk + window - 1)].unflatten(-1, (chunk, chunk + window - 1))


class _Packing:
    """Real tokens of each row to the front, in order, and back; real (B, T) bool."""

    def __init__(self, real: Tensor):
        so_far = real.cumsum(-1)
        self.count = so_far[:, -1] if real.shape[-1] else so_far.sum(-1)
        # A token's place among the real ones; before the first, 0.
        self.rank = (so_far - 1).clamp(min=0)
        places = torch.arange(real.shape[-1], device=real.device).expand_as(so_far)
        self._target = torch.where(real, so_far - 1, self.count[:, None] + places - so_far)
        self._source = torch.zeros_like(self._target).scatter(1, self._target, places)

    def pack(self, x: Tensor) -> Tensor:
        """x (B, Hkv, T) or (B, Hkv, T, e)."""
        return _take(x, self._source)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return _take(x, self._target)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Of x (B, Hkv, T, ...) the tokens (B, m) of each row."""
    index = index[:, None]
    return x.take_along_dim(index[..., None] if x.dim() == 4 else index, dim=2)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def naive(
    k: Tensor, v: Tensor, weights: Tensor, logits: Tensor, window: int = WINDOW, split_long_runs: bool = False
) -> list[list[tuple[Tensor, Tensor, int]]]:
    """One head of one stream, token by token: k, v (T, e), weights, logits (T,).

    Returns: for every token the slots (key, value, position) as they stand after it.
    """
    sums = [k.new_zeros(k.shape[-1]), v.new_zeros(v.shape[-1]), weights.new_zeros(())]
    slots: list[tuple[Tensor, Tensor, int]] = []
    history = []
    run = 0
    for t in range(k.shape[0]):
        merge = t > 0 and bool(logits[t] > 0) and not (split_long_runs and run == window)
        run = run * merge + 1
        terms = [(weights[i] * k[i], weights[i] * v[i], weights[i]) for i in (t, t - window) if i >= 0]
        sums = [merge * s + new for s, new in zip(sums, terms[0], strict=True)]
        if run > window:
            sums = [s - old for s, old in zip(sums, terms[1], strict=True)]
        if merge:
            slots = slots[:-1]
        slots = [*slots, (sums[0] / sums[2], sums[1] / sums[2], t)]
        history.append(slots)
    return history


def naive_relaxed(k: Tensor, v: Tensor, weights: Tensor, b: Tensor, window: int = WINDOW) -> Columns:
    """One head of one stream: k, v (T, e), weights, b (T,). Returns keys, values (T, e), hidden (T,)."""
    tokens = k.shape[0]
    keys, values = [], []
    for t in range(tokens):
        share = torch.ones_like(weights[0])
        acc_k, acc_v, total = torch.zeros_like(k[0]), torch.zeros_like(v[0]), torch.zeros_like(weights[0])
        for i in range(t, max(t - window, -1), -1):
            acc_k, acc_v = acc_k + share * weights[i] * k[i], acc_v + share * weights[i] * v[i]
            total = total + share * weights[i]
            share = share * (b[i] if i > 0 else 0.0)
        keys.append(acc_k / total)
        values.append(acc_v / total)
    hidden = [torch.log1p(-b[j + 1]) for j in range(tokens - 1)] + [torch.zeros_like(weights[0])]
    return Columns(torch.stack(keys), torch.stack(values), torch.stack(hidden))
