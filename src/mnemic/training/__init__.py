"""Training with recurrence: the transformers Trainer over consecutive segments."""

from .data import Collator, Example, SegmentLaw, TextExamples, answer_example
from .tokenizer import word_tokenizer
from .trainer import MemoryTrainer

__all__ = ["Collator", "Example", "MemoryTrainer", "SegmentLaw", "TextExamples", "answer_example", "word_tokenizer"]
