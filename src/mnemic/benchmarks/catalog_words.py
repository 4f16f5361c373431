"""Tasks in words of the catalog."""

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..core.errors import DataError, InputError
from . import babilong_tasks, needles, ruler
from .babilong import LABELS, LENGTHS, data_folder
from .background import named
from .catalog_entry import RELEASED, Entry, Request
from .cell import Cell
from .conversations import LOCOMO, LOCOMO_TASK, find_file
from .haystack import Haystack
from .infinitebench import INFINITEBENCH_TASKS
from .infinitebench import SOURCE as INFINITEBENCH
from .longbench import LONGBENCH_TASKS
from .longbench import SOURCE as LONGBENCH
from .lveval import LENGTHS as LVEVAL_LENGTHS
from .lveval import LVEVAL_TASKS
from .lveval import SOURCE as LVEVAL
from .ruler.documents import FILES
from .task import Task
from .word_cell import WordCell

_RULER_LENGTHS = {f"{size // 1024}k": size for size in ruler.LENGTHS}
_LENGTHS = {name: size for name, size in LENGTHS.items() if size}
_BABILONG = ("facts", "background", "reserve", "max_n_facts", "start_pct", "end_pct")
_GUESSED = {name: 1 / len(labels) for name, labels in LABELS.items() if name != "qa8"}
"""Shares that a uniform guess of one label gets right; answers of qa8 may be several labels."""


def _cell(request: Request, task: Task, chance: float | None = None, **sizes: Any) -> Cell:
    """The cell, of which one sample is drawn and can be answered in the tokenizer's words."""
    if request.tokenizer is None:
        raise InputError(
            f"{request.name} is a task in words, and the model has no tokenizer: save one in its folder "
            "(tokenizer.save_pretrained), or choose tasks of tokens."
        )
    cell = WordCell(
        request.name, request.length, request.seed, task, sizes, request.tokenizer, request.segment,
        request.prompting, chance,
    )  # fmt: skip
    first = next(cell.samples(), None)
    if first is None:
        raise DataError(f"{request.name} at length {request.length} has no samples: its file is empty; get it again.")
    cell.check(first)
    return cell


# --------------------------------------------------------------------------------------------------------- generated


def _babilong(request: Request) -> Cell:
    options = request.checked(_BABILONG)
    folder = data_folder(request.data)
    background = options.pop("background", "auto")
    if request.tokenizer is not None:
        options["background"] = _haystack(background, request.split, folder, request.tokenizer)
    task = babilong_tasks.TASKS[f"babilong_{request.name}"]
    sizes = {"tokenizer": request.tokenizer, "length": request.size, "split": request.split, "data": folder}
    return _cell(request, task, _GUESSED.get(request.name), **sizes, **options)


@lru_cache(maxsize=1)
def _haystack(background: str, split: str, folder: Path | None, tokenizer: Any) -> Haystack:
    """Shared by the cells of one evaluation: each sentence is encoded once."""
    return Haystack(named(background, split, folder), tokenizer)


def _passkey(request: Request) -> Cell:
    request.checked(())
    return _cell(request, needles.PASSKEY, garbage=request.size)


def _lines(request: Request) -> Cell:
    request.checked(())
    return _cell(request, needles.LONGEVAL_LINES, lines=request.size)


def _filled(task: Task, known: tuple[str, ...], request: Request) -> Cell:
    """A task of so many tokens; those with a background read it from the data folder."""
    sizes = {**request.checked(known), "tokenizer": request.tokenizer, "length": request.size}
    if "background" in known:
        sizes |= {"split": request.split, "data": data_folder(request.data)}
    return _cell(request, task, **sizes)


def _essay(name: str) -> tuple[str, ...]:
    parameters = ruler.needles.PARAMETERS.get(name)
    return ("background",) if parameters is not None and parameters.haystack == "essay" else ()


# ------------------------------------------------------------------------------------------------------------- files


