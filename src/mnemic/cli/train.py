"""`mnemic train`: one experiment -> a run folder."""

import os
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
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="babilong, stories, text, recall, segment_mqar, chomsky, ... [babilong]"),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="BABILong tasks, such as qa1,qa2; chomsky: one. [qa1]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Folder with bAbI and books, or $MNEMIC_DATA; text: .txt, or prepared."),
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
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting; memory.KEY, host.KEY and task.KEY for parts."),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; all by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR.")] = False,
) -> None:
    """Train a host with a memory and leave everything in one folder.

    Fresh hosts are small Llamas unless `host` names another architecture, a folder or a model on the hub. Values of
    --set are TOML; plain words need no quotes. Equal settings give equal runs on one machine.

    \b
    Examples:
      mnemic train --memory lm2 --task recall --segment 8 --steps 500 --output runs/recall
      mnemic train recipes/babilong/lm2.toml --steps 2000 --output runs/lm2
      mnemic train --task babilong --tasks qa1,qa2 --segments 1,2,4,8 --output runs/qa \\
          --set memory.num_slots=32 --set host.hidden_size=256 --set truncation=tail:2
      mnemic train --task text --data book.txt --memory rmt --output runs/book
      mnemic train recipes/babilong/lm2.toml --steps 2000 --output runs/lm2 --resume
      mnemic train --task text --data data/texts --set stateful=true --output runs/texts   # from mnemic prepare

    \b
    Reads:   CONFIG.toml; PATH, if given: babi-v1.2/ and gutenberg-books/, plain text, a folder that mnemic prepare
             wrote, or a mixture of such folders as TOML. Without, stories are generated and the background is prose
             that comes with Python.
    Writes:  DIR/experiment.toml (every setting), log.json (what was logged, seconds, versions), summary.json,
             curves.png, runs/ (for TensorBoard), checkpoints, the model, its tokenizer, and mnemic.json.
             `mnemic eval DIR` and `mnemic stream DIR` read them.

    Killed runs go on with the same command and --resume, to the same weights. SIGTERM and Ctrl-C save and exit 0; a
    second one stops at once.
    """
    import torch

    from ..benchmarks.experiment import LOG, SETTINGS, Experiment
    from ..benchmarks.runs import run
    from ..core.errors import ConfigError, InputError
    from ..training.checkpoints import checkpoints
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
    if resume and not checkpoints(output):
        typer.echo(f"{output} has no checkpoint; the run starts from its beginning.", err=True)

    # Of several processes (torchrun, accelerate launch) the first one speaks.
    speaks = os.environ.get("RANK", "0") == "0"

    def announce(model: Any) -> None:
        if speaks:
            _announce(experiment, model)

    log = run(experiment, output, progress=speaks and sys.stderr.isatty(), announce=announce, resume=resume)
    if not speaks:
        return
    if "stopped" in log:
        typer.echo(
            f"Stopped by {log['stopped']['signal']} after step {log['stopped']['step']}, and saved. Go on: the same "
            "command with --resume."
        )
        return
    _summarise(experiment, log, output)


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

    from ..benchmarks.expected import tokens_expected
    from ..hosts import parameter_report

    report = parameter_report(model)
    name = f"{experiment.task} {', '.join(experiment.tasks)}" if experiment.on_stories else experiment.task
    most = "->".join(map(str, experiment.most_segments))
    drawn = f"rows read on and on, {most}" if experiment.stateful else f"{experiment.least_segments} to {most}"
    device = "cuda" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    for label, said in (
        ("memory", f"{experiment.memory}, {report['memory']['total']:,} parameters"),
        ("host", f"{experiment.host}, {report['host']['total']:,} parameters"),
        ("task", f"{name}; {_source(experiment)}"),
        ("samples", f"{drawn} segments of {experiment.counted} tokens"),
        ("run", f"{experiment.steps:,} steps of {experiment.batch_size}, about {tokens_expected(experiment):,} tokens"),
        ("on", device),
    ):
        typer.echo(f"{label:8} {said}", err=True)


def _source(experiment: Any) -> str:
    from ..benchmarks.babilong import data_folder

    if not experiment.on_stories and experiment.task != "text":
        sizes = experiment.task_options.items()
        return ", ".join(f"{key} = {value}" for key, value in sizes) or "standard sizes"
    if experiment.task == "text":
        return experiment.data or "prose that comes with Python"
    folder = data_folder(experiment.data)
    if folder is None:
        return "generated stories in prose that comes with Python"
    return f"{'released' if experiment.task == 'babilong' else 'generated'} stories and books in {folder}"


def _summarise(experiment: Any, log: dict[str, Any], output: Path) -> None:
    summary = log["summary"]
    _tables(summary)
    loss = summary["loss"]
    losses = f"loss {loss['first']:.3f} -> {loss['last']:.3f}, " if loss else ""
    typer.echo(f"Trained: {losses}{log['seconds']:,} s. Run folder: {output}")
    if "not written" in log:
        typer.echo(log["not written"], err=True)
    measured = experiment.task != "text" or experiment.prepared
    typer.echo(f"Next: {_next(output) if measured else f'mnemic stream {output}'}")


def _tables(summary: dict[str, Any]) -> None:
    """Speed and peak memory, and the last diagnostics of the memory, a row for each block."""
    from rich.console import Console
    from rich.table import Table

    def said(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    console, speed = Console(stderr=True), Table(show_header=False)
    memory = summary["peak_memory_bytes"]
    for label, text in (
        ("tokens a second", said(summary["tokens_per_second"], ",.0f")),
        ("operations a token, counted", said(summary["operations_per_token"], ",.0f")),
        ("utilisation", f"{said(summary['utilisation'], '.1%')} of {summary['peak']['of']}"),
        ("peak memory", "-" if memory is None else f"{memory / 2**20:,.0f} MiB"),
    ):
        speed.add_row(label, text)
    console.print(speed)
    blocks = summary["memory"]
    if blocks:
        names = list(dict.fromkeys(name for values in blocks.values() for name in values))
        table = Table("block", *names)
        for block, values in blocks.items():
            table.add_row(block, *(said(values.get(name), ".4g") for name in names))
        console.print(table)


def _next(output: Path) -> str:
    return f"mnemic eval {output}"
