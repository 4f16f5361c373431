"""The attention site: functions that transformers' attention modules look up by name, and what a memory may ask of
the host's projections and positions.

The names carry none of the backends' names, which transformers would read as a claim to their features.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.errors import UnsupportedError
from ..core.step import AttentionCall
from ..ops.rotary import rotate, unrotate
from .frame import current, running

NAMES = {"sdpa": "mnemic_fused", "eager": "mnemic_eager"}


@dataclass(eq=False)
class Capture:
    """Stands for a frame while keys and values are projected: the attention function leaves them here."""

    frame: Any = None
    keys: Tensor | None = None
    values: Tensor | None = None


def attend(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function around the backend `base`."""

    def function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        frame: Any = current()
        if isinstance(frame, Capture):
            frame.keys, frame.values = key, value
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

        def plain(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
            if base == "eager" and mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
            return _base(base, module)(module, query, keys, values, mask, **kwargs)[0]

        layer = _layer(module, frame)
        if frame is None or layer not in frame.memory.layers:
            return plain(query, key, value, attention_mask), None
        rotation, new = frame.rotations.get(layer), None
        if frame.columns is not None:
            new = frame.columns.new.get(layer)
        if new is None:
            key, value = routed(frame, layer, key, value)
            new = (key, value)
        call = AttentionCall(
            query=query,
            keys=key,
            values=value,
            mask=attention_mask,
            scale=kwargs["scaling"] if kwargs.get("scaling") is not None else query.shape[-1] ** -0.5,
            new_keys=new[0],
            new_values=new[1],
            rotation=rotation,
            key_places=frame.places if frame.key_places is None else frame.key_places,
            base=plain,
            softcap=kwargs.get("softcap") if base == "eager" else None,
        )
        if frame.reached is not None:
            frame.reached.add(("function", layer))
        return frame.memory.attention(call, frame.at(layer)), None

    return function


def _layer(module: nn.Module, frame: Any) -> Any:
    """Number of the layer that an attention module belongs to; encoders' often do not know theirs."""
    known = getattr(module, "layer_idx", None)
    return frame.attending if known is None and frame is not None else known


def routed(frame: Any, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """This step's keys and values (B, heads, T, e) as the memory wants them kept."""
    memory = frame.memory
    if not memory.uses("keys_values") or layer not in memory.layers:
        return keys, values
    rotation = frame.rotations.get(layer)
    if rotation is None:
        return memory.keys_values(keys, values, frame.at(layer))
    keys, values = memory.keys_values(unrotate(keys, *rotation), values, frame.at(layer))
    return rotate(keys, *rotation), values


def register() -> None:
    """Make the functions, and the masks of their backends, known to transformers."""
    for base, name in NAMES.items():
        AttentionInterface.register(name, attend(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def switch(model: Any, attentions: list[nn.Module], names: dict[str, str]) -> None:
    """Let the attention modules look up `names[<what they look up now>]` from now on."""
    configs = [model.config, *(getattr(a, "config", None) for a in attentions)]
    for config in {id(c): c for c in configs if c is not None}.values():
        name = config._attn_implementation
        if name in names:
            config._attn_implementation = names[name]


class HostAccess:
    """See `core.step.Host`. blocks and their attentions are the host's; `stack` is the module that runs them."""

    def __init__(self, stack: nn.Module, attentions: list[nn.Module]):
        self.attentions, self.stack = attentions, stack
        self.rotary_module = next((m for n, m in stack.named_children() if "rotary" in n), None)
        self.layer_types = getattr(getattr(stack, "config", None), "layer_types", None)
        self.norms: dict[int, nn.Module | None] = {}
        self.embeddings: nn.Module | None = None
        self.spans: dict[str, tuple[str, int] | None] = {"": None}

    def rotary(self, places: Tensor, layer: int) -> tuple[Tensor, Tensor] | None:
        if self.rotary_module is None:
            return None
        like = next(self.attentions[layer].parameters())
        given: dict[str, Any] = {}
        if "layer_type" in inspect.signature(self.rotary_module.forward).parameters and self.layer_types:
            given["layer_type"] = self.layer_types[layer]
        return self.rotary_module(like.new_zeros(1), places, **given)

    def project(self, hidden: Tensor, layer: int, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        attention, capture = self.attentions[layer], Capture(current())
        if hasattr(next(attention.parameters()), "full_tensor"):
            raise UnsupportedError(
                f"This memory uses the projections of layer {layer} while the layer is not running, and FSDP2 gathers "
                "their weights only then. Train replicas (DDP) instead."
            )
        given: dict[str, Any] = {"attention_mask": None}
        free = torch.zeros(1, hidden.shape[1], dtype=torch.long, device=hidden.device)
        turned = self.rotary(free if places is None else places, layer)
        if turned is not None and places is None:
            # No turn at all: keys come out free of position, whatever the host's convention.
            turned = (torch.ones_like(turned[0]), torch.zeros_like(turned[1]))
        if turned is not None:
            given["position_embeddings"] = turned
        with running(capture):  # pyright: ignore[reportArgumentType]
            # GPT-2's linear layers take views of it.
            type(attention).forward(attention, hidden_states=hidden.contiguous(), **given)
        assert capture.keys is not None
        assert capture.values is not None
        return capture.keys, capture.values

    def normalise(self, hidden: Tensor, layer: int) -> Tensor:
        norm = self.norms[layer]
        return hidden if norm is None else norm(hidden)

    def run(self, embeddings: Tensor) -> Tensor:
        if any(hasattr(p, "full_tensor") for p in self.stack.parameters()):
            raise UnsupportedError(
                "This memory runs the host's layers beside the text, and FSDP2 would not gather their weights for the "
                "backward pass. Train replicas (DDP) instead."
            )
        places = torch.arange(embeddings.shape[1], device=embeddings.device).expand(embeddings.shape[0], -1)
        with running(None):
            return self.stack(
                inputs_embeds=embeddings, attention_mask=None, position_ids=places, use_cache=False
            ).last_hidden_state

    def embed(self, ids: Tensor) -> Tensor:
        assert isinstance(self.embeddings, nn.Module)
        # Not by calling the module: some hosts scale in there, and hooks on it would fire.
        return functional.embedding(ids, self.embeddings.get_parameter("weight"))

    def span(self, layer: int) -> tuple[str, int] | None:
        return self.spans["" if "" in self.spans or not self.layer_types else self.layer_types[layer]]


def find_norms(blocks: tuple[nn.Module, ...], attentions: list[nn.Module], run: Callable[[], Any]) -> dict:
    """Per block the child whose output its attention reads, None where it reads the block's own input; `run` runs
    the host once."""
    made: dict[int, dict[int, nn.Module]] = {}
    found: dict[int, nn.Module | None] = {}
    hooks = []
    for layer, (block, attention) in enumerate(zip(blocks, attentions, strict=True)):
        for child in block.children():
            if child is not attention:
                # The tensor itself is kept: its id must not be used again meanwhile.
                def after(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                    made.setdefault(layer, {})[id(output)] = module
                    kept.append(output)

                hooks.append(child.register_forward_hook(after))

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any], layer: int = layer) -> None:
            source = args[0] if args else kwargs["hidden_states"]
            found[layer] = made.get(layer, {}).get(id(source))

        hooks.append(attention.register_forward_pre_hook(before, with_kwargs=True))
    kept: list[Any] = []
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _base(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward


register()
