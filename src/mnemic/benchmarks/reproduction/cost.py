"""What a reproduction will cost: seconds, memory and disk, from a few steps of every model on this machine."""

import dataclasses
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ...core.errors import ConfigError, HostError, InputError, UnsupportedError
from ...core.files import replace_atomically
from ...hosts import base_model
from ...training import Collator
from ...training.budget import training_memory
from ..building import build, examples
from ..comparison import Comparison, Job
from ..expected import tokens_expected, tokens_measured
from ..experiment import LOG, Experiment
from ..jobs import DESCRIPTION

PACES = "paces.json"
PEAK = 989e12
"""Operations a second of an H100 or H200 in bfloat16, dense, as its maker states."""
SMALL_SHARE = 0.05
"""What of it models of some ten million parameters reach: a guess, said where it is used."""
_READ_SEGMENTS = 8
_ROOM = 700 * 2**20
"""Bytes of a process besides the model: the libraries, a background text, a log."""


@dataclass(frozen=True)
class Pace:
    """Of one model, alone on the machine. train, read: tokens a second. memory: bytes of training. weights: bytes."""

    train: float
    read: float
    memory: int
    weights: int
    parameters: int


@dataclass(frozen=True)
class Cost:
    """Of one job: what is left of it. seconds: training and measuring; refused: why it cannot be run, or None."""

    job: Job
    train_tokens: int
    measured_tokens: int
    seconds: float
    memory: int
    disk: int
    refused: str | None = None


def pace(experiment: Experiment, tokenizer: Any = None) -> tuple[Pace, Any]:
    """Two training steps on the longest stage's samples and a few segments read, after one of each; and the tokenizer.

    Raises:
        What building raises: ConfigError, HostError, UnsupportedError, ...
    """
    set_seed(experiment.seed)
    model, tokenizer = build(experiment, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = base_model(model.to(device))
    longest = dataclasses.replace(experiment, most_segments=experiment.most_segments[-1:])
    samples = examples(longest, model, tokenizer)
    size = experiment.batch_size
    rows = list(islice(iter(samples), 3 * size))
    batches = [Collator()(rows[at : at + size]) for at in range(0, len(rows), size)]
    moved: list[dict[str, Any]] = [
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches
    ]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def forward(batch: Mapping[str, Any]) -> Any:
        given = {**batch, "use_cache": False, "truncation": experiment.parsed_truncation()}
        return model(**given, replay=experiment.replay).loss

    def step(batch: Mapping[str, Any]) -> None:
        forward(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    used = training_memory(model, step=lambda: forward(moved[0]))
    train = _rate([(lambda b=b: step(b), int(b["attention_mask"].sum())) for b in moved], device)
    model.eval()
    ids = torch.zeros(size, _READ_SEGMENTS * experiment.segment, dtype=torch.long, device=device)
    with torch.no_grad():
        read = _rate([(lambda: base.stream(size).feed(ids), ids.numel())] * 2, device)
    weights = [p for p in model.parameters()]
    return Pace(
        train, read, used.total, sum(p.nbytes for p in weights), sum(p.numel() for p in weights)
    ), tokenizer  # fmt: skip


def counted(experiment: Experiment) -> Pace:
    """Of a large GPU that is not here: 6 operations a parameter and token of training, 2 of reading; memory without
    activations.

    Raises:
        ConfigError: an experiment that does not say how many parameters it has.
    """
    size = experiment.parameters
    if size is None:
        raise ConfigError("What an experiment costs can be counted only where it has parameters = N.")
    rate = PEAK * SMALL_SHARE / size
    return Pace(rate / 6, rate / 2, 16 * size, 4 * size, size)


def _rate(turns: Sequence[tuple[Callable[[], Any], int]], device: torch.device) -> float:
    """Tokens a second of all turns but the first."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    turns[0][0]()
    wait()
    started = time.perf_counter()
    for work, _ in turns[1:]:
        work()
    wait()
    return sum(tokens for _, tokens in turns[1:]) / max(time.perf_counter() - started, 1e-9)


def costs(
    comparison: Comparison,
    folder: Path | None = None,
    *,
    count: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Cost]:
    """The cost of every job, what is done already left out.

    Args:
        folder: of the reproduction; paces are kept there, and measured once. count: measure nothing, see `counted`.
        say: called with what is measured.
    """
    known = _kept(folder)
    tokenizers: dict[str, Any] = {}
    found = []
    for job in comparison.jobs:
        if count:
            found.append(_cost(job, dataclasses.asdict(counted(job.experiment)), None))
            continue
        key = _key(job)
        if key not in known:
            say(f"measuring {job.board}, {job.entry}")
            try:
                made, tokenizers[job.board] = pace(job.experiment, tokenizers.get(job.board))
                known[key] = dataclasses.asdict(made)
            except (ConfigError, HostError, UnsupportedError) as error:
                known[key] = {"refused": str(error)}
            gc.collect()
            if folder is not None:
                _keep(known, folder)
        found.append(_cost(job, known[key], folder))
    return found


def _cost(job: Job, known: Mapping[str, Any], folder: Path | None) -> Cost:
    if "refused" in known:
        return Cost(job, 0, 0, 0.0, 0, 0, known["refused"])
    one, experiment = Pace(**known), job.experiment
    train = tokens_expected(experiment) if job.trained is None else 0
    measured = sum(tokens_measured(evaluation, experiment.counted) for evaluation in job.evaluations)
    kept = 3 * one.weights * experiment.keep if experiment.save_every else 0
    disk = one.weights + kept if job.trained is None else 0
    if folder is not None and (folder / job.folder / LOG).is_file():
        train, disk = 0, 0
    if folder is not None and (folder / job.folder / DESCRIPTION).is_file():
        measured = 0
    memory = (one.memory if train else one.weights) + _ROOM
    return Cost(job, train, measured, train / one.train + measured / one.read, memory, disk)


def _key(job: Job) -> str:
    """Models that differ in their seed alone are equally fast."""
    return dataclasses.replace(job.experiment, seed=0).to_toml()


def _kept(folder: Path | None) -> dict[str, Any]:
    path = None if folder is None else folder / PACES
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}


def _keep(known: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(known, indent=1)
    replace_atomically(folder / PACES, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_room(found: Sequence[Cost], folder: Path, processes: int) -> None:
    """Raises `InputError`, with the numbers, where memory or disk do not suffice."""
    largest = sorted((cost.memory for cost in found), reverse=True)[:processes]
    needed, free = sum(largest), free_memory()
    if free is not None and needed > free:
        raise InputError(
            f"{processes} models at a time need about {shown(needed)} of memory and {shown(free)} are free. Give fewer "
            "--processes, or a smaller --scale."
        )
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    needed, free = sum(cost.disk for cost in found), shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"The runs need about {shown(needed)} of disk and {place} has {shown(free)} free. Free some, name another "
            "folder, or give a smaller --scale."
        )


def free_memory() -> int | None:
    """Bytes that are free: of the GPU if there is one, else of the machine; None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def shown(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
