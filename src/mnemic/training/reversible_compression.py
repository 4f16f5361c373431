"""Compression that can be undone, for R3Mem (2025, arXiv 2502.15957): its losses, expansion to text, its archive.

A context is read in segments of at most T tokens, each with read tokens in front and write tokens behind, the last one
however short it is; mem_s is the memory after segment x_s, q a question of the context:

    L_fwd   language-model loss of the context, x_s given mem_{s-1}, and of q given the last memory
    L_bwd   cross-entropy of x_s given [Phi^-1(mem_s) ; q], mean over segments: what `reconstruct` says
    L_cyc   1 - cos(mem_s, mem'_s), mem_s a constant; mem'_s is what the host writes of [mem_{s-1} ; x'_s], x'_s the
            embeddings that the reconstruction expects, so that the cycle has gradients
    L       L_fwd + backward * L_bwd + cycle * L_cyc

Expansion is a pass of its own: what it says of a text is never in sight of the tokens that are scored. It stands at
the host's first positions and is causal throughout, as the host alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from ..core.errors import ConfigError, InputError
from ..core.state import State
from ..hosts.attach import base_model, is_attached
from ..hosts.cache import MemoryCache
from ..hosts.frame import running
from ..hosts.saving import check_owner, identity_of
from ..hosts.segments import next_piece
from ..memories.recurrent.r3mem import R3Mem
from ..store.memory_archive import Entry, MemoryArchive


@dataclass(frozen=True)
class ReversibleLoss:
    """Scalars: `loss` is what to differentiate, the others its parts before their weights. memories: (B, S, m, d), the
    memory after each of S segments."""

    loss: Tensor
    forward: Tensor
    backward: Tensor
    cycle: Tensor
    memories: Tensor


def reversible_loss(
    model: Any, input_ids: Tensor, query: Tensor | None = None, *, backward: float = 1.0, cycle: float = 0.1
) -> ReversibleLoss:
    """The three losses of R3Mem. Gradients go back through all segments given: give contexts of 2 to 4.

    Args:
        input_ids: (B, tokens) int64 without padding, the context. query: (B, n) int64, what it is to be found by.
        backward, cycle: weights of L_bwd and L_cyc; a part with weight 0 is not computed, and 0.

    Raises:
        ConfigError: the memory is not "r3mem". InputError: shapes, or more tokens than the host has positions for.
    """
    base = _r3mem(model)
    _check_ids("input_ids", input_ids)
    state = base.memory.initial_state(len(input_ids))
    parts, logits, states = input_ids.split(base.mnemic.layout.segment, dim=1), [], [state]
    for part in parts:
        said, state = read_segment(base, part, state)
        logits.append(said)
        states.append(state)
    forward = base._loss(torch.cat(logits, dim=1), input_ids)
    if query is not None and query.shape[1] > 1:
        forward = forward + base._loss(read_segment(base, query, state)[0], query)
    recalled, agreed = [], []
    for part, before, after in zip(parts, states, states[1:], strict=False):
        if not backward and not cycle:
            break
        rebuilt = reconstruct(base, after["memory"], part, query)
        recalled.append(F.cross_entropy(rebuilt.flatten(0, 1).float(), part.flatten()))
        if cycle:
            again = read_segment(base, _expected(base, rebuilt), before)[1]["memory"]
            agreed.append(1 - F.cosine_similarity(after["memory"].detach(), again, dim=-1).mean())
    zero = forward.new_zeros(())
    back = torch.stack(recalled).mean() if recalled and backward else zero
    cyclic = torch.stack(agreed).mean() if agreed else zero
    memories = torch.stack([s["memory"] for s in states[1:]], dim=1)
    return ReversibleLoss(forward + backward * back + cycle * cyclic, forward, back, cyclic, memories)


def read_segment(model: Any, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Read a segment of at most T tokens and write its memory right behind them, whatever their number.

    Args:
        tokens: ids (B, n), or embeddings (B, n, d). state: of B rows, the memory that is read.

    Returns: logits (B, n, vocabulary), and the state after it.
    """
    base = _r3mem(model)
    rows, count = tokens.shape[:2]
    if not 1 <= count <= base.mnemic.layout.segment:
        raise InputError(f"A segment of {count} tokens, expected 1 to {base.mnemic.layout.segment}.")
    layout = replace(base.mnemic.layout, segment=count, every=count)
    cache = MemoryCache(layout)
    cache.start(state, rows)
    lengths = torch.full((rows,), count)
    piece = next_piece(cache, layout, torch.zeros_like(lengths), lengths, False)
    logits, segment, _ = base._read(cache, layout, piece, tokens, 0, False)
    return logits, base.memory.commit(state, segment)


def compress(model: Any, input_ids: Tensor) -> list[Tensor]:
    """The memories (B, m, d) after each segment of a context, ids (B, tokens) without padding; the last is of all."""
    base = _r3mem(model)
    _check_ids("input_ids", input_ids)
    state, memories = base.memory.initial_state(len(input_ids)), []
    for part in input_ids.split(base.mnemic.layout.segment, dim=1):
        state = read_segment(base, part, state)[1]
        memories.append(state["memory"])
    return memories


