"""`mnemic train`: one experiment -> a run folder."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The run folder to write.")],
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Settings; everything below overrides them.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="NAME", help="Memory: a name, or name:preset. [lm2]")] = None,
    task: Annotated[str | None, typer.Option(metavar="TASK", help="recall, babilong or text. [babilong]")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="NAMES", help="BABILong tasks, such as qa1,qa2. [qa1]")] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Folder with bAbI and books, or $MNEMIC_DATA; for text: .txt file(s)."),
    ] = None,
    segment: Annotated[int | None, typer.Option(metavar="N", help="Tokens of a segment. [64]")] = None,
    segments: Annotated[
        str | None, typer.Option(metavar="LIST", help="Most segments of a sample in each stage, such as 1,2,4. [4]")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimiser steps. [1000]")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Samples of a step. [32]")] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="X", help="Peak learning rate. [1e-3]")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of weights and data. [0]")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting; memory.KEY, host.KEY and recall.KEY for parts."),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; all by default.")] = None,
) -> None:
    """Train a host with a memory and leave everything in one folder.

    Fresh hosts are small Llamas unless `host` names another architecture, a folder or a model on the hub. Values of
    --set are TOML; plain words need no quotes. Equal settings give equal runs on one machine.

    \b
    Examples:
      mnemic train --memory lm2 --task recall --segment 8 --steps 500 --output runs/recall
      mnemic train configs/babilong/lm2.toml --steps 2000 --output runs/lm2
      mnemic train --task babilong --tasks qa1,qa2 --segments 1,2,4,8 --output runs/qa \\
          --set memory.num_slots=32 --set host.hidden_size=256 --set truncation=tail:2
      mnemic train --task text --data book.txt --memory rmt --output runs/book

    \b
    Reads:   CONFIG.toml; PATH, if given: babi-v1.2/ and gutenberg-books/, or plain text. Without, stories are
             generated and the background is prose that comes with Python.
    Writes:  DIR/experiment.toml (every setting), log.json (what was logged, seconds, versions), the model, its
             tokenizer, and mnemic.json. `mnemic eval DIR` and `mnemic stream DIR` read them.
    """
    import torch

    from ..benchmarks.experiment import LOG, SETTINGS, Experiment, run
    from ..core.errors import ConfigError, InputError
    from ._shared import numbers, quiet, settings, words

    quiet()
    values = settings(change or ())
    flags: dict[str, Any] = {
        "memory": memory,
        "task": task,
        "tasks": None if tasks is None else list(words(tasks, "--tasks")),
        "data": data,
        "segment": segment,
        "most_segments": None if segments is None else list(numbers(segments, "--segments")),
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    for key, value in flags.items():
        if value is not None and key in values:
            raise ConfigError(f"{key} is given twice: as a flag and with --set.")
    values.update({key: value for key, value in flags.items() if value is not None})
    experiment = Experiment.from_dict(values) if config is None else Experiment.read(config, values)
    _check_host(experiment)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; --output names a folder.")
    finished = output / SETTINGS, output / LOG
    if all(f.is_file() for f in finished) and finished[0].read_text(encoding="utf-8") == experiment.to_toml():
        typer.echo(f"{output} holds this very run, finished; delete the folder to train again.\nNext: {_next(output)}")
        return
    if not finished[0].exists() and any(output.glob("*.safetensors")):
        raise InputError(f"{output} holds a model that no run of mnemic train wrote; choose another folder.")
    if threads is not None:
        torch.set_num_threads(threads)
    log = run(experiment, output, progress=sys.stderr.isatty(), announce=lambda model: _announce(experiment, model))
    _summarise(experiment, log, output)


def tokens_expected(experiment: Any) -> int:
    """Tokens of the whole run, on average over the random numbers of segments."""
    stages, per_stage = experiment.most_segments, experiment.law().stage_batches
    total = 0.0
    for i, most in enumerate(stages):
        steps = min(per_stage, max(experiment.steps - i * per_stage, 0))
        if i == len(stages) - 1:
            steps = max(experiment.steps - i * per_stage, 0)
        total += steps * (experiment.least_segments + most) / 2
    return round(total * experiment.batch_size * experiment.segment)


def _check_host(experiment: Any) -> None:
    """Before a folder is made: a name that leads nowhere is a slip of the keyboard."""
    from ..core.errors import ConfigError
    from ._shared import host_config

    try:
        host_config(experiment.host, experiment.host_options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"host_options {experiment.host_options}: {error}") from error


def _announce(experiment: Any, model: Any) -> None:
    import torch

    from ..hosts import parameter_report

    report = parameter_report(model)
    name = experiment.task if experiment.task != "babilong" else f"babilong {', '.join(experiment.tasks)}"
    most = "->".join(map(str, experiment.most_segments))
    device = "cuda" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    for label, said in (
        ("memory", f"{experiment.memory}, {report['memory']['total']:,} parameters"),
        ("host", f"{experiment.host}, {report['host']['total']:,} parameters"),
        ("task", f"{name}; {_source(experiment)}"),
        ("samples", f"{experiment.least_segments} to {most} segments of {experiment.segment} tokens"),
        ("run", f"{experiment.steps:,} steps of {experiment.batch_size}, about {tokens_expected(experiment):,} tokens"),
        ("on", device),
    ):
        typer.echo(f"{label:8} {said}", err=True)


def _source(experiment: Any) -> str:
    from ..benchmarks.babilong import data_folder

    if experiment.task == "recall":
        sizes = experiment.recall_options.items()
        return ", ".join(f"{key} = {value}" for key, value in sizes) or "standard sizes"
    if experiment.task == "text":
        return experiment.data or "prose that comes with Python"
    folder = data_folder(experiment.data)
    return f"released stories and books in {folder}" if folder else "generated stories in prose that comes with Python"


def _summarise(experiment: Any, log: dict[str, Any], output: Path) -> None:
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    loss = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, " if losses else ""
    speed = tokens_expected(experiment) / max(log["seconds"], 0.1)
    typer.echo(f"Trained: {loss}{log['seconds']:,} s, about {speed:,.0f} tokens/s. Run folder: {output}")
    typer.echo(f"Next: {_next(output) if experiment.task != 'text' else f'mnemic stream {output}'}")


def _next(output: Path) -> str:
    return f"mnemic eval {output}"
