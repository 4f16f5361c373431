"""The supervised stages of training RxT (2025, arXiv 2510.03561), before any reinforcement learning.

    1, 2  joint      next tokens of a segment read with ED' in place of the slots,   ED' = detach(ED) + noise
    3     attention  - cos(STM_t, (1 - w_t) STM_{t-1} + w_t ED_t),  summed over the segments t of a text
    4     aware      next tokens of a text of several segments, through all commits: the loss of the model itself

`train_only` says which parameters a stage trains; the losses of the first two are here. Stages 1 and 2 differ in their
texts alone.

Decisions:
- ED has a row for each token, the slots are S: rows are averaged over S equal stretches of the segment (the paper takes
  segments of S tokens, where this changes nothing).
- ED' is normalised before the noise is added, so that its size has a meaning; slots are normalised where they are read.
- w_t = first / t: 0.9 in the first segment, then as the mean of all that was read has it.
- The host is encoder and decoder: it trains in stages 1 and 2, and there is no masked-token loss beside.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ConfigError, InputError, UnknownNameError
from ..core.memory import Segment
from ..core.state import State
from ..core.step import Frame
from ..hosts.attach import base_model, is_attached
from ..hosts.frame import KEYWORD, Carried, running
from ..memories.recurrent.rxt import RxT, norm

Stage = Literal["joint", "attention", "aware"]
READS = ("read.", "scale")


def train_only(model: Any, stage: Stage) -> Any:
    """Let a stage's parameters be trained and no others; returns the model.

    joint: the host and what reads the slots. attention: what writes them. aware: everything.
    """
    trained = {"joint": (True, True, False), "attention": (False, False, True), "aware": (True, True, True)}
    if stage not in trained:
        raise UnknownNameError.of("stage of rxt", stage, trained)
    host, reads, writes = trained[stage]
    base = _base(model)
    for name, parameter in base.named_parameters():
        own = name.removeprefix("memory.")
        parameter.requires_grad_(host if own == name else reads if own.startswith(READS) else writes)
    return model


def joint_loss(
    model: Any, input_ids: Tensor, labels: Tensor | None = None, *, noise: float, generator: torch.Generator
) -> Tensor:
    """Stages 1 and 2: the loss of one segment whose own, noisy encoding stands in the slots.

    Args:
        input_ids: (B, T) int64, T at most a segment. labels: (B, T), -100 to ignore; None: the text itself.
        noise: standard deviation of what is added to the normalised encoding. generator: on the CPU.

    Raises:
        ConfigError: another memory. InputError: more than a segment.
    """
    base = _base(model)
    length = base.mnemic.layout.segment
    if input_ids.dim() != 2 or input_ids.shape[1] > length:
        raise InputError(f"Ids of shape {tuple(input_ids.shape)}; expected (batch, tokens), tokens up to {length}.")
    first = base.memory.initial_state(len(input_ids))
    with torch.no_grad():
        encoded = resampled(norm(encoding(model, input_ids, first)), base.memory.config.num_slots)
    added = torch.randn(encoded.shape, generator=generator) * noise
    state = State({"slots": encoded + added.to(encoded)})
    labels = input_ids if labels is None else labels
    return model(input_ids, labels=labels, memory_state=state, use_cache=False).loss


def memory_attention_loss(model: Any, input_ids: Tensor, *, first: float = 0.9) -> Tensor:
    """Stage 3: the mean over segments, blocks and slots of the negative cosine between slots and their target.

    Args:
        input_ids: (B, n T) int64, whole segments. first: w of the first segment.

    Raises:
        ConfigError: another memory, or a share outside 0 to 1. InputError: not whole segments.
    """
    base = _base(model)
    length, memory = base.mnemic.layout.segment, base.memory
    if not 0 < first <= 1:
        raise ConfigError(f"first = {first}, expected more than 0 and at most 1.")
    if input_ids.dim() != 2 or not input_ids.shape[1] or input_ids.shape[1] % length:
        raise InputError(f"Ids of shape {tuple(input_ids.shape)}; expected whole segments of {length} tokens.")
    state, losses = memory.initial_state(len(input_ids)), []
    for t, ids in enumerate(input_ids.split(length, dim=1), start=1):
        with torch.no_grad():
            hidden = encoding(model, ids, state)
            share = first / t
            target = (1 - share) * state["slots"] + share * resampled(hidden, memory.config.num_slots)
        trace = {layer: {"hidden": part} for layer, part in zip(memory.layers, hidden.unbind(1), strict=True)}
        state = memory.commit(state, Segment(trace))
        losses.append(-F.cosine_similarity(state["slots"], target, dim=-1).mean())
    return torch.stack(losses).mean()


def encoding(model: Any, input_ids: Tensor, state: State) -> Tensor:
    """ED: what the blocks make of a segment, (B, L, T, d), from ids (B, T) read with a state."""
    base = _base(model)
    embedded = base.get_input_embeddings()(input_ids)
    places = torch.arange(embedded.shape[1], device=embedded.device)[None]
    reads = base._prepared(state)
    frame = Frame(base.memory, state, reads, host=base.mnemic.access, training=base.training)
    frame.places, frame.segment = places, base.mnemic.layout.segment
    with running(frame):
        base.mnemic.stack(
            inputs_embeds=embedded,
            attention_mask=None,
            position_ids=places.expand(len(embedded), -1),
            use_cache=False,
            **{KEYWORD: Carried(frame)},
        )
    return torch.stack([frame.trace[layer]["hidden"] for layer in base.memory.layers], dim=1)


def resampled(hidden: Tensor, rows: int) -> Tensor:
    """(B, L, T, d) -> (B, L, rows, d): means over equal stretches of the tokens; repeats where there are fewer."""
    return F.adaptive_avg_pool1d(hidden.transpose(2, 3).flatten(0, 1), rows).unflatten(0, hidden.shape[:2]).mT


def _base(model: Any) -> Any:
    base = base_model(model)
    if not is_attached(base) or not isinstance(base.memory, RxT):
        raise ConfigError("The stages of training are those of a host with the memory 'rxt'; attach it first.")
    return base
