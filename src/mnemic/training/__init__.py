"""Training with recurrence: the transformers Trainer over consecutive segments."""

from .data import Collator, Example, SegmentLaw, TextExamples, answer_example
from .tokenizer import listed_tokenizer, word_tokenizer
from .trainer import LossProgress, MemoryTrainer

__all__ = [
    "Collator", "Example", "LossProgress", "MemoryTrainer", "SegmentLaw", "TextExamples", "answer_example",
    "listed_tokenizer", "word_tokenizer",
]  # fmt: skip
