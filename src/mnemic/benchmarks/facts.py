"""Facts in growing numbers, of the task that a model was trained on, for capacity curves (`mnemic.analysis`)."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..analysis import CapacityPoint, capacity_curve
from ..analysis.capacity import Draw
from ..core.errors import ConfigError, InputError
from ..training.data import IGNORED, Example, answer_example
from .babi.words import ACTORS, MOVE_VERBS, PLACES
from .building import task_of
from .recall import RecallTask
from .trained import Trained

_MOST = 64
_PAIRED = ("remember", "rewrite", "segment_mqar", "mqar")


def fact_curve(trained: Trained, *, samples: int = 64, seed: int = 0) -> list[CapacityPoint]:
    """Facts recalled against facts stored: 1, 2, 4, ... up to what the task has room for; empty for a model of a task
    without facts.

    Recall and pairs keep the sizes of the training but their number. Models of BABILong are told where 1 to 4 people
    went, without background, and asked for one of them.
    """
    experiment = trained.experiment
    if experiment is None:
        return []
    if experiment.on_stories:
        draws = {n: _people(trained.tokenizer, n, random.Random(f"{seed}|{n}")) for n in range(1, len(ACTORS) + 1)}
        return capacity_curve(trained.model, draws, chance=1 / len(PLACES), samples=samples)
    if experiment.task == "recall":
        task = task_of(experiment)
        draws = {n: _recall(sized, seed) for n, sized in _sizes(task)}
    elif experiment.task in _PAIRED:
        task = task_of(experiment)
        draws = {n: _pairs(sized, random.Random(f"{seed}|{n}")) for n, sized in _sizes(task)}
    else:
        return []
    return capacity_curve(trained.model, draws, chance=task.chance, samples=samples)


def _sizes(task: Any) -> Iterator[tuple[int, Any]]:
    """The task with 1, 2, 4, ... pairs, as long as it can be."""
    count = 1
    while count <= _MOST:
        try:
            sized = replace(task, pairs=count)
            if isinstance(sized, RecallTask):
                _recall(sized, 0)()
        except (ConfigError, InputError):
            return
        yield count, sized
        count *= 2


def _recall(task: RecallTask, seed: int) -> Draw:
    """Facts in turn in all segments but the last, which asks."""
    generator = torch.Generator().manual_seed(seed * 1000 + task.pairs)
    where = [pair % max(task.segments - 1, 1) for pair in range(task.pairs)]

    def draw() -> Example:
        batch = task.batch(1, generator, fact_segment=where)
        return Example(input_ids=batch.input_ids[0].tolist(), labels=batch.labels[0].tolist())

    return draw


def _pairs(task: Any, rng: random.Random) -> Draw:
    """Labels on the values alone."""

    def draw() -> Example:
        example = task.example(rng)
        if not hasattr(task, "questions"):
            return example
        ids = example["input_ids"]
        asked = {column for one in task.questions(example) for column in one.columns}
        return Example(input_ids=ids, labels=[token if i in asked else IGNORED for i, token in enumerate(ids)])

    return draw


def _people(tokenizer: Any, count: int, rng: random.Random) -> Callable[[], Example]:
    def draw() -> Example:
        people = rng.sample(ACTORS, count)
        at = {who: rng.choice(PLACES) for who in people}
        facts = " ".join(f"{who} {rng.choice(MOVE_VERBS)} to the {place}." for who, place in at.items())
        asked = rng.choice(people)
        answer = tokenizer(at[asked], add_special_tokens=False)["input_ids"]
        return answer_example(tokenizer(f"{facts} Where is {asked}?")["input_ids"], answer)

    return draw
