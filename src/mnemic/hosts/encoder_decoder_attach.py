"""Attach a memory to an encoder-decoder: what `attach` does there in its own way."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import HostError
from ..core.memory import Memory, MemoryConfig
from ..core.stack import Stack
from . import probe
from .anatomy import Anatomy, attention_of, host_spec
from .attach import detach
from .attention import NAMES, HostAccess, find_norms, switch
from .encoder_attach import segment_length
from .encoder_decoder import EncoderDecoderHost
from .encoder_step import EncodedHook, encode_segment
from .layout import Layout
from .sites import install_sites, replaced_modules
from .steps import Attachment, stand_on

_TOKENS, _SHORT = 7, 4


def check_host(base: PreTrainedModel, anatomy: Anatomy) -> None:
    """A turn read through the segment loop, padded on either side, must give the logits of a plain forward.

    Raises:
        HostError: the host fails or gives other numbers.
    """
    _check_head(base)
    name, given = type(base).__name__, _given(base)
    try:
        with probe.evaluating(base), torch.no_grad():
            expected = [_logits(base, row) for row in _rows(given)]
            install(base, probe._Nothing(MemoryConfig(), host_spec(base)), anatomy, _TOKENS + 1)
            try:
                got = [_logits(base, turn) for turn in (given, {**given, **_to_the_left(given)})]
            finally:
                detach(base)
    except HostError:
        raise
    except Exception as error:
        raise HostError(
            f"{name} cannot read turns of several rows ({type(error).__name__}: {error}). Encoder-decoders whose "
            "forward takes input_ids, attention_mask, decoder_input_ids and encoder_outputs work, such as "
            "BartForConditionalGeneration."
        ) from error
    wanted = torch.cat(expected)
    error = max(float((logits - wanted).abs().max()) for logits in got)
    tolerance = 1e-3 if wanted.dtype in (torch.float32, torch.float64) else 5e-2
    if not error <= tolerance * max(float(wanted.abs().max()), 1.0):
        raise HostError(
            f"{name} does not honour the masks or encoder outputs it is given: its logits differ by {error:.2g} from a "
            "plain forward when rows are padded. Memories need a host that does."
        )


def install(base: PreTrainedModel, memory: Memory, anatomy: Anatomy, segment: int | None) -> None:
    """Put the memory in: class, hooks, layout. Undo with `detach`."""
    name, inside = type(base).__name__, memory.uses("attention")
    if hasattr(base, "memory") or hasattr(base, "mnemic"):
        raise HostError(f"{name} has an attribute 'memory' or 'mnemic' of its own; those names are ours.")
    _check_head(base)
    dropped = getattr(anatomy.stack, "layerdrop", 0.0)
    if dropped and memory.layers:
        raise HostError(
            f"The encoder of {name} leaves out layers in training (LayerDrop {dropped}), and the memory with them; "
            "load the host with encoder_layerdrop=0."
        )
    backend = str(base.config._attn_implementation)
    if inside and backend not in NAMES:
        raise HostError(
            f"{name} uses attn_implementation={backend!r}, in which the memory {memory.name!r} cannot take part; load "
            "it with attn_implementation='sdpa'."
        )
    segment = segment_length(name, memory, anatomy, segment)
    attentions = [attention_of(name, block) for block in anatomy.layers] if inside else []
    access = HostAccess(anatomy.stack, attentions)
    access.embeddings = base.get_input_embeddings()
    if inside and base.device.type != "meta":
        access.norms = find_norms(anatomy.layers, attentions, lambda: _run_once(anatomy, base))
    memory.copy_from(anatomy.layers, anatomy.stack, access)
    sites = install_sites(name, memory, anatomy)
    hooks = [anatomy.stack.register_forward_hook(EncodedHook())]
    if inside:
        switch(base, attentions, {backend: NAMES[backend]})
    attachment = Attachment(
        host_class=type(base),
        layout=Layout(segment=segment, every=segment, read=memory.num_read_tokens),
        stack=anatomy.stack,
        spans={},
        companion_spans={},
        backend=backend,
        access=access,
        max_positions=anatomy.max_positions,
        position_table=anatomy.position_table,
        sites=sites,
        replaced=[(p, p.requires_grad) for m in replaced_modules(memory, sites) for p in m.parameters()],
        hooks=hooks,
    )
    stand_on(base, EncoderDecoderHost, memory, attachment)


def check_memory(model: Any) -> None:
    """The memory's parts must be reached, in every layer of the encoder that it uses.

    Raises:
        HostError: the host calls its layers in a way of its own.
    """
    memory, attached = model.memory, model.mnemic
    ids = probe._ids(model, min(_TOKENS, attached.layout.segment))
    with probe.evaluating(model), torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        real = torch.ones_like(ids, dtype=torch.bool)
        done = encode_segment(memory, memory.initial_state(2), attached.access, attached.stack, embeds, real)
        if memory.num_read_tokens:
            _check_embeddings(model, ids, embeds)
    wanted = {"attention" if s == "residual" else s for s in memory.sites & {"attention", "residual", "feed_forward"}}
    wanted |= {"function"} if memory.uses("attention") else set()
    reached = done.frame.reached or set()
    missing = sorted((what, layer) for what in wanted for layer in memory.layers if (what, layer) not in reached)
    if missing and not isinstance(memory, Stack):
        what = missing[0][0]
        raise HostError(
            f"{attached.host_class.__name__} does not reach the {'attention' if what == 'function' else what} site of "
            f"its encoder's layers {[layer for w, layer in missing if w == what]}: it calls its parts in a way of its "
            "own. BART and T5, for example, do."
        )


def _check_head(base: PreTrainedModel) -> None:
    if base.get_output_embeddings() is None or not base.can_generate():
        raise HostError(
            f"{type(base).__name__} has no vocabulary head to decode with; a memory stands on an encoder-decoder that "
            "generates, such as BartForConditionalGeneration."
        )


def _check_embeddings(model: Any, ids: Tensor, embeds: Tensor) -> None:
    stack, ones = model.mnemic.stack, torch.ones_like(ids)
    expected = stack(input_ids=ids, attention_mask=ones)[0]
    if not torch.allclose(stack(inputs_embeds=embeds, attention_mask=ones)[0], expected, atol=1e-3, rtol=1e-3):
        raise HostError(
            f"{model.mnemic.host_class.__name__} scales embeddings outside of its table of them, so memory tokens "
            "cannot stand among its text. Memories at the sites 'residual' and 'attention' (membart) may work."
        )


def _run_once(anatomy: Anatomy, base: PreTrainedModel) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long, device=base.device)
    with probe.evaluating(anatomy.stack), torch.no_grad():
        anatomy.stack(input_ids=ids, attention_mask=torch.ones_like(ids))


def _given(base: PreTrainedModel) -> dict[str, Tensor]:
    """Two turns, the second shorter and padded on the right, and what their decoders begin with."""
    ids = probe._ids(base, _TOKENS)
    mask = torch.ones_like(ids)
    mask[1, _SHORT:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :_SHORT].flip(1)}


def _to_the_left(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second row's padding on the left."""
    moved = {name: given[name].clone() for name in ("input_ids", "attention_mask")}
    for name, part in moved.items():
        part[1] = given[name][1].roll(_TOKENS - _SHORT)
    return moved


def _rows(given: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each row alone and without padding."""
    whole = {name: part[:1] for name, part in given.items()}
    short = {name: part[1:, :_SHORT] for name, part in given.items()}
    return [whole, short]


def _logits(model: PreTrainedModel, given: dict[str, Tensor]) -> Tensor:
    return model(**given, use_cache=False).logits
