"""Anatomy: where a host keeps its layers and their attention, found through what it declares.

Nothing is listed per architecture. The layers are the one `nn.ModuleList` as long as `num_hidden_layers` outside of
other layers; a layer's attention is its child whose class the host names among its recordable outputs, or whose
name says so. Of an encoder-decoder these are the encoder's.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.errors import HostError
from ..core.memory import HostSpec
from .kinds import kind_of
from .layout import host_spans

_NEEDED = ("attention_mask", "position_ids", "past_key_values", "inputs_embeds")
_NEEDED_OF_ENCODERS = ("attention_mask", "inputs_embeds")
_MASKABLE = ("eager", "sdpa")


@dataclass(frozen=True)
class Anatomy:
    """layers: the host's layers, in order; stack: the module that runs them and returns the last hidden state (after
    the final norm); max_positions: None if unlimited; position_table: positions are learned or fixed vectors, so that
    they cannot go on past `max_positions`."""

    layers: tuple[nn.Module, ...]
    stack: nn.Module
    max_positions: int | None
    position_table: bool


def examine(model: nn.Module) -> Anatomy:
    """Find what a memory needs in `model`.

    Raises:
        HostError: naming the host, what is missing, and what would work.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise HostError(f"{name} is no transformers model; a host is a causal language model such as LlamaForCausalLM.")
    if kind_of(type(model), model.config) != "decoder":
        return _examine_encoder(model)
    if model.get_output_embeddings() is None:
        raise HostError(f"{name} is no decoder-only language model with a vocabulary head, such as LlamaForCausalLM.")
    accepted = inspect.signature(model.forward).parameters
    missing = [p for p in _NEEDED if p not in accepted]
    if missing:
        raise HostError(f"{name}.forward does not take {', '.join(missing)}; segments of a stream need them.")
    implementation = model.config._attn_implementation
    if implementation not in _MASKABLE:
        raise HostError(
            f"{name} uses attn_implementation={implementation!r}, which takes no masks for rows at different places; "
            "load it with attn_implementation='sdpa'. (SDPA runs flash kernels wherever no mask is needed.)"
        )
    host_spans(model.config)
    stack, layers = _layer_stack(model)
    config = model.config.get_text_config(decoder=True)
    return Anatomy(
        layers=tuple(layers),
        stack=stack,
        max_positions=getattr(config, "max_position_embeddings", None),
        position_table=not _rotates(config),
    )


def _examine_encoder(model: PreTrainedModel) -> Anatomy:
    name, stack = type(model).__name__, encoder_of(model)
    accepted = inspect.signature(stack.forward).parameters
    missing = [p for p in _NEEDED_OF_ENCODERS if p not in accepted]
    if missing:
        raise HostError(
            f"{type(stack).__name__}.forward does not take {', '.join(missing)}; a memory on {name} needs them."
        )
    config = model.config.get_text_config(encoder=True)
    return Anatomy(
        layers=tuple(_layer_stack(model)[1]),
        stack=stack,
        max_positions=_encoder_positions(stack, config),
        position_table=not _rotates(config),
    )


def encoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that runs the encoder's layers and returns its last hidden state: of an encoder-decoder its encoder,
    of an encoder what its head stands on."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def _encoder_positions(stack: nn.Module, config: PreTrainedConfig) -> int | None:
    """Positions that the encoder has, None if unlimited. A table with a padding entry numbers them from behind it."""
    declared = getattr(config, "max_position_embeddings", None)
    for name, module in stack.named_modules():
        if declared and "position" in name and isinstance(module, nn.Embedding) and module.num_embeddings == declared:
            return declared if module.padding_idx is None else declared - module.padding_idx - 1
    return declared


