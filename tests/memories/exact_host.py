"""A llama that computes in float64 throughout, for comparisons of gradients."""

from typing import Any

import torch

from tests.tiny import tiny_host


def exact_host() -> Any:
    """Llama in float64, its norms too, which are float32 in the original."""
    host = tiny_host().double()
    for layer in [*host.model.layers, host.model]:
        for name, norm in list(layer.named_children()):
            if name.endswith("norm"):
                exact = torch.nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(layer, name, exact)
    return host
