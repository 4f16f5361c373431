"""InfiniteBench (arXiv 2402.13718): eleven of its twelve sets, from the released JSON lines, by the released rules.

The twelfth (En.Sum) is scored by ROUGE and runs through lm-evaluation-harness. Prompts are our own. The released
scorer stops at an answer without a character where a letter is asked for, and at "3.5" where a whole number is; here
both are wrong answers.
"""

import re
import string
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .longbench import token_f1, words_f1
from .released import released_records
from .task import Record, Task

SOURCE = "https://huggingface.co/datasets/xinrongzhang2022/InfiniteBench, NAME.jsonl for each set"
_LETTERS = "ABCD"
MARKS = frozenset(
    string.punctuation + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》"
    "「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)


def infinitebench_records(name: str, data: str | Path, *, seed: int = 0) -> Iterator[Record]:
    """Records of one set; data: its .jsonl, or the folder with it. The file fixes them, so `seed` does nothing.

    targets: the answers; for a choice the option and its letter. metadata: id, set, asked.

    Raises:
        DataError: no such file, or another format.
    """

    def make(given: dict[str, Any], where: str) -> Record:
        options = [str(option) for option in given.get("options") or ()]
        answers = given["answer"] if isinstance(given["answer"], list) else [given["answer"]]
        # A list of numbers is one answer.
        answers = answers[0] if isinstance(answers[0], list) else answers
        targets = [str(answer) for answer in answers]
        if name in ("code_debug", "longbook_choice_eng"):
            targets = [targets[0], _LETTERS[options.index(targets[0])]]
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
        return Record(
            context=given["context"],
            question=_PROMPTS[name].format(given["input"], listed),
            targets=tuple(targets),
            metadata={"id": given["id"], "set": name, "asked": given["input"]},
        )

    return released_records(name, data, SOURCE, make)


# Rules: (answer, targets) -> 0 to 1


def first_number(answer: str, targets: tuple[str, ...]) -> float:
    """The first run of digits is the target, as text: leading zeros count."""
    return float(_digits(answer)[:1] == [targets[0]])


def named_value(answer: str, targets: tuple[str, ...]) -> float:
    """The target is a word of the answer."""
    return float(targets[0] in _blanked(answer, "\n:\"'.,?!{}").split())


def found_number(answer: str, targets: tuple[str, ...]) -> float:
    """The first number, whole or with decimals, equals the target."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    return float(found is not None and float(found[0]) == float(targets[0]))


def right_prefix(answer: str, targets: tuple[str, ...]) -> float:
    """How many of the numbers are right before the first that is not, of all.

    The released rule reads no signs, so a negative number is always wrong.
    """
    return _prefix([int(run) for run in _digits(answer)], targets)


def right_prefix_fixed(answer: str, targets: tuple[str, ...]) -> float:
    """`right_prefix` with signs."""
    return _prefix([int(run) for run in re.findall(r"(?<![0-9])-?[0-9]+", answer)], targets)


def _prefix(said: list[int], targets: tuple[str, ...]) -> float:
    right = 0
    while right < min(len(said), len(targets)) and said[right] == int(targets[right]):
        right += 1
    return right / len(targets)


def returned_number(answer: str, targets: tuple[str, ...]) -> float:
    """The last word, as a whole number, is the target."""
    words = _blanked(answer.strip(), "\n.`'\":").split()
    try:
        return float(bool(words) and int(words[-1]) == int(targets[0]))
    except ValueError:
        return 0.0


def faulty_function(answer: str, targets: tuple[str, ...]) -> float:
    """The letter with "." or ":" in front, or letter or name after "answer is:", "is:" or "answer:"."""
    name, letter = targets
    if answer[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = _blanked(answer.strip(), "\n`'\"-*")
    for word in ("Option", "option"):
        text = text.replace(word, " ")
    return _after(text, ("answer is:", "is:", "answer:"), (letter, name)) or 0.0


def choice(answer: str, targets: tuple[str, ...]) -> float:
    """The first character where it is a letter from A to D; or what follows "answer is" and the like; or a lone letter.

    The released rule: "A long story" is an A, and so is every answer that begins with "Answer".
    """
    return _chosen(answer, targets, lambda text: text[:1])


def choice_fixed(answer: str, targets: tuple[str, ...]) -> float:
    """`choice`, with a first letter that stands alone."""
    return _chosen(answer, targets, lambda text: text[0] if re.match(r"[ABCD](?![^\W_])", text) else "")


def name_said(answer: str, targets: tuple[str, ...]) -> float:
    """The target is a word of the upper-cased answer."""
    return float(targets[0] in _blanked(answer, "\n:\"'.,?!{}").upper().split())


def best_f1(answer: str, targets: tuple[str, ...]) -> float:
    """F1 of words, the best over the targets."""
    return max(token_f1(answer, target) for target in targets)


def best_character_f1(answer: str, targets: tuple[str, ...]) -> float:
    """F1 of characters without punctuation, the best over the targets."""
    return max(_character_f1(answer, target) for target in targets)


def _character_f1(answer: str, target: str) -> float:
    said, right = ([c for c in "".join(t.lower().split()) if c not in MARKS] for t in (answer, target))
    return words_f1(said, right)


def _chosen(answer: str, targets: tuple[str, ...], first: Callable[[str], str]) -> float:
    letter = first(answer)
    if letter and letter in _LETTERS:
        return float(letter in targets)
    text = _blanked(answer, "\n\"'.,?!{}")
    said = _after(text, ("answer is:", "answer:", "answer is", "option is"), targets)
    if said is not None:
        return said
    lone = next((word for word in text.split() if word in _LETTERS), None)
    return float(lone in targets)


def _after(text: str, phrases: tuple[str, ...], targets: tuple[str, ...]) -> float | None:
    """Whether a target follows the first of the phrases that occurs; None where none does."""
    text = re.sub(" {2,}", " ", text)
    for phrase in phrases:
        place = text.find(phrase)
        if place >= 0:
            return float(text[place + len(phrase) + 1 :].startswith(targets))
    return None


def _blanked(text: str, marks: str) -> str:
    return text.translate(dict.fromkeys(map(ord, marks), " "))


def _digits(text: str) -> list[str]:
    return re.findall("[0-9]+", text)


_NUMBER = "{}\nAnswer with the number only."
_OPTIONS = "{}{}\nAnswer with the letter only."
_PROMPTS: Mapping[str, str] = {
    "passkey": _NUMBER,
    "number_string": _NUMBER,
    "kv_retrieval": "{}\nAnswer with the value only.",
    "longbook_choice_eng": _OPTIONS,
    "longbook_qa_eng": "Question: {}\nAnswer with a few words.",
    "longbook_qa_chn": "Question: {}\nAnswer with a few words, in Chinese.",
    "longdialogue_qa_eng": "{}\nOne name in the script above is masked. Answer with that name only.",
    "math_find": _NUMBER,
    "math_calc": "{}\nWrite the value after every operation, separated by commas.",
    "code_run": "{}\nAnswer with the number that is returned, and nothing else.",
    "code_debug": _OPTIONS,
}

Rule = Callable[[str, tuple[str, ...]], float]
# Name -> official rule, fixed rule, tokens that may be said.
_SETS: Mapping[str, tuple[Rule, Rule, int]] = {
    "passkey": (first_number, first_number, 6),
    "number_string": (first_number, first_number, 12),
    "kv_retrieval": (named_value, named_value, 50),
    "longbook_choice_eng": (choice, choice_fixed, 40),
    "longbook_qa_eng": (best_f1, best_f1, 40),
    "longbook_qa_chn": (best_character_f1, best_character_f1, 40),
    "longdialogue_qa_eng": (name_said, name_said, 40),
    "math_find": (found_number, found_number, 3),
    "math_calc": (right_prefix, right_prefix_fixed, 30_000),
    "code_run": (returned_number, returned_number, 5),
    "code_debug": (faulty_function, faulty_function, 5),
}


def _score(rule: Rule, answer: str, record: Record) -> float:
    return rule(answer, record.targets)


def _task(name: str) -> Task:
    official, fixed, max_new_tokens = _SETS[name]
    records: Any = partial(infinitebench_records, name)
    return Task(
        name=f"infinitebench {name}",
        source=SOURCE,
        records=records,
        official=partial(_score, official),
        fixed=partial(_score, fixed),
        max_new_tokens=max_new_tokens,
    )


INFINITEBENCH_TASKS = {name: _task(name) for name in _SETS}