def host_spec(model: PreTrainedModel) -> HostSpec:
    """What memories may know about `model`.

    Raises:
        HostError: token embeddings of another width than the residual stream.
    """
    embeddings, kind = token_embeddings(model), kind_of(type(model), model.config)
    config = _text_config(model)
    if embeddings.shape[1] != config.hidden_size:
        raise HostError(
            f"{type(model).__name__} embeds tokens in {embeddings.shape[1]} dimensions but runs on "
            f"{config.hidden_size}; memories need both equal."
        )
    # On a sample: the whole table of a large host in float32 would cost gigabytes.
    heads = config.num_attention_heads
    std = 0.02 if embeddings.is_meta else float(embeddings[:1024].detach().float().std())
    return HostSpec(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        embedding_std=std,
        dtype=embeddings.dtype if embeddings.is_floating_point() else torch.get_default_dtype(),
        device=embeddings.device,
        num_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=embeddings.shape[0],
        rotary=_rotates(config),
        max_positions=getattr(config, "max_position_embeddings", None)
        if kind == "decoder"
        else _encoder_positions(encoder_of(model), config),
        linears={name: _widths(m) for name, m in linears_of(_layer_stack(model)[1][0])},
        kind=kind,
    )


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    decoder = kind_of(type(model), model.config) == "decoder"
    return model.config.get_text_config(decoder=True) if decoder else model.config.get_text_config(encoder=True)


def _rotates(config) -> bool:
    return bool(getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None))


def token_embeddings(model: PreTrainedModel) -> Tensor:
    """The host's table of token embeddings, (vocabulary, width)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _layer_stack(model: PreTrainedModel) -> tuple[nn.Module, list[nn.Module]]:
    """The module that holds the layers, and the layers."""
    count = _text_config(model).num_hidden_layers
    whole: nn.Module = model if kind_of(type(model), model.config) == "decoder" else encoder_of(model)
    lists = {name: m for name, m in whole.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    # Experts of a one-layer host could match too; the outermost list is the stack of layers.
    outer = [n for n in lists if not any(n.startswith(f"{o}.") for o in lists if o != n)]
    if len(outer) != 1:
        found = ", ".join(outer) or "none"
        raise HostError(
            f"{type(model).__name__} declares {count} layers; expected one list of that many modules, found {found}."
        )
    return whole.get_submodule(outer[0].rpartition(".")[0]), list(lists[outer[0]])


def attention_of(host: str, layer: nn.Module) -> nn.Module:
    """The attention module of a layer, where the residual site is. In a layer that is a list of parts, such as T5's, it
    stands inside the first of them.

    Raises:
        HostError: the layer has none, or several.
    """
    children = dict(layer.named_children())
    parts = [m for m in children.values() if isinstance(m, nn.ModuleList) and len(m)]
    found = _attentions(layer) or (_attentions(parts[0][0]) if len(parts) == 1 else [])
    if len(found) != 1:
        raise HostError(
            f"{host} has no single attention module in {type(layer).__name__} (children: {', '.join(children)}), so "
            "the residual site does not exist there. Memories at the site 'tokens' (rmt) may still attach."
        )
    return found[0]


def _attentions(module: nn.Module) -> list[nn.Module]:
    children = module.named_children()
    return [m for n, m in children if "attention" in type(m).__name__.lower() and "cross" not in n.lower()]


def feed_forward_of(host: str, layer: nn.Module) -> nn.Module:
    """The feed-forward module of a decoder layer, where the feed_forward site is.

    Raises:
        HostError: the layer has none, or several.
    """
    children = dict(layer.named_children())
    words = ("mlp", "feedforward", "ffn", "moe", "expert")
    kinds = {n: type(m).__name__.lower() for n, m in children.items()}
    found = [n for n, k in kinds.items() if any(w in k for w in words) and "norm" not in k and "attention" not in k]
    if len(found) != 1:
        raise HostError(
            f"{host} has no single feed-forward module in {type(layer).__name__} (children: {', '.join(children)}), so "
            "the feed_forward site does not exist there. Hosts such as Llama, GPT-2 or Gemma have one."
        )
    return children[found[0]]


def linears_of(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear layers of a block by name, transformers' Conv1D included."""
    return [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def _widths(linear: nn.Module) -> tuple[int, int]:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return (weight.shape[1], weight.shape[0]) if isinstance(linear, nn.Linear) else (weight.shape[0], weight.shape[1])
