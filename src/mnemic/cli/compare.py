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
    costs: Annotated[
        bool, typer.Option("--costs", help="Only measure speeds, one model at a time, and add them to the leaderboard.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be run, and exit.")] = False,
) -> None:
    """Train several memories at equal parameters, samples and seeds, measure them, and write the leaderboard.

    Killed, it goes on with the same command, and ends with the same leaderboard. A memory that cannot take part is
    shown with the reason.

    --costs measures training and decoding in tokens a second and the carried state, of fresh models, each beside the
    host without memory; run it while nothing else does. It trains nothing, so it may come before or after the rest.

    \b
    Examples:
      mnemic compare recipes/compare/cpu.toml --output runs/leaderboard --plan
      mnemic compare recipes/compare/cpu.toml --output runs/leaderboard --processes 2
      mnemic compare recipes/compare/cpu.toml --output runs/leaderboard --costs
      mnemic compare CONFIG.toml --output /shared/board --ray auto

    \b
    Reads:   CONFIG.toml; $MNEMIC_DATA, if set.
    Writes:  DIR/runs/BOARD/MEMORY/seed-N (as mnemic train and mnemic eval), report.json, report.csv, report.html,
             costs.json; text.csv of held-out text. --costs: speeds.json, models.csv.
    """
    from ..benchmarks.comparison import Comparison
    from ..benchmarks.jobs import run_jobs
    from ..benchmarks.leaderboard import leaderboard
    from ..benchmarks.report import check_plots
    from ..core.errors import InputError
    from ._shared import quiet

    quiet()
    comparison = Comparison.read(config)
    _plan(comparison)
    if plan:
        return
    check_plots()
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; --output names a folder.")
    output.mkdir(parents=True, exist_ok=True)
    if costs:
        _costs(comparison, output, threads)
        return
    started, outcomes = time.perf_counter(), []
    for outcome in run_jobs(comparison.jobs, output, processes=processes, threads=threads, ray=ray):
        outcomes.append(outcome)
        job, minutes = outcome.job, (time.perf_counter() - started) / 60
        done = f"{len(outcomes)}/{len(comparison.jobs)}, {minutes:.1f} min"
        said = f"not run: {outcome.refused}" if outcome.refused else "done"
        typer.echo(f"{done}: {job.board}, {job.entry}, seed {job.seed}: {said}", err=True)
        sys.stderr.flush()
    found, measured = leaderboard(comparison, output, outcomes)
    if not found["scores"] and not found.get("text"):
        raise InputError(f"No model of {config} could be run: {found['models'][0]['note']}")
    _report(found, measured, output)


def _costs(comparison: Any, output: Path, threads: int) -> None:
    """Speeds into speeds.json, and into the report where there is one."""
    import json

    from filelock import FileLock, Timeout

    from ..benchmarks.jobs import LOCK, with_threads
    from ..benchmarks.report.writing import COSTS, REPORT
    from ..benchmarks.speeds import measure, with_speeds, write
    from ..core.errors import InputError
    from ._shared import console, table

    try:
        with FileLock(output / LOCK, blocking=False), with_threads(threads):
            found = measure(comparison, progress=sys.stderr.isatty())
    except Timeout:
        raise InputError(f"A comparison is running in {output}; speeds are measured while nothing else is.") from None
    path = write(found, output)
    typer.echo(f"Written: {path}", err=True)
    if all((output / name).is_file() for name in (REPORT, COSTS)):
        results, measured = (json.loads((output / name).read_text(encoding="utf-8")) for name in (REPORT, COSTS))
        _report(with_speeds(results, output), measured, output)
        return
    heads = ("training tokens/s", "x host", "decode tokens/s", "x host", "long state")
    shown = table("costs", "model", *heads, right=heads)
    for model in found["models"]:
        if "refused" in model:
            shown.add_row(model["model"], f"not run: {model['refused']}")
            continue
        each = [model[kind] for kind in ("train", "decode")]
        cells = [text for one in each for text in (f"{one['tokens_per_second']:,.0f}", f"{one['ratio']:.2f}")]
        shown.add_row(model["model"], *cells, f"{model['state_bytes']:,}")
    console().print(shown)


def _report(results: Any, measured: Any, output: Path) -> None:
    from ..benchmarks.report import print_report, write_report
    from ._shared import console

    written = write_report(results, measured, output)
    print_report(results, measured, console())
    typer.echo(f"Written: {', '.join(str(path) for path in written)}", err=True)


def _plan(comparison: Any) -> None:
    from ..benchmarks.expected import tokens_expected

    boards = list(dict.fromkeys(job.board for job in comparison.jobs))
    for board in boards:
        jobs = [job for job in comparison.jobs if job.board == board]
        first = jobs[0]
        typer.echo(
            f"{board}: {len(jobs)} models, each about {tokens_expected(first.experiment):,} tokens of training, then "
            + "; ".join(
                f"{', '.join(dict.fromkeys(name for name, _, _ in one.names()))}, {one.samples} samples of each length"
                for one in first.evaluations
            ),
            err=True,
        )