def reconstruct(model: Any, memory: Tensor, input_ids: Tensor, query: Tensor | None = None) -> Tensor:
    """What the host says of a text it reads behind [Phi^-1(memory) ; query], teacher-forced.

    Args:
        memory: (B, m, d). input_ids: (B, n) int64. query: (B, k) int64.

    Returns: logits (B, n, vocabulary), the i-th for token i of the text given those before it.
    """
    base = _r3mem(model)
    _check_ids("input_ids", input_ids)
    embeds = torch.cat([_prompt(base, memory, query), base.get_input_embeddings()(input_ids[:, :-1])], dim=1)
    return _alone(base, embeds, logits_to_keep=input_ids.shape[1])


@torch.no_grad()
def expand(model: Any, memory: Tensor, length: int, query: Tensor | None = None) -> Tensor:
    """The likeliest text of `length` tokens behind [Phi^-1(memory) ; query], token by token; ids (B, length)."""
    base = _r3mem(model)
    if length < 1:
        raise InputError(f"length = {length}, expected at least 1 token.")
    cache, embeds, ids = DynamicCache(), _prompt(base, memory, query), []
    _check_room(base, embeds.shape[1] + length - 1)
    for _ in range(length):
        best = _alone(base, embeds, logits_to_keep=1, past_key_values=cache, use_cache=True)[:, -1].argmax(-1)
        ids.append(best)
        embeds = base.get_input_embeddings()(best[:, None])
    return torch.stack(ids, dim=1)


@torch.no_grad()
def remember(model: Any, archive: MemoryArchive, input_ids: Tensor, level: str, start: int = 0) -> list[Entry]:
    """Put the memories of a context into the archive, one for each segment of it.

    Args:
        input_ids: (1, tokens) int64, the document, paragraph or sentence. start: its first token's place in the text.

    Raises:
        StateError: the archive is of another memory, host or weights.
    """
    base = _r3mem(model)
    if len(input_ids) != 1:
        raise InputError(f"remember takes one context at a time; got {len(input_ids)} rows.")
    if archive.owner:
        check_owner(base, archive.owner, "The archive")
    else:
        archive.owner = identity_of(base)
    added, segment = [], base.mnemic.layout.segment
    for i, memory in enumerate(compress(base, input_ids)):
        first = start + i * segment
        added.append(archive.add(memory[0], level, (first, start + min((i + 1) * segment, input_ids.shape[1]))))
    return added


@torch.no_grad()
def recall(model: Any, archive: MemoryArchive, query: Tensor, level: str | None = None) -> tuple[Entry, Tensor]:
    """The entry most like the memory of a question, ids (1, k), and the text it stands for, ids (its span's length,).

    Raises:
        InputError: the archive has nothing of that level. StateError: it is of another memory, host or weights.
    """
    base = _r3mem(model)
    if archive.owner:
        check_owner(base, archive.owner, "The archive")
    _, entry = archive.find(compress(base, query)[-1][0], level)[0]
    first, behind = entry.span
    memory = entry.memory[None].to(base.device)
    return entry, expand(base, memory, behind - first, query)[0]


def _r3mem(model: Any) -> Any:
    base = base_model(model)
    if not is_attached(base) or not isinstance(base.memory, R3Mem):
        raise ConfigError("Reversible compression is for a model with the memory 'r3mem' alone; attach it first.")
    return base


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.dim() != 2 or not ids.shape[1] or ids.is_floating_point():
        raise InputError(f"{name} of shape {tuple(ids.shape)} and {ids.dtype}, expected ids (rows, tokens).")


def _check_room(base: Any, tokens: int) -> None:
    limit = base.mnemic.max_positions
    if limit is not None and tokens > limit:
        raise InputError(f"A prompt and its text of {tokens} tokens do not fit the {limit} positions of the host.")


def _prompt(base: Any, memory: Tensor, query: Tensor | None) -> Tensor:
    """[Phi^-1(memory) ; query] as input embeddings."""
    prompt = base.memory.prompt(memory).to(base.get_input_embeddings().weight.dtype)
    if query is None:
        return prompt
    _check_ids("query", query)
    return torch.cat([prompt, base.get_input_embeddings()(query)], dim=1)


def _expected(base: Any, logits: Tensor) -> Tensor:
    """The input embeddings (B, n, d) that logits (B, n, V) expect."""
    table = base.get_input_embeddings()
    every = table(torch.arange(logits.shape[-1], device=logits.device))
    return logits.float().softmax(-1).to(every.dtype) @ every


def _alone(base: Any, embeds: Tensor, **given: Any) -> Tensor:
    """Logits of the host without its memory."""
    _check_room(base, embeds.shape[1])
    with running(None):
        output = base.mnemic.host_class.forward(base, inputs_embeds=embeds, **{"use_cache": False, **given})
    return output.logits
