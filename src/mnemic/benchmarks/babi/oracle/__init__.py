"""The oracle: a rule-based reader of each task that sees nothing but the sentences.

It shares the vocabulary with the generator and nothing else. It answers every released test question but two of qa5
(both ask about an older GIVE than the last that fits) and, of qa8, the order of a few lists.
"""

from collections.abc import Callable, Sequence

from ..files import check_name
from . import logic, relations, tracking, whereabouts

_ORACLES: dict[str, Callable[[str, Sequence[str], str], str]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa5", "qa6", "qa7", "qa8"), tracking.answer),
    **dict.fromkeys(("qa9", "qa10"), whereabouts.whether),
    **dict.fromkeys(("qa11", "qa12", "qa13"), whereabouts.where),
    "qa14": whereabouts.before, "qa4": relations.beside, "qa17": relations.position, "qa18": relations.size,
    "qa19": relations.path, "qa15": logic.fear, "qa16": logic.colour, "qa20": logic.motive,
}  # fmt: skip


def oracle(task: str, facts: Sequence[str], question: str) -> str:
    """The answer to a question of any task, from its facts alone.

    Raises:
        UnknownNameError: a task that does not exist.
        InputError: a sentence or question outside the task's language, or a question the facts do not answer.
    """
    check_name("bAbI task with an oracle", task, _ORACLES)
    return _ORACLES[task](task, facts, question)
