"""`mnemic reproduce`: a paper's tables and figures, at a scale that fits the machine."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def reproduce(
    system: Annotated[str, typer.Argument(metavar="SYSTEM", help="Whose paper: lm2.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Runs, tables and the report.")
    ] = None,
    scale: Annotated[str, typer.Option(metavar="SCALE", help="smoke, cpu or gpu.")] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="Print the paper's own configuration and its cost.")] = False,
    processes: Annotated[int, typer.Option(metavar="N", min=1, help="Models at a time.")] = 1,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="CPU threads of each.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps and what they cost, and exit.")] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Afterwards, write the best model of the main table there.")
    ] = None,
) -> None:
    """Make the tables of a paper again: data, tokenizer, training, evaluation, tables, report.

    A few steps of every model are timed first, and every step says what it will cost. Killed, the same command goes
    on; what is finished is not done again. Where memory or disk do not suffice it stops before it begins.

    \b
    Examples:
      mnemic reproduce lm2 --scale cpu --dry-run
      mnemic reproduce lm2 --scale cpu --output runs/lm2-paper --processes 2
      mnemic reproduce lm2 --scale smoke --output /tmp/lm2-smoke
      mnemic reproduce lm2 --full

    \b
    Reads:   $MNEMIC_DATA, if set: released stories in novels; otherwise generated stories in the prose that comes
             with Python.
    Writes:  DIR: recipe.toml, runs and logs as mnemic compare, report.html, findings.json, tables.md, curves.png.
             --export: weights in bfloat16, config, tokenizer, log, model card.
    """
    import torch

    from ..benchmarks import reproduction
    from ..core.errors import ConfigError, UnsupportedError
    from ._shared import quiet

    quiet()
    if full:
        _full(system)
        return
    recipe = reproduction.recipe(system, scale)
    if output is None and not dry_run:
        raise ConfigError("--output names the folder of the runs and tables; --dry-run needs none.")
    counted = recipe.gpu and not torch.cuda.is_available()
    if counted and not dry_run:
        raise UnsupportedError(
            f"The scale {scale} is for a CUDA GPU and there is none here. --dry-run counts what it would take; "
            "--scale cpu runs here."
        )
    _begin(recipe, output, dry_run)
    found = _plan(recipe, output if output is not None and output.is_dir() else None, processes, threads, counted)
    if dry_run:
        return
    assert output is not None
    from ..benchmarks.reproduction.cost import check_room

    check_room(found, output, processes)
    _run(recipe, found, output, processes, threads)
    if export is not None:
        from ..benchmarks.shipped import export_best

        typer.echo(f"Exported: {export_best(recipe, output, export)}", err=True)


def _begin(recipe: Any, output: Path | None, dry_run: bool) -> None:
    """The folder, and in it the recipe that it is of."""
    from ..benchmarks.report import check_plots
    from ..core.errors import InputError
    from ..core.files import replace_atomically

    if output is None:
        return
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; --output names a folder.")
    kept = output / "recipe.toml"
    if kept.is_file() and kept.read_text(encoding="utf-8") != recipe.text:
        raise InputError(f"{output} holds a reproduction by another recipe; name another folder.")
    if dry_run:
        return
    check_plots()
    output.mkdir(parents=True, exist_ok=True)
    replace_atomically(kept, lambda temporary: temporary.write_text(recipe.text, encoding="utf-8"))


def _plan(recipe: Any, folder: Path | None, processes: int, threads: int, counted: bool) -> list[Any]:
    """Every step with its cost; steps that are done cost nothing."""
    from ..benchmarks.babilong import data_folder
    from ..benchmarks.jobs import with_threads
    from ..benchmarks.reproduction.cost import PEAK, SMALL_SHARE, costs, shown
    from ._shared import console, table

    place = data_folder()
    source = f"released stories and novels of {place}" if place else "generated stories, prose that comes with Python"
    typer.echo(f"data: {source}; nothing is fetched", err=True)
    with with_threads(threads):
        found = costs(recipe.comparison, folder, count=counted, say=lambda text: typer.echo(text, err=True))
    right = ("train tokens", "read tokens", "memory", "disk", "minutes")
    made = table(f"{recipe.comparison.title}, {recipe.comparison.scale}", "step", *right, right=right)
    for one in found:
        name = f"{one.job.board}, {one.job.entry}, seed {one.job.seed}"
        if one.refused is not None:
            made.add_row(f"{name}: cannot be run: {one.refused}", *[""] * len(right))
            continue
        cells = [f"{one.train_tokens:,}", f"{one.measured_tokens:,}", shown(one.memory), shown(one.disk)]
        made.add_row(name, *cells, f"{one.seconds / 60:.1f}")
    made.add_row("tables, report", "", "", "", "", "0.3")
    console().print(made)
    if counted:
        typer.echo(
            f"Counted, not measured: no GPU is here. One of {PEAK / 1e12:.0f} teraflops, of which models this small "
            f"are guessed to reach {SMALL_SHARE:.0%}; memory without activations.",
            err=True,
        )
    total = sum(one.seconds for one in found) / 60
    typer.echo(
        f"{total:.0f} minutes of training and measuring, about {total / processes:.0f} with --processes {processes}, "
        f"{shown(sum(one.disk for one in found))} of disk.",
        err=True,
    )
    return found


def _run(recipe: Any, found: list[Any], output: Path, processes: int, threads: int) -> None:
    from ..benchmarks.jobs import run_jobs
    from ..benchmarks.leaderboard import leaderboard
    from ..benchmarks.report import print_report, write_report
    from ..benchmarks.reproduction import findings, write
    from ..core.errors import InputError
    from ._shared import console

    jobs = recipe.comparison.jobs
    left = {one.job.folder: one.seconds for one in found}
    started, outcomes = time.perf_counter(), []
    for outcome in run_jobs(jobs, output, processes=processes, threads=threads):
        outcomes.append(outcome)
        job = outcome.job
        left.pop(job.folder, None)
        said = f"not run: {outcome.refused}" if outcome.refused else "done"
        minutes = (time.perf_counter() - started) / 60
        typer.echo(
            f"{len(outcomes)}/{len(jobs)}, {minutes:.1f} min: {job.board}, {job.entry}, seed {job.seed}: {said}; about "
            f"{sum(left.values()) / processes / 60:.0f} min left",
            err=True,
        )
        sys.stderr.flush()
    results, measured = leaderboard(recipe.comparison, output, outcomes)
    if not results["scores"]:
        raise InputError(f"No model could be run: {results['models'][0]['note']}")
    paths = [*write_report(results, measured, output), *write(findings(recipe, output, outcomes), output)]
    print_report(results, measured, console())
    typer.echo(f"Written: {', '.join(str(path) for path in paths)}", err=True)


def _full(system: str) -> None:
    """The paper's configuration; nothing is run."""
    from ..benchmarks.reproduction.full import estimate
    from ..benchmarks.reproduction.recipe import full_text

    text = full_text(system)
    typer.echo(text)
    typer.echo(estimate(text))
