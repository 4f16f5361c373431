"""The models that come with the package: made small enough for it, and opened by name.

A shipped model is a folder under `mnemic/models`: weights in bfloat16, config, tokenizer, `experiment.toml`, `log.json`
(what the training logged), `log-before-1.json` ... (of the runs whose weights it began with, the first one first) and
`README.md`, its model card. It is read in float32.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import InputError, UnknownNameError
from ..hosts import load, save
from ..hosts.saving import HEADER
from ..training.tokenizer import find_tokenizer
from . import results
from .experiment import LOG, SETTINGS, Experiment
from .jobs import DESCRIPTION, answers
from .reproduction.recipe import Recipe
from .trained import Trained, check_folder, open_run

BEFORE = "log-before-{}.json"
MODELS = Path(__file__).parents[1] / "models"
CARD = "README.md"
MOST_BYTES = 10_000_000
"""What a shipped model may take, all of its files."""

TURNS = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
)
"""Chat template of models of stories, which know no words for who speaks: texts and answers follow each other."""


def shipped() -> list[str]:
    """Names of the models that this copy of the package has."""
    return sorted(p.parent.name for p in MODELS.glob(f"*/{HEADER}"))


def is_shipped(name: str | Path) -> bool:
    """Whether this names a model that comes with the package; a file or folder of that name goes before."""
    return not Path(name).exists() and str(name) in shipped()


def open_trained(name: str | Path) -> Trained:
    """The run in the folder of that name (see `open_run`), or the model of that name that comes with the package."""
    return open_shipped(str(name)) if is_shipped(name) else open_run(name)


def open_shipped(name: str) -> Trained:
    """
    Raises:
        UnknownNameError: this copy of the package has no such model.
    """
    if name not in shipped():
        raise UnknownNameError.of("shipped model", name, shipped())
    return _opened(MODELS / name)


def _opened(folder: Path) -> Trained:
    known = open_run(folder)
    return Trained(folder, known.model.float(), known.tokenizer, known.experiment)


def export(
    run: str | Path,
    target: str | Path,
    *,
    title: str,
    scores: list[Mapping[str, Any]],
    before: Sequence[str | Path] = (),
) -> Path:
    """A run as a shipped model.

    Args:
        run: a finished run. target: a new folder. title: of its card. scores: as `results.summarise` gives them, for
            the card; measured with the weights before they were rounded to bfloat16. before: the runs whose weights it
            began with, the first one first.

    Raises:
        DataError: no finished run. InputError: the folder exists, or the model is larger than `MOST_BYTES`.
    """
    run, target = Path(run), Path(target)
    check_folder(run)
    if target.exists():
        raise InputError(f"{target} exists; name a new folder for the exported model.")
    if not (run / LOG).is_file():
        raise InputError(f"{run} holds no finished run; train it to its end first.")
    model, tokenizer = load(run).to(torch.bfloat16), find_tokenizer(run, None)
    if (run / SETTINGS).is_file() and Experiment.read(run / SETTINGS).on_stories:
        tokenizer.chat_template = TURNS
    # Where it was trained means nothing where it is used.
    model.config._name_or_path = target.name
    room = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(room, ignore_errors=True)
    try:
        save(model, room, whole=True)
        tokenizer.save_pretrained(room)
        for name in (SETTINGS, LOG):
            shutil.copyfile(run / name, room / name)
        for number, earlier in enumerate(before, 1):
            shutil.copyfile(Path(earlier) / LOG, room / BEFORE.format(number))
        (room / CARD).write_text(_card(room, title, scores, len(before)), encoding="utf-8")
        size = sum(p.stat().st_size for p in room.rglob("*"))
        if size > MOST_BYTES:
            raise InputError(f"{run}: its model takes {size:,} bytes in bfloat16, and a shipped one {MOST_BYTES:,}.")
        room.rename(target)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return target


def export_best(recipe: Recipe, folder: str | Path, target: str | Path) -> Path:
    """The model of the recipe's `ship` entry that scored best on its `ship_board`, over all tasks and lengths; see
    `export`. It is the best of a few seeds by the scores that its card shows, so those are a little too good.

    Raises:
        InputError: the recipe ships nothing, or no such model is finished.
    """
    folder = Path(folder)
    jobs = [
        job for job in recipe.comparison.jobs
        if (job.board, job.entry) == (recipe.ship_board, recipe.ship) and (folder / job.folder / DESCRIPTION).is_file()
    ]  # fmt: skip
    if not jobs:
        raise InputError(
            f"{folder} has no finished model to export: entry {recipe.ship!r} of board {recipe.ship_board!r}."
        )
    found = {
        job.folder: results.summarise([results.Evaluated(job.entry, log, job.seed) for log in answers(job, folder)])[0][
            "scores"
        ]
        for job in jobs
    }
    best = max(jobs, key=lambda job: sum(s["official"]["mean"] for s in found[job.folder]) / len(found[job.folder]))
    known, before, start = {job.folder: job for job in recipe.comparison.jobs}, [], best.start
    while start is not None:
        before.insert(0, folder / start)
        start = known[start].start
    title = f"{recipe.model}, from {recipe.comparison.title}"
    return export(folder / best.folder, target, title=title, scores=found[best.folder], before=before)


def _card(folder: Path, title: str, scores: list[Mapping[str, Any]], begun_on: int) -> str:
    log = json.loads((folder / LOG).read_text(encoding="utf-8"))
    size = sum(part["total"] for part in log["parameters"].values())
    names = [BEFORE.format(number) for number in range(1, begun_on + 1)]
    logs = [json.loads((folder / name).read_text(encoding="utf-8")) for name in names]
    runs = [f"{_trained(one)} (`{name}`)" for one, name in zip(logs, names, strict=True)]
    begun = f"after being trained {', and then '.join(runs)}" if runs else "from scratch"
    rows = [
        f"| {s['task']} | {s['length']} | {100 * s['official']['mean']:.1f} "
        f"({100 * s['official']['low']:.1f} to {100 * s['official']['high']:.1f}) | {s['count']} |"
        for s in scores
    ]
    return "\n".join(
        [
            f"# {title}",
            "",
            f"{size:,} parameters, trained {_trained(log)}, {begun}. Every setting is in `{SETTINGS}`, what the "
            f"training logged in `{LOG}`. Weights are rounded to bfloat16 and read in float32.",
            "",
            "It answers questions of bAbI and BABILong in the words of its vocabulary, and nothing else. Stories "
            "and background of the tests are of a split that was not trained on. Commands that take a model take it by "
            "its name.",
            "",
            "Accuracy in percent with 95% interval, official rule:",
            "",
            "| task | length | accuracy | samples |",
            "| --- | --- | ---: | ---: |",
            *rows,
            "",
        ]
    )


def _trained(log: Mapping[str, Any]) -> str:
    return (
        f"on {log['summary']['tokens']:,} tokens in {log['seconds'] / 60:.0f} minutes ({log['device']}, threads: "
        f"{log['threads']}, torch {log['versions']['torch']})"
    )
