"""Evaluate a model with memory on the tasks of this package."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from rich.progress import track

from ..core.errors import InputError
from ..hosts import base_model
from .babilong import BabilongSample, compare_answers, compare_answers_fixed, prompt
from .recall import RecallTask

MAX_ANSWER_TOKENS = 20


@dataclass(frozen=True, slots=True)
class Score:
    """Correct answers out of `count`, with the half-width of the 95% Wilson interval (0 to 1)."""

    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def interval(self) -> float:
        z, n, p = 1.96, self.count, self.accuracy
        return z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))


def evaluate_recall(
    model: Any, task: RecallTask, segments: Sequence[int], *, count: int = 512, seed: int = 1, progress: bool = False
) -> dict[int, dict[int, Score]]:
    """Accuracy on cross-segment recall.

    Args:
        segments: numbers of segments to test. count: samples for each; half with the fact in the first segment, half
            with it anywhere. seed: of the test samples; other than the training seed.

    Returns: segments -> distance of the fact in segments -> score.
    """
    base = base_model(model)
    base.eval()
    results: dict[int, dict[int, Score]] = {}
    for n in track(segments, description="recall", disable=not progress):
        generator = torch.Generator().manual_seed(seed * 1000 + n)
        hits: dict[int, list[bool]] = defaultdict(list)
        for where in (0, None):
            batch = task.batch(count // 2, generator, segments=n, fact_segment=where)
            with torch.no_grad():
                output = base(batch.input_ids.to(base.device), use_cache=False, logits_to_keep=2)
            right = output.logits[:, 0].argmax(-1).cpu() == batch.input_ids[:, -1]
            for distance, hit in zip(batch.distance.tolist(), right.tolist(), strict=True):
                hits[distance].append(hit)
        results[n] = {d: Score(sum(h), len(h)) for d, h in sorted(hits.items())}
    return results


def evaluate_babilong(
    model: Any,
    tokenizer: Any,
    samples: Iterable[BabilongSample],
    *,
    batch_size: int = 16,
    count: int = 100,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Answer questions and score them with the official rule and the fixed one.

    The context and question are fed as they are; greedy decoding of at most 20 tokens, cut at the end token.

    Returns: one record a sample: task, length, question, target, output, official, fixed, tokens, seed, provenance.
    """
    base = base_model(model)
    base.eval()
    chosen = list(islice(samples, count))
    if not chosen:
        raise InputError("No samples to evaluate.")
    records = []
    starts = range(0, len(chosen), batch_size)
    for start in track(starts, description=f"{chosen[0].task} {chosen[0].length}", disable=not progress):
        group = chosen[start : start + batch_size]
        stream = base.stream(len(group), tokenizer=tokenizer)
        answers = stream.generate(
            [prompt(s) for s in group],
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        seen = [stream.tokens_seen] if len(group) == 1 else stream.tokens_seen
        for sample, output, tokens in zip(group, [answers] if isinstance(answers, str) else answers, seen, strict=True):
            asked = (sample.target, output, sample.question, sample.task)
            records.append(
                {
                    "task": sample.task,
                    "length": sample.length,
                    "question": sample.question.strip(),
                    "target": sample.target,
                    "output": output,
                    "official": compare_answers(*asked),
                    "fixed": compare_answers_fixed(*asked),
                    "tokens": tokens,
                    "seed": sample.seed,
                    "provenance": sample.provenance,
                }
            )
    return records


def score(records: Sequence[dict[str, Any]], rule: str = "official") -> Score:
    """Accuracy of records by one of the two rules."""
    return Score(sum(r[rule] for r in records), len(records))
