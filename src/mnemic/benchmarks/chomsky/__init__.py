"""The Chomsky hierarchy suite: 15 sequence tasks by the level of their language, and length generalisation.

Paper: Delétang et al., Neural Networks and the Chomsky Hierarchy, 2022 (arXiv 2207.02098). Targets, special cases of
small lengths and scoring follow the released code; random draws are Python's, so samples differ from its.
"""

from ...core.errors import UnknownNameError
from . import context_free, context_sensitive, regular
from .examples import TRAIN_LENGTHS, FormalExamples, token_example
from .scoring import (
    SOLVED,
    TEST_LENGTHS,
    Generalisation,
    Solver,
    batch_accuracy,
    length_generalisation,
    model_solver,
)
from .task import FormalTask

TASKS = {task.name: task for task in (*regular.TASKS, *context_free.TASKS, *context_sensitive.TASKS)}
"""The 15 tasks by name, in the order of the paper."""


def formal_task(name: str) -> FormalTask:
    """The task of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in TASKS:
        raise UnknownNameError.of("formal task", name, TASKS)
    return TASKS[name]


__all__ = [
    "SOLVED", "TASKS", "TEST_LENGTHS", "TRAIN_LENGTHS", "FormalExamples", "FormalTask", "Generalisation", "Solver",
    "batch_accuracy", "formal_task", "length_generalisation", "model_solver", "token_example",
]  # fmt: skip
