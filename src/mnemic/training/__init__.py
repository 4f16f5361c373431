"""Training with recurrence: the transformers Trainer over consecutive segments."""

from .corpus import CorpusSamples, StatefulRows
from .data import Collator, Example, SegmentLaw, TextExamples, answer_example
from .guards import StopOnSignal
from .mixture import Mixture
from .shards import TokenStore
from .tokenizer import byte_tokenizer, listed_tokenizer, word_tokenizer
from .trainer import LossProgress, MemoryTrainer

__all__ = [
    "Collator", "CorpusSamples", "Example", "LossProgress", "MemoryTrainer", "Mixture", "SegmentLaw", "StatefulRows",
    "StopOnSignal", "TextExamples", "TokenStore", "answer_example", "byte_tokenizer", "listed_tokenizer",
    "word_tokenizer",
]  # fmt: skip
