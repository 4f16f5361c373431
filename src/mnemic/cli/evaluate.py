"""`mnemic eval`: the accuracy of a trained run, or its loss on held-out text, with intervals."""

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import typer

TASKS = ("babilong", "recall", "text")
SAMPLES = {"babilong": 100, "recall": 512, "text": 100}


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that mnemic train or mnemic.save wrote.")],
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="babilong, recall or text; by default the run's.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="BABILong tasks, such as qa1,qa2; by default the run's.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="LIST", help="BABILong lengths: official names or numbers of tokens.")
    ] = "0k,1k,2k,4k",
    segments: Annotated[str, typer.Option(metavar="LIST", help="Recall: numbers of segments.")] = "2,4,8",
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Samples of each length; text: documents. [100; recall: 512]")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="BABILong, text: samples read side by side.")
    ] = 16,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder with bAbI and books, or prepared text; else the run's or $MNEMIC_DATA."
        ),
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="BABILong: test, validation or train.")] = "test",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the samples.")] = 1,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Results. [RUN/results-TASK.json]", dir_okay=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; all by default.")] = None,
) -> None:
    """Measure a trained model: accuracy, or loss on held-out text, with its 95% interval.

    babilong: questions about facts hidden in long texts, scored by the official rule and by the fixed one (which
    does not count a right word in a wrong place). Lengths count tokens of the model's own tokenizer.
    recall: by the number of segments and the distance of the fact in segments; the chance level is printed.
    text: loss and perplexity on the documents that mnemic prepare --validation-fraction kept apart, once with the
    state carried through a document and once with a new state for every segment, over the same tokens.

    \b
    Examples:
      mnemic eval runs/lm2
      mnemic eval runs/lm2 --tasks qa1,qa2 --lengths 0k,1k,8k --samples 400
      mnemic eval runs/recall --segments 2,4,8,16
      mnemic eval runs/texts --samples 200

    \b
    Reads:   RUN (model, tokenizer, experiment.toml); DIR, if given: babi-v1.2/ and gutenberg-books/, or what mnemic
             prepare wrote.
    Writes:  RUN/results-TASK.json: settings, versions, scores, every answer; beside it the settings as .toml.
    """
    import torch
    import transformers

    import mnemic

    from ..benchmarks.experiment import SETTINGS, Experiment
    from ..core.errors import ConfigError, InputError, UnknownNameError
    from ..hosts import base_model
    from ..hosts.saving import describe
    from ._shared import check_folder, numbers, placed, quiet, words

    quiet()
    check_folder(folder)
    experiment = Experiment.read(folder / SETTINGS) if (folder / SETTINGS).is_file() else None
    if task is not None and task not in TASKS:
        raise UnknownNameError.of("task to evaluate", task, TASKS)
    if task is None:
        if experiment is None or experiment.task not in TASKS:
            raise ConfigError(f"{folder} does not say what to evaluate; give --task {' or --task '.join(TASKS)}.")
        task = experiment.task
    resolved: dict[str, Any] = {
        "run": str(folder),
        "task": task,
        "samples": samples or SAMPLES[task],
        "seed": seed,
    }
    held_out: list[Any] = []
    if task == "recall":
        if experiment is None or experiment.task != "recall":
            raise ConfigError(f"{folder} was not trained on recall: its {SETTINGS} gives no sizes of the task.")
        resolved["segments"] = list(numbers(segments, "--segments"))
    elif task == "text":
        resolved["data"] = data if data is not None else experiment.data if experiment else None
        resolved["batch_size"] = batch_size
        held_out = _held_out(folder, resolved)
    else:
        resolved["tasks"] = (
            list(words(tasks, "--tasks")) if tasks else list(experiment.tasks if experiment else ("qa1",))
        )
        resolved["lengths"] = list(words(lengths, "--lengths"))
        resolved["split"], resolved["batch_size"] = split, batch_size
        resolved["data"] = data if data is not None else experiment.data if experiment else None
        _check_babilong(resolved)
    path = output or folder / f"results-{task}.json"
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} does not exist; --output names a file in a folder that does.")
    if path.suffix == ".toml":
        raise InputError(f"{path}: the results are JSON; the settings are written beside them as .toml.")
    if threads is not None:
        torch.set_num_threads(threads)
    model = placed(mnemic.load(folder))
    started = time.perf_counter()
    if task == "text":
        found = _text_loss(model, held_out, resolved)
    else:
        found = _recall(model, experiment, resolved) if task == "recall" else _babilong(model, folder, resolved)
    base = base_model(model)
    result = {
        "settings": resolved,
        "model": {k: v for k, v in describe(base).items() if k in ("memory", "segment")},
        "host": base.mnemic.host_class.__name__,
        "versions": {
            "mnemic": mnemic.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started, 1),
        **found,
    }
    _write(path, resolved, result)
    _print(task, result)
    typer.echo(f"{path}: {result['seconds']} s", err=True)


def _check_babilong(settings: dict[str, Any]) -> None:
    """Names that are wrong are told before the model is loaded."""
    from ..benchmarks import babi
    from ..benchmarks.babilong import LABELS, LENGTHS, data_folder
    from ..core.errors import UnknownNameError

    folder = data_folder(settings["data"])
    settings["facts"] = "generated" if folder is None else "released"
    for name in settings["tasks"]:
        if name not in LABELS:
            raise UnknownNameError.of("BABILong task", name, LABELS)
    for name in settings["lengths"]:
        if name not in LENGTHS and not name.isdigit():
            raise UnknownNameError.of("length", name, LENGTHS)
    if settings["split"] not in babi.SPLITS:
        raise UnknownNameError.of("split", settings["split"], babi.SPLITS)


