"""Reports, and which of them apply to a memory: found from what the memory declares."""

from collections.abc import Mapping

from ..core.errors import UnknownNameError, UnsupportedError
from ..core.memory import Memory

REPORTS: Mapping[str, str] = {
    "slots": "top tokens of each slot, top slots of each token, usage",
    "read_maps": "what tokens read, before and after updates",
    "importance": "change of the loss without a slot's part in reads",
    "explanations": "what a slot is read by, with a score",
    "zeroing": "change of the loss with a slot's content gone",
    "rank": "effective rank of the slots over time",
    "gates": "the memory's diagnostics at each commit",
    "capacity": "facts stored against facts recalled",
}
_READS = ("slots", "read_maps", "importance", "explanations")


def lacking(memory: Memory) -> dict[str, str]:
    """The reports that do not apply -> why."""
    found: dict[str, str] = {}
    if not memory.uses("slot_use"):
        found.update(dict.fromkeys(_READS, "its tokens read no slots by weights that it tells (slot_use)"))
    if not memory.slot_dims:
        found.update(dict.fromkeys(("zeroing", "rank"), "its state holds no slots (slot_dims)"))
    if not memory.uses("diagnostics") or memory.continuous:
        found["gates"] = "it tells nothing at commits (diagnostics)"
    return found


def applying(memory: Memory) -> tuple[str, ...]:
    """The reports that apply, in the order of `REPORTS`."""
    return tuple(name for name in REPORTS if name not in lacking(memory))


def require(memory: Memory, report: str) -> None:
    """Raises `UnsupportedError` unless the report applies to the memory, naming those that do."""
    if report not in REPORTS:
        raise UnknownNameError.of("report", report, REPORTS)
    if reason := lacking(memory).get(report):
        others = ", ".join(applying(memory))
        raise UnsupportedError(f"No report {report!r} of the memory {memory.name!r}: {reason}. These apply: {others}.")