def _documents(name: str, file: str, request: Request) -> Cell:
    request.checked(())
    path = find_file(request.place(FILES[name], "from its authors"), (file,), "ruler", f"the authors ({FILES[name]})")
    return _cell(request, ruler.TASKS[name], tokenizer=request.tokenizer, length=request.size, file=path)


def _locomo(request: Request) -> Cell:
    options = request.checked(("categories",))
    return _cell(request, LOCOMO_TASK, data=request.place("locomo10.json", LOCOMO), **options)


def _suite(tasks: Mapping[str, Task], folder: str, name: str, source: str, request: Request) -> Cell:
    """A set of a suite; where it has several lengths, each has its file."""
    request.checked(())
    name = name if request.length == RELEASED else f"{name}_{request.length}"
    place = request.place(f"{name}.jsonl", source)
    return _cell(request, tasks[name], data=place / folder if (place / folder).is_dir() else place)


_QA_FILES = {"qa_1": "dev-v2.0.json", "qa_2": "hotpot_dev_distractor_v1.json"}
_words = partial(Entry, kind="words")
ENTRIES = [
    *(
        _words(
            name=name, unit="tokens", lengths=("0k", "1k", "2k", "4k"), source="arXiv 2406.10149", names=LENGTHS,
            make=_babilong,
        )
        for name in sorted(LABELS, key=lambda name: int(name.removeprefix("qa")))
    ),
    _words(
        name="passkey", unit="characters", lengths=("1000", "5000", "10000"), source="arXiv 2305.16300", make=_passkey
    ),
    _words(
        name="passkey_tokens", unit="tokens", lengths=("1k", "2k", "4k"), source="arXiv 2402.13718", names=_LENGTHS,
        make=partial(_filled, needles.PASSKEY_TOKENS, ("depths",)),
    ),
    _words(
        name="niah", unit="tokens", lengths=("1k", "2k", "4k"), source="Kamradt 2023", names=_LENGTHS,
        make=partial(_filled, needles.NIAH, ("depth", "background")),
    ),
    _words(name="lines", unit="lines", lengths=("200", "440", "680"), source="LongEval 2023", make=_lines),
    *(
        _words(
            name=f"ruler_{name}", unit="tokens", lengths=("4k", "8k", "16k"), source="arXiv 2404.06654",
            names=_RULER_LENGTHS, needs=FILES.get(name, ""),
            make=partial(_documents, name, _QA_FILES[name]) if name in FILES else partial(_filled, task, _essay(name)),
        )
        for name, task in ruler.TASKS.items()
    ),
    _words(
        name="locomo", unit=RELEASED, lengths=(RELEASED,), source="arXiv 2402.17753",
        needs="locomo10.json; `mnemic[eval]`", make=_locomo,
    ),
    *(
        _words(
            name=f"longbench_{name}", unit=RELEASED, lengths=(RELEASED,), source="arXiv 2308.14508",
            needs="NAME.jsonl", make=partial(_suite, LONGBENCH_TASKS, "longbench", name, LONGBENCH),
        )
        for name in LONGBENCH_TASKS
    ),
    *(
        _words(
            name=f"infinitebench_{name}", unit=RELEASED, lengths=(RELEASED,), source="arXiv 2402.13718",
            needs="NAME.jsonl", make=partial(_suite, INFINITEBENCH_TASKS, "infinitebench", name, INFINITEBENCH),
        )
        for name in INFINITEBENCH_TASKS
    ),
    *(
        _words(
            name=f"lveval_{name}", unit=RELEASED, lengths=LVEVAL_LENGTHS, source="arXiv 2402.05136",
            needs="NAME_LENGTH.jsonl; jieba for Chinese", make=partial(_suite, LVEVAL_TASKS, "lveval", name, LVEVAL),
        )
        for name in dict.fromkeys(name.rpartition("_")[0] for name in LVEVAL_TASKS)
    ),
]  # fmt: skip
