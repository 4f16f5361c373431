"""Looking inside: what slots hold, gates over time, reads before and after updates, importance, capacity; plots.

Functions return plain dataclasses and tensors. `reports` says which of them apply to a memory.
"""

from .capacity import CapacityPoint, capacity_curve
from .captures import Look, capture, effective_rank, look
from .explanations import Explainer, Explanation, SlotExplanation, Span, explain, top_ngrams
from .importance import Importance, suppressed, zeroed
from .inspection import Inspection, inspect
from .maps import ReadMaps, read_maps
from .reports import REPORTS, applying, lacking, require
from .slots import Share, SlotReport, Usage, slot_report, usage

__all__ = [
    "REPORTS", "CapacityPoint", "Explainer", "Explanation", "Importance", "Inspection", "Look", "ReadMaps", "Share",
    "SlotExplanation", "SlotReport", "Span", "Usage", "applying", "capacity_curve", "capture", "effective_rank",
    "explain", "inspect", "lacking", "look", "read_maps", "require", "slot_report", "suppressed", "top_ngrams",
    "usage", "zeroed",
]  # fmt: skip
