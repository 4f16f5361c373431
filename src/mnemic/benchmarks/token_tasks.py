"""Token-level tasks by name, sized by options: what `mnemic train` trains on and `mnemic eval` measures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..core.errors import ConfigError, UnknownNameError
from .associative import CompositionalMqar, Mqar, SegmentMqar, TokenTask
from .key_values import Copying, Induction, PairSegments

TASKS: Mapping[str, type[Any]] = {
    "mqar": Mqar,
    "segment_mqar": SegmentMqar,
    "compositional_mqar": CompositionalMqar,
    "remember": PairSegments,
    "rewrite": PairSegments,
    "induction": Induction,
    "copying": Copying,
}


def token_task(name: str, options: Mapping[str, Any], segment: int) -> TokenTask:
    """The task of that name.

    Args:
        options: its sizes; the others are its defaults.
        segment: tokens of a segment, which is that of "segment_mqar".

    Raises:
        UnknownNameError: no such task. ConfigError: unknown sizes, sizes that cannot be, or a task whose segments have
            another length.
    """
    if name not in TASKS:
        raise UnknownNameError.of("token-level task", name, TASKS)
    kind = TASKS[name]
    fixed = {"segment_mqar": {"segment_length": segment}, "rewrite": {"rewrite": True}}.get(name, {})
    known = {f.name for f in dataclasses.fields(kind)} - {"segment_length", "rewrite"}
    ConfigError.check_names(f"size of {name}", options, known)
    task = kind(**options, **fixed)
    own = getattr(task, "segment_length", segment)
    if own != segment:
        raise ConfigError(
            f"{name} has segments of {own} tokens with these sizes, not {segment}: set segment (or unit) to {own}, or "
            "key_size and value_size to others."
        )
    return task
