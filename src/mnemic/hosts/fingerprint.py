"""Fingerprint: enough of a model to tell whether a file belongs to it.

`structure` is a hash over the names and shapes of all weights; it must match exactly. `sample` holds some dozens of
weights spread over the model, so that the same architecture with other weights is told apart; compared with a
tolerance, because files move between float32, bfloat16 and float16. LoRA weights do not count.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.errors import HostError, StateError

_SAMPLES = 64
_TOLERANCE = 5e-3


def fingerprint(model: nn.Module, part: str, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Fingerprint of `part`: "host" or "memory".

    Args:
        weights: all of the model's by name, for a model whose own are sharded over processes; None for its own.

    Raises:
        HostError: the weights are shards.
    """
    weights = _weights(model.state_dict(keep_vars=True) if weights is None else weights, part)
    if any(hasattr(w, "full_tensor") for w in weights.values()):
        raise HostError(
            f"The weights of this {type(model).__name__} are sharded over processes; save it on all of them with "
            "trainer.save_model, which gathers them first."
        )
    structure = hashlib.sha256()
    for name, weight in weights.items():
        structure.update(f"{name}:{tuple(weight.shape)};".encode())
    sample: list[float] = []
    floating = [w for w in weights.values() if w.is_floating_point() and w.numel()]
    for i in range(_SAMPLES if floating else 0):
        weight = floating[i * len(floating) // _SAMPLES].detach().reshape(-1)
        sample.append(float(weight[(i * 7919) % weight.numel()]))
    return {"structure": structure.hexdigest(), "sample": sample}


def check_fingerprint(
    model: nn.Module, part: str, stored: Any, what: str, mine: Mapping[str, Any] | None = None
) -> None:
    """Raises `StateError` unless `stored` is the fingerprint of this model's `part`; `what` names the file.

    mine: the model's own, where it is known.
    """
    try:
        structure, sample = stored["structure"], torch.tensor(stored["sample"], dtype=torch.float64)
    except (TypeError, KeyError, ValueError) as error:
        raise StateError(f"{what} carries no fingerprint of its {part}; it cannot be matched to this model.") from error
    mine = fingerprint(model, part) if mine is None else mine
    if structure != mine["structure"]:
        raise StateError(
            f"{what} belongs to a {part} of another architecture or width; load it with the one it came from."
        )
    ours = torch.tensor(mine["sample"], dtype=torch.float64)
    close = (ours - sample).abs() <= _TOLERANCE * ours.abs() + 1e-7
    if sample.shape != ours.shape or not bool(close.all()):
        raise StateError(
            f"{what} was written with other weights of the {part} (same architecture). Load the weights that it came "
            "from, or save the model whole next time."
        )


def _weights(named: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in sorted(named.items()):
        if "lora_" in name or name.startswith("memory.") != (part == "memory"):
            continue
        found[name.replace(".base_layer", "")] = weight
    return found
