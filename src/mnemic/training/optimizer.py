"""Optimiser groups: what the host and the parts of a memory are trained with, each parameter in exactly one group."""

from collections.abc import Container, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.errors import ConfigError
from ..core.memory import Memory

_KNOWN = ("lr", "lr_scale", "weight_decay")


def regroup(
    optimizer: Optimizer,
    memory: Memory,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    decayed: Container[int] = (),
) -> None:
    """Move the parameters of `memory` into groups of their own, as `Memory.optimizer_groups` says, in place.

    A group with "lr" is constant: it carries "constant_lr", which is put back before every step, whatever the schedule.

    Args:
        learning_rate: of the memory's parameters that name none; None for that of the group they were in.
        weight_decay: the same, for those of the parameters whose id is in `decayed` (norms and biases are not decayed).

    Raises:
        ConfigError: the memory names a setting that is unknown, or parameters that it does not have.
    """
    ours = {id(p): settings for p, settings in _settings(memory)}
    groups = list(optimizer.param_groups)
    found: dict[tuple, dict[str, Any]] = {}
    for i, group in enumerate(groups):
        members = [p for p in group["params"] if id(p) in ours]
        group["params"] = [p for p in group["params"] if id(p) not in ours]
        for parameter in members:
            settings = ours[id(parameter)]
            one = {**group, "lr": float(group["lr"]) if learning_rate is None else learning_rate}
            one["lr"] = settings.get("lr", one["lr"] * settings.get("lr_scale", 1.0))
            own = weight_decay if weight_decay is not None and id(parameter) in decayed else group["weight_decay"]
            one["weight_decay"] = settings.get("weight_decay", own)
            if "lr" in settings:
                one["constant_lr"] = settings["lr"]
            key = (i, one["lr"], one["weight_decay"], "lr" in settings)
            if isinstance(group["lr"], Tensor):
                # 8-bit optimisers of torchao compile their step: rates are tensors, each group's its own.
                one["lr"] = group["lr"].new_tensor(one["lr"])
            found.setdefault(key, {**one, "params": []})["params"].append(parameter)
    optimizer.param_groups[:] = [group for group in groups if group["params"]]
    for group in found.values():
        optimizer.add_param_group(group)
    if any("constant_lr" in group for group in found.values()):
        optimizer.register_step_pre_hook(_keep_constant)


def _settings(memory: Memory) -> list[tuple[nn.Parameter, Mapping[str, float]]]:
    named, patterns = dict(memory.named_parameters()), memory.optimizer_groups()
    for pattern, settings in patterns.items():
        unknown = sorted(set(settings) - set(_KNOWN))
        if unknown or not {"lr", "lr_scale"} - set(settings):
            raise ConfigError(
                f"{memory.name}: the optimiser group {pattern!r} has the settings {sorted(settings)}; expected "
                "weight_decay, and either lr or lr_scale."
            )
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ConfigError(
                f"{memory.name}: no parameter has a name like {pattern!r}, which has an optimiser group; its "
                f"parameters are {', '.join(named)}."
            )
    return [
        (parameter, next((s for pattern, s in patterns.items() if fnmatchcase(name, pattern)), {}))
        for name, parameter in named.items()
    ]


def _keep_constant(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if "constant_lr" in group:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["constant_lr"])
            else:
                group["lr"] = group["constant_lr"]
