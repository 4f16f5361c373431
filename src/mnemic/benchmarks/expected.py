"""What a comparison will read: tokens of training and of measuring, before any of it is run."""

from itertools import islice
from typing import Any

from .building import examples
from .catalog import entry
from .evaluation import Evaluation
from .experiment import Experiment
from .prompts import parse_prompt

_STORY = 80
"""Tokens of a bAbI story without background (0k), about."""


def tokens_expected(experiment: Experiment) -> int:
    """Tokens of the whole run, on average over the random sizes of samples; padding of short documents counts."""
    if not experiment.by_segments:
        return _tokens_drawn(experiment)
    stages, per_stage = experiment.most_segments, experiment.law().stage_batches
    total = 0.0
    for i, most in enumerate(stages):
        left = max(experiment.steps * experiment.gradient_accumulation - i * per_stage, 0)
        batches = left if i == len(stages) - 1 else min(per_stage, left)
        total += batches * (most if experiment.stateful else (experiment.least_segments + most) / 2)
    return round(total * experiment.batch_size * experiment.counted)


def _tokens_drawn(experiment: Experiment) -> int:
    """By the sizes of the first 64 batches."""
    batch = experiment.batch_size
    sizes = [len(e["input_ids"]) for e in islice(examples(experiment, None, None), 0, 64 * batch, batch)]
    return round(sum(sizes) / len(sizes) * experiment.steps * experiment.gradient_accumulation * batch)


def tokens_measured(evaluation: Evaluation, unit: int) -> int:
    """Tokens that an evaluation reads, about; files that fix their samples count for nothing.

    Args:
        unit: tokens of a segment, where a length counts segments.
    """
    budget = parse_prompt(evaluation.prompt).budget
    total = 0
    for label, length, _ in evaluation.names():
        known: Any = entry(label.split(" ")[0])
        size = known.size(length) * (unit if known.unit == "segments" else 1)
        if known.kind == "words":
            size = size or _STORY
            size = min(size, budget) if budget else size
        # Held-out text is read twice, with the state carried and without.
        total += (2 if known.kind == "text" else 1) * size * evaluation.samples
    return total
