"""Jobs of a comparison: trained and measured in folders of their own, one after the other, in processes, or with Ray.

A job depends on nothing but its settings, and its folder tells how far it is, so any process of any machine that sees
the folder can do it or go on with it. A job that its memory or host refuses, or whose loss is no number, is reported
and stops nothing; other errors (a full disk, a damaged log, data that are missing) are not caught.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers.utils import logging

from ..core.errors import ConfigError, HostError, InputError, MissingExtraError, TrainingError, UnsupportedError
from ..core.files import replace_atomically
from ..training.checkpoints import checkpoints
from .comparison import Job
from .evaluation import evaluate
from .experiment import LOG, SETTINGS
from .prompts import parse_prompt
from .runs import run
from .trained import open_run

ANSWERS, DESCRIPTION, LOCK = "answers.jsonl", "description.json", ".lock"


def answers(job: Job, folder: str | Path) -> list[Path]:
    """The logs of a job's evaluations, in order; folder: of the comparison."""
    others = [f"answers-{number}.jsonl" for number in range(2, len(job.evaluations) + 1)]
    return [Path(folder) / job.folder / name for name in (ANSWERS, *others)]


@dataclass(frozen=True)
class Outcome:
    """A job's end: refused says why a memory or host would not take part, or None."""

    job: Job
    refused: str | None = None


def run_jobs(
    jobs: Sequence[Job], folder: str | Path, *, processes: int = 1, threads: int = 1, ray: str | None = None
) -> Iterator[Outcome]:
    """Do what is left of the jobs, in any order.

    Args:
        folder: of the comparison; with Ray, at the same path on every machine.
        processes: jobs at a time on this machine. threads: CPU threads of each.
        ray: address of a Ray cluster, "local" for this machine; None to do without.

    Raises:
        MissingExtraError: Ray is not installed, or, before any job begins, what the prompt of one needs.
        TrainingError: a run was stopped by a signal.
        InputError: another process is at work in the folder, or it is of another comparison.
    """
    lock = FileLock(Path(folder) / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"Another process is at work in {folder}; wait for it, or use another folder.") from None
    with lock:
        left = [job for job in jobs if not (Path(folder) / job.folder / DESCRIPTION).is_file()]
        for setting in dict.fromkeys(one.prompt for job in left for one in job.evaluations):
            parse_prompt(setting)
        yield from _outcomes(jobs, Path(folder), processes, threads, ray)


def _outcomes(
    jobs: Sequence[Job], folder: Path, processes: int, threads: int, ray: str | None
) -> Iterator[Outcome]:  # fmt: skip
    if ray is not None:
        yield from _with_ray(jobs, folder, threads, ray)
    elif processes == 1:
        with with_threads(threads):
            yield from in_order(jobs, 1, lambda job: done(do(job, folder)))
    else:
        # Spawned: a forked process with torch's threads in it may hang.
        context = multiprocessing.get_context("spawn")
        with futures.ProcessPoolExecutor(processes, context, _begin_child, (threads,)) as pool:
            try:
                yield from in_order(jobs, processes, lambda job: pool.submit(do, job, folder))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def in_order(
    jobs: Sequence[Job], most: int, begin: Callable[[Job], "futures.Future[Outcome]"]
) -> Iterator[Outcome]:  # fmt: skip
    """Begin each job once the job whose model it needs has ended, so many at a time, those first that are listed first.

    Models that are no job's here count as there.
    """
    left = list(jobs)
    running: dict[futures.Future[Outcome], Job] = {}
    while left or running:
        waiting = {job.folder for job in (*left, *running.values())}
        free = [job for job in left if _needed(job) not in waiting]
        for job in free[: most - len(running)]:
            left.remove(job)
            running[begin(job)] = job
        for ended in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
            del running[ended]
            yield ended.result()


def _needed(job: Job) -> Path | None:
    """Folder of the model that it begins with or measures, where that is another job's."""
    return job.start if job.trained is None else job.model


def done(outcome: Outcome) -> "futures.Future[Outcome]":
    """A future that has ended."""
    future: futures.Future[Outcome] = futures.Future()
    future.set_result(outcome)
    return future


def do(job: Job, folder: Path) -> Outcome:
    """Train, or go on with it; answer what has not been answered; leave DESCRIPTION, which ends the job."""
    place = folder / job.folder
    needed = _needed(job)
    ready = job.trained is None and _trained(job, place)
    if needed is not None and not ready and not (folder / needed / LOG).is_file():
        return Outcome(job, f"needs the model {needed}, which was not trained")
    try:
        log = {}
        if job.trained is None and not ready:
            start = None if job.start is None else folder / job.start
            log = run(job.experiment, place, progress=False, resume=bool(checkpoints(place)), start=start)
        if "stopped" not in log:
            _measure(job, folder)
    except (ConfigError, HostError, UnsupportedError, TrainingError) as error:
        return Outcome(job, str(error))
    if "stopped" in log:
        raise TrainingError(f"{place}: stopped by {log['stopped']['signal']}; the same command goes on.")
    return Outcome(job)


def _measure(job: Job, folder: Path) -> None:
    place = folder / job.folder
    place.mkdir(parents=True, exist_ok=True)
    trained = open_run(folder / job.model)
    for evaluation, log in zip(job.evaluations, answers(job, folder), strict=True):
        cells = evaluation.cells(trained.tokenizer, trained.unit, trained.sizes)
        evaluate(trained.model, cells, evaluation, log)
    text = json.dumps(trained.description(job.entry), indent=1)
    replace_atomically(place / DESCRIPTION, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _trained(job: Job, place: Path) -> bool:
    settings = place / SETTINGS
    if settings.is_file() and settings.read_text(encoding="utf-8") != job.experiment.to_toml():
        raise InputError(f"{place} holds a run with other settings: of another comparison. Use another folder.")
    return settings.is_file() and (place / LOG).is_file()


def _with_ray(jobs: Sequence[Job], folder: Path, threads: int, address: str) -> Iterator[Outcome]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("Ray is not installed: pip install 'mnemic[ray]', or leave --ray out.") from error
    ray.init(address=address, log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0

    def remote(job: Job) -> Outcome:
        _begin(threads)
        return do(job, folder.resolve())

    try:
        task: Any = ray.remote(num_cpus=threads, num_gpus=gpus)(remote)
        # All that are free at once: the cluster knows how many it can do.
        yield from in_order(jobs, len(jobs), lambda job: task.remote(job).future())
    finally:
        ray.shutdown()


def _begin_child(threads: int) -> None:
    """Dies with its parent: an orphan would go on and write beside those who go on in its place."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
    _begin(threads)


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def with_threads(threads: int) -> Iterator[None]:
    """torch with so many CPU threads, and transformers silent."""
    before = torch.get_num_threads()
    _begin(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
