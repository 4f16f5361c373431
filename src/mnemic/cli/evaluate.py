"""`mnemic eval`: trained models on the tasks of the catalog, resumably, with intervals and pictures."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Folders that mnemic train or mnemic.save wrote.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Tasks, such as qa1,niah; by default what was trained.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="LIST", help="Lengths, in each task's unit; 4k and the like for tokens.")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Seeds of the samples.")] = "1",
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples of each task, length and seed; text: documents.")
    ] = 100,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Samples read side by side.")] = 16,
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder with data sets; by default the run's, or $MNEMIC_DATA.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="BABILong, niah: test, validation or train.")] = "test",
    prompt: Annotated[
        str, typer.Option(metavar="HOW", help="whole, or what a model without memory gets: truncated:N, bm25:N, ...")
    ] = "whole",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Logs and reports. [RUN/evaluations/NAME]")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; all by default.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the tasks and their lengths, and exit.")] = False,
) -> None:
    """Measure trained models: accuracy by the official rule and the fixed one, 95% intervals, speed and memory.

    Every batch of answers is appended to a log and flushed. A run that was killed goes on with the same command and
    ends with the same report; a log of other settings or other weights is refused. Nothing is cut from a context
    unless --prompt says so, and then it is counted.

    text: loss and perplexity on the documents that mnemic prepare --validation-fraction kept apart, once with the state
    carried through a document and once with a new state for every segment, over the same tokens.

    \b
    Examples:
      mnemic eval runs/lm2
      mnemic eval lm2-babilong --lengths 2k,16k --samples 20 -o scores
      mnemic eval runs/lm2 runs/rmt --tasks qa1,qa2 --lengths 0k,1k,8k --seeds 1,2 --samples 400 -o scores
      mnemic eval runs/recall --lengths 2,4,8,16
      mnemic eval runs/none --tasks qa1 --lengths 4k --prompt bm25:480
      mnemic eval runs/texts --tasks text --samples 200
      mnemic eval --list

    \b
    Reads:   RUN (model, tokenizer, experiment.toml); DIR, if given: the data sets, or what mnemic prepare wrote.
    Writes:  MODEL.jsonl (every answer), report.json, report.csv, report.html, costs.json; text: results-text.json.
    """
    from ..benchmarks.shipped import is_shipped
    from ..benchmarks.trained import check_folder
    from ..core.errors import ConfigError, InputError
    from ._shared import check_output, quiet

    quiet()
    if listed:
        _list()
        return
    if not folders:
        raise InputError("No run to evaluate: name folders that mnemic train wrote.")
    for folder in folders:
        check_output(folder, output)
        if not is_shipped(folder):
            check_folder(folder)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if _is_text(folders[0], tasks):
        if lengths is not None or prompt != "whole":
            raise ConfigError("--lengths and --prompt are not for held-out text, whose documents are read whole.")
        from .held_out import evaluate_held_out

        evaluate_held_out(folders, data, samples, batch_size, seeds, output)
        return
    settings = {
        "tasks": tasks, "lengths": lengths, "seeds": seeds, "samples": samples, "batch_size": batch_size, "data": data,
        "split": split, "prompt": prompt,
    }  # fmt: skip
    _evaluate(folders, settings, output)


def _is_text(folder: Path, tasks: str | None) -> bool:
    from ..benchmarks.experiment import SETTINGS, Experiment

    if tasks is not None:
        return tasks.strip() == "text"
    file = folder / SETTINGS
    return file.is_file() and Experiment.read(file).task == "text"


def _evaluate(folders: list[Path], given: dict[str, Any], output: Path | None) -> None:
    from ..benchmarks import results
    from ..benchmarks.evaluation import evaluate as answer
    from ..benchmarks.report import check_plots, print_report, write_report
    from ..benchmarks.shipped import open_trained
    from ..core.errors import InputError
    from ._shared import console

    check_plots()
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"Runs of equal names: {', '.join(names)}. Reports tell models by the names of their folders.")
    if output is None and len(folders) > 1:
        raise InputError("Several runs share a report: say where with --output DIR.")
    evaluated, models, settings = [], [], {}
    for folder, name in zip(folders, names, strict=True):
        trained = open_trained(folder)
        evaluation = _evaluation(given, trained)
        cells = evaluation.cells(trained.tokenizer, trained.unit, trained.sizes)
        identity = evaluation.identity(trained.model)
        settings[name] = {key: value for key, value in identity.items() if key != "model"}
        place = output if output is not None else folder / "evaluations" / _slug(evaluation.tasks, settings[name])
        place.mkdir(parents=True, exist_ok=True)
        log = place / f"{name}.jsonl"
        answer(trained.model, cells, evaluation, log, progress=sys.stderr.isatty())
        evaluated.append(results.Evaluated(name, log))
        models.append(trained.description(name))
        output = place
    assert output is not None
    found, costs = results.summarise(evaluated)
    # Runs that were trained on different tasks are measured on different ones unless tasks are named.
    alike = all(one == settings[names[0]] for one in settings.values())
    shown = settings[names[0]] if alike else settings
    found = {"title": f"Evaluation of {', '.join(names)}", "scale": None, "settings": shown, "models": models, **found}
    written = write_report(found, costs, output)
    print_report(found, costs, console())
    typer.echo(f"Written: {', '.join(str(path) for path in written)}", err=True)


def _evaluation(given: dict[str, Any], trained: Any) -> Any:
    from ..benchmarks.evaluation import Evaluation
    from ..core.errors import ConfigError
    from ._shared import numbers, words

    tasks = trained.tasks if given["tasks"] is None else words(given["tasks"], "--tasks")
    if not tasks or "text" in tasks:
        raise ConfigError(
            f"{trained.folder} does not say what to evaluate; name tasks with --tasks (mnemic eval --list has them), "
            "or text alone."
        )
    return Evaluation(
        tasks=tasks,
        lengths=None if given["lengths"] is None else words(given["lengths"], "--lengths"),
        seeds=numbers(given["seeds"], "--seeds"),
        samples=given["samples"],
        batch_size=given["batch_size"],
        data=given["data"] or (trained.experiment.data if trained.experiment is not None else None),
        split=given["split"],
        prompt=given["prompt"],
    )


def _slug(tasks: tuple[str, ...], settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{'-'.join(tasks)[:40]}-{digest[:8]}"


def _list() -> None:
    from ..benchmarks.catalog import catalog
    from ._shared import console, table

    shown = table("", "task", "unit of length", "lengths by default", "needs", "source")
    for entry in catalog():
        shown.add_row(entry.name, entry.unit, ", ".join(entry.lengths), entry.needs or "", entry.source)
    console().print(shown)