def _held_out(folder: Path, settings: dict[str, Any]) -> list[Any]:
    """Held-out documents of the data, of each part its share, in an order that the seed shuffles."""
    from itertools import islice

    from ..core.errors import ConfigError, DataError
    from ..training import Mixture
    from ..training.mixture import is_prepared
    from ..training.shards import VALIDATION
    from ..training.tokenizer import tokenizer_fingerprint
    from ._shared import tokenizer

    data = settings["data"]
    if data is None or not is_prepared(data):
        raise ConfigError(
            f"{data or folder}: text is measured on documents kept apart; prepare them with mnemic prepare "
            "--validation-fraction X and name the folder with --data."
        )
    mixture = Mixture.open(data, split=VALIDATION, seed=settings["seed"])
    if tokenizer_fingerprint(tokenizer(folder)) != mixture.parts[0].store.fingerprint:
        raise DataError(
            f"{data} was prepared with another tokenizer; prepare it with that of the run: --tokenizer {folder}."
        )
    settings["samples"] = min(settings["samples"], sum(len(part.store) for part in mixture.parts))
    chosen = islice(mixture.documents(), settings["samples"])
    return [mixture.parts[part].store[document] for part, document in chosen]


def _text_loss(model: Any, documents: list[Any], settings: dict[str, Any]) -> dict[str, Any]:
    from ..benchmarks.held_out import evaluate_text, summarise

    records = evaluate_text(model, documents, batch_size=settings["batch_size"], progress=True)
    return {**summarise(records), "records": records}


def _babilong(model: Any, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from ..benchmarks.babilong import data_folder, open_babilong
    from ..benchmarks.background import named
    from ..benchmarks.evaluate import evaluate_babilong, score
    from ..benchmarks.haystack import Haystack
    from ..hosts import base_model
    from ._shared import tokenizer

    words = tokenizer(folder, getattr(base_model(model).config, "_name_or_path", None))
    source = data_folder(settings["data"])
    haystack = Haystack(named("books" if source else "prose", settings["split"], source), words)
    opened = {}
    for name in settings["tasks"]:
        for length in settings["lengths"]:
            opened[name, length] = open_babilong(
                name, int(length) if length.isdigit() else length, words, settings["split"],
                data=source, seed=settings["seed"], background=haystack,
            )  # fmt: skip
    records, scores = [], []
    for (name, length), samples in opened.items():
        answered = evaluate_babilong(
            model, words, samples, batch_size=settings["batch_size"], count=settings["samples"], progress=True
        )
        records += answered
        by_rule = {rule: _numbers(score(answered, rule)) for rule in ("official", "fixed")}
        tokens = sum(r["tokens"] for r in answered) / len(answered)
        scores.append({"task": name, "length": length, "mean_tokens": round(tokens), **by_rule})
    return {"scores": scores, "records": records}


def _recall(model: Any, experiment: Any, settings: dict[str, Any]) -> dict[str, Any]:
    from ..benchmarks.building import recall_task
    from ..benchmarks.evaluate import evaluate_recall

    task = recall_task(experiment)
    results = evaluate_recall(
        model, task, settings["segments"], count=settings["samples"], seed=settings["seed"], progress=True
    )
    scores = [
        {"segments": n, "distance": distance, **_numbers(one)}
        for n, by_distance in results.items()
        for distance, one in by_distance.items()
    ]
    return {"chance": task.chance, "scores": scores}


def _numbers(score: Any) -> dict[str, Any]:
    return {
        "correct": score.correct,
        "count": score.count,
        "accuracy": round(score.accuracy, 4),
        "interval": round(score.interval, 4),
    }


def _write(path: Path, settings: dict[str, Any], result: dict[str, Any]) -> None:
    from ..core.files import replace_atomically

    # JSON text, numbers and lists are TOML.
    toml = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items() if value is not None)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    replace_atomically(path.with_suffix(".toml"), lambda temporary: _text(temporary, toml))
    replace_atomically(path, lambda temporary: _text(temporary, text))


def _text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


def _print(task: str, result: dict[str, Any]) -> None:
    from ._shared import console, table

    if task == "recall":
        shown = table(f"recall, chance {100 * result['chance']:.1f}%", "segments", "distance", "accuracy", "samples",
                      right=("segments", "distance", "accuracy", "samples"))  # fmt: skip
        for s in result["scores"]:
            shown.add_row(str(s["segments"]), str(s["distance"]), _percent(s), str(s["count"]))
    elif task == "text":
        title = f"held-out text, {result['documents']:,} documents, {result['tokens']:,} tokens predicted"
        shown = table(title, "state", "loss", "perplexity", right=("loss", "perplexity"))
        said = {"carried": "carried through a document", "anew": "new for every segment"}
        for s in result["scores"]:
            shown.add_row(said[s["state"]], f"{s['loss']:.4f}", f"{s['perplexity']:,.2f}")
        interval = "" if result["interval"] is None else f" ± {result['interval']:.4f}"
        shown.add_row("gain of carrying", f"{result['gain']:.4f}{interval}", "")
    else:
        settings = result["settings"]
        columns = ("tokens", "official rule", "fixed rule", "samples")
        title = f"BABILong, {settings['split']}, {settings['facts']} facts"
        shown = table(title, "task", "length", *columns, right=columns)
        for s in result["scores"]:
            rules = _percent(s["official"]), _percent(s["fixed"])
            shown.add_row(s["task"], s["length"], f"{s['mean_tokens']:,}", *rules, str(s["official"]["count"]))
    console().print(shown)


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['accuracy']:.1f} ± {100 * score['interval']:.1f}%"
