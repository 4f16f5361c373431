"""Benchmarks: bAbI stories, BABILong samples and scores, background texts, and the recall toy task."""

from .babi import BabiSample, generate, oracle
from .babilong import (
    LENGTHS,
    Babilong,
    BabilongSample,
    StreamedSample,
    compare_answers,
    compare_answers_fixed,
    official_subset,
    open_babilong,
    prompt,
)
from .background import Document, books, pg19, prose
from .haystack import Haystack
from .recall import RecallBatch, RecallTask

__all__ = [
    "LENGTHS", "BabiSample", "Babilong", "BabilongSample", "Document", "Haystack", "RecallBatch", "RecallTask",
    "StreamedSample", "books", "compare_answers", "compare_answers_fixed", "generate", "official_subset",
    "open_babilong", "oracle", "pg19", "prompt", "prose",
]  # fmt: skip
