"""LIMe: Layer-Integrated Memory (2025, arXiv 2502.09245).

Memory over depth, not over time: the keys and values of a layer are a learned mix of those of all layers up to it, at
the same position. For layer l and key-value head g, with H heads and a router R^l (H, (l + 1) H) for both:

    (k, v)[g] = sum over layers j <= l and heads g' of R^l[g, j H + g'] (k, v)_j[g']

(k, v)_j is what layer j itself makes, not its mix. Keys are mixed before rotation and kept rotated, so the cache is as
large as the host's and holds what attention reads: while decoding, only the new token's own keys and values are mixed.
Layer 0 has nothing to mix.

Decisions:
- Nothing is remembered beyond the segment: each is a fresh context, as for the baseline "none". Train and run it with
  segments as long as the text, or stack a memory over time on it.
- On hosts that normalise keys (Qwen3), what is mixed are the normalised keys: the mix comes after the host's own norm
  and is not normalised again. Nothing differs while the routers are the identity.
- `init`: "random" is the released code's start, for hosts trained from scratch; the preset "attach" starts other layers
  at zero, which leaves a pretrained host unchanged.
- Biases of the projections are part of what is mixed.
- Routers are kept in float32 and trained at ten times the learning rate (the paper's 1e-2 beside 1e-3), without weight
  decay, which would pull a layer's own heads towards zero (`optimizer_groups`).
- Under autograd the layers below are a list, otherwise rows of one buffer (see ops/depth_routing.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import HostError
from ...core.memory import HostSpec, Memory, MemoryConfig, option
from ...core.step import Step
from ...ops import depth_routing


@dataclass(frozen=True, kw_only=True)
class LIMeConfig(MemoryConfig):
    name = "lime"
    presets = {"attach": {"init": "identity"}}

    init: Literal["random", "identity"] = option(
        "random", "what layers take of those below at first: uniform up to sqrt(3 / fan-in), or nothing"
    )


class LIMe(Memory):
    name = "lime"
    config_class = LIMeConfig
    paper = "You Do Not Fully Utilize Transformer's Representation Capacity (2025, arXiv 2502.09245)"
    state_size = "0"
    config: LIMeConfig

    def __init__(self, config: LIMeConfig, host: HostSpec):
        super().__init__(config, host)
        if host.num_layers < 2:
            raise HostError(f"lime mixes keys and values of several layers; this host has {host.num_layers}.")
        dtype = torch.promote_types(host.dtype, torch.float32)
        self.routers = nn.ParameterList(
            depth_routing.initial_router(i, host.num_key_value_heads, config.init, dtype=dtype, device=host.device)
            for i in range(1, host.num_layers)
        )

    @property
    def identity_at_attach(self) -> bool:
        return self.config.init == "identity"

    def optimizer_groups(self) -> Mapping[str, Mapping[str, float]]:
        return {"routers.*": {"lr_scale": 10.0, "weight_decay": 0.0}}

    def keys_values(self, keys: Tensor, values: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Mixed keys and values of this step, (B, H, T, e) each.

        Raises:
            HostError: keys or values that are not `num_key_value_heads` of width `head_dim`.
        """
        i = step.layer
        self._check(keys, values, i)
        if torch.is_grad_enabled():
            step.add_note(own=depth_routing.pack(keys, values))
            below: Tensor | list[Tensor] = [self._note(step, "own", j) for j in range(i + 1)]
        else:
            if i == 0:
                step.add_note(buffer=depth_routing.new_buffer(self.host.num_layers, keys))
            below = self._note(step, "buffer", 0)
            depth_routing.store(below, i, keys, values)
        return depth_routing.route(below, self.routers[i - 1]) if i else (keys, values)

    def _note(self, step: Step, name: str, layer: int) -> Tensor:
        noted = step.note(name, layer)
        if noted is None:
            raise HostError(f"lime: layer {step.layer} of the host runs before layer {layer}, whose keys it mixes.")
        return noted

    def _check(self, keys: Tensor, values: Tensor, layer: int) -> None:
        wanted = (self.host.num_key_value_heads, self.host.head_dim)
        for what, made in (("keys", keys), ("values", values)):
            if (found := (made.shape[1], made.shape[3])) != wanted:
                raise HostError(
                    f"lime mixes layers with equal heads: expected {wanted[0]} {what} of width {wanted[1]}, layer "
                    f"{layer} of the host makes {found[0]} of width {found[1]}. Hosts such as Llama or GPT-2 work."
                )
