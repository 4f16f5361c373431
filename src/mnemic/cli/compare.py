"""`mnemic compare`: several memories trained and measured alike, and the leaderboard."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What is compared; see docs/benchmarks.md.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Runs, logs and the leaderboard.")],
    processes: Annotated[int, typer.Option(metavar="N", min=1, help="Models at a time on this machine.")] = 1,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="CPU threads of each.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A Ray cluster (auto, ray://...), or local. DIR must be on all machines."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be run, and exit.")] = False,
) -> None:
    """Train several memories at equal parameters, samples and seeds, measure them, and write the leaderboard.

    Killed, it goes on with the same command, and ends with the same leaderboard. A memory that cannot take part is
    shown with the reason.

    \b
    Examples:
      mnemic compare recipes/compare/cpu.toml --output runs/leaderboard --plan
      mnemic compare recipes/compare/cpu.toml --output runs/leaderboard --processes 2
      mnemic compare CONFIG.toml --output /shared/board --ray auto

    \b
    Reads:   CONFIG.toml; $MNEMIC_DATA, if set.
    Writes:  DIR/runs/BOARD/MEMORY/seed-N (as mnemic train and mnemic eval), report.json, report.csv, report.html,
             costs.json.
    """
    from ..benchmarks.comparison import Comparison
    from ..benchmarks.jobs import run_jobs
    from ..benchmarks.leaderboard import leaderboard
    from ..benchmarks.report import check_plots, print_report, write_report
    from ..core.errors import InputError
    from ._shared import console, quiet

    quiet()
    comparison = Comparison.read(config)
    _plan(comparison)
    if plan:
        return
    check_plots()
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; --output names a folder.")
    output.mkdir(parents=True, exist_ok=True)
    started, outcomes = time.perf_counter(), []
    for outcome in run_jobs(comparison.jobs, output, processes=processes, threads=threads, ray=ray):
        outcomes.append(outcome)
        job, minutes = outcome.job, (time.perf_counter() - started) / 60
        done = f"{len(outcomes)}/{len(comparison.jobs)}, {minutes:.1f} min"
        said = f"not run: {outcome.refused}" if outcome.refused else "done"
        typer.echo(f"{done}: {job.board}, {job.entry}, seed {job.seed}: {said}", err=True)
        sys.stderr.flush()
    found, costs = leaderboard(comparison, output, outcomes)
    if not found["scores"]:
        raise InputError(f"No model of {config} could be run: {found['models'][0]['note']}")
    written = write_report(found, costs, output)
    print_report(found, costs, console())
    typer.echo(f"Written: {', '.join(str(path) for path in written)}", err=True)


def _plan(comparison: Any) -> None:
    from .train import tokens_expected

    boards = list(dict.fromkeys(job.board for job in comparison.jobs))
    for board in boards:
        jobs = [job for job in comparison.jobs if job.board == board]
        first = jobs[0]
        typer.echo(
            f"{board}: {len(jobs)} models, each about {tokens_expected(first.experiment):,} tokens of training, then "
            f"{', '.join(first.evaluation.tasks)}, {first.evaluation.samples} samples of each length",
            err=True,
        )
