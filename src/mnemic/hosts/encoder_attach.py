"""Attach a memory to an encoder: what `attach` does where the host is one."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import ConfigError, HostError
from ..core.memory import Memory
from .anatomy import Anatomy, token_embeddings
from .attention import HostAccess
from .encoder import EncoderAttachment, EncoderHost
from .encoder_step import EncodedHook, encode_segment
from .layout import Layout
from .probe import _ids, evaluating
from .sites import install_sites, replaced_modules
from .steps import stand_on

DEFAULT_SEGMENT = 512


def check_host(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Embedded tokens must give what their ids give, padding must change nothing, and tokens must see each other both
    ways.

    Raises:
        HostError: the host fails or gives other numbers.
    """
    name, ids = type(model).__name__, _ids(model)
    try:
        with evaluating(model), torch.no_grad():
            ones = torch.ones_like(ids)
            expected = anatomy.stack(input_ids=ids, attention_mask=ones)[0]
            embeds = model.get_input_embeddings()(ids)
            padded = torch.cat([embeds, embeds[:, :2]], dim=1)
            mask = torch.nn.functional.pad(ones, (0, 2))
            got = anatomy.stack(inputs_embeds=padded, attention_mask=mask)[0][:, : ids.shape[1]]
            turned = anatomy.stack(inputs_embeds=torch.cat([embeds[:, :-1], embeds[:, :1]], 1), attention_mask=ones)[0]
    except Exception as error:
        raise HostError(
            f"{name} cannot run segments ({type(error).__name__}: {error}). Encoders that take input embeddings and a "
            "mask of padding work."
        ) from error
    scale = max(float(expected.abs().max()), 1.0)
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    if not float((got - expected).abs().max()) <= tolerance * scale:
        raise HostError(
            f"{name} does not honour the embeddings or the mask it is given: padding behind a text changes it by "
            f"{float((got - expected).abs().max()):.2g}. Memories need a host that does."
        )
    if torch.equal(turned[:, 0], expected[:, 0]):
        raise HostError(
            f"{name} reads from left to right only, so memory tokens in front of a text cannot be written. Memories on "
            "causal hosts take their language model, such as LlamaForCausalLM."
        )


def install(base: PreTrainedModel, memory: Memory, anatomy: Anatomy, segment: int | None) -> None:
    """Put the memory in: class, hooks, layout. Undo with `detach`."""
    name = type(base).__name__
    if hasattr(base, "memory") or hasattr(base, "mnemic"):
        raise HostError(f"{name} has an attribute 'memory' or 'mnemic' of its own; those names are ours.")
    segment = segment_length(name, memory, anatomy, segment)
    _check_special(base, memory)
    by_token = _by_token(base)
    access = HostAccess(anatomy.stack, [])
    access.embeddings = base.get_input_embeddings()
    sites = install_sites(name, memory, anatomy)
    attachment = EncoderAttachment(
        host_class=type(base),
        layout=Layout(segment=segment, every=segment, read=memory.num_read_tokens),
        stack=anatomy.stack,
        spans={},
        companion_spans={},
        backend=str(base.config._attn_implementation),
        access=access,
        max_positions=anatomy.max_positions,
        position_table=anatomy.position_table,
        sites=sites,
        replaced=[(p, p.requires_grad) for m in replaced_modules(memory, sites) for p in m.parameters()],
        hooks=[anatomy.stack.register_forward_hook(EncodedHook())],
        by_token=by_token,
    )
    stand_on(base, EncoderHost, memory, attachment)


def check_memory(model: Any) -> None:
    """The memory's parts must be reached, in every layer that it uses.

    Raises:
        HostError: the host calls its layers in a way of its own.
    """
    memory, attached = model.memory, model.mnemic
    ids = _ids(model, min(7, attached.layout.segment))
    with evaluating(model), torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        real = torch.ones_like(ids, dtype=torch.bool)
        done = encode_segment(memory, memory.initial_state(2), attached.access, attached.stack, embeds, real)
    wanted = {"attention" if s == "residual" else s for s in memory.sites & {"attention", "residual", "feed_forward"}}
    reached = done.frame.reached or set()
    missing = sorted((what, layer) for what in wanted for layer in memory.layers if (what, layer) not in reached)
    if missing:
        raise HostError(
            f"{attached.host_class.__name__} does not reach the {missing[0][0]} site of its layers "
            f"{[layer for what, layer in missing if what == missing[0][0]]}: it calls its parts in a way of its own. "
            "Memories at the site 'tokens' (rmt-1m) may work."
        )


def segment_length(name: str, memory: Memory, anatomy: Anatomy, segment: int | None) -> int:
    """Tokens of a segment, by default what the host's positions allow.

    Raises:
        ConfigError: not a number of at least 1, or more than fits.
    """
    opening, closing = memory.opening_token is not None, memory.closing_token is not None
    around = memory.num_read_tokens + opening + closing * (1 + bool(memory.num_read_tokens))
    limit = anatomy.max_positions
    if segment is None:
        segment = DEFAULT_SEGMENT if limit is None else min(DEFAULT_SEGMENT, limit - around)
    if not isinstance(segment, int) or isinstance(segment, bool) or segment < 1:
        raise ConfigError(f"segment = {segment!r}, expected a number of tokens of at least 1.")
    if limit is not None and segment + around > limit:
        raise ConfigError(
            f"A segment of {segment} tokens with {around} memory and special tokens needs {segment + around} "
            f"positions, but {name} has {limit}; use segment={max(limit - around, 0)} or less."
        )
    return segment


def _check_special(base: PreTrainedModel, memory: Memory) -> None:
    size = token_embeddings(base).shape[0]
    for token in (memory.opening_token, memory.closing_token):
        if token is not None and token >= size:
            raise ConfigError(
                f"{memory.name}: the special token {token} is none of the host's {size} tokens; take the ids from its "
                "tokenizer (cls_token_id, sep_token_id)."
            )


def _by_token(base: PreTrainedModel) -> bool:
    """Whether the head says something of every token, not of the text.

    Raises:
        HostError: it is a head of another kind, or there is none.
    """
    ids: Tensor = _ids(base, 3)
    name = type(base).__name__
    try:
        with evaluating(base), torch.no_grad():
            embeds = base.get_input_embeddings()(ids)
            output = base(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), return_dict=True)
        shape = tuple(output.logits.shape) if hasattr(output, "logits") else ()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise HostError(f"{name} cannot run its head on one text a row ({error}); {_HEADS}") from error
    if len(shape) == 3 and shape[:2] == tuple(ids.shape):
        return True
    if len(shape) == 2 and shape[0] == len(ids):
        return False
    gives = f"logits of shape {shape}" if shape else f"{', '.join(output.keys())}"
    raise HostError(f"The head of {name} gives {gives} for {tuple(ids.shape)} tokens; {_HEADS}")


_HEADS = (
    "heads that give one answer a text (ForSequenceClassification) or one a token (ForTokenClassification, "
    "ForMaskedLM) can have a memory."
)
