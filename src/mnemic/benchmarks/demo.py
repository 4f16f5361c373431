"""The demonstration: a memory learns to carry a fact over segments, is measured, saved, and asked in a new process.

Everything is made on the spot: the task is generated, the models have about 40,000 parameters, and nothing is
fetched. The three models have equal parameters, see equal tokens, and differ only in the memory.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..core.errors import MissingExtraError
from ..hosts import load, parameter_report
from . import runs
from .building import build
from .demo_asked import ask_shipped
from .distances import Score, by_distance
from .experiment import Experiment
from .recall import RecallTask
from .token_cell import TokenCell

TASK = RecallTask(segment_length=8)
TRAINED_SEGMENTS = 4
FACTORS = (1, 2, 4, 8)
MEMORIES: dict[str, dict[str, Any]] = {"lm2": {"num_slots": 16}, "rmt": {"num_tokens": 4}, "none": {}}
EXPERIMENT = Experiment(
    task="recall",
    host_options={
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.04,
        "tie_word_embeddings": False,
    },
    segment=TASK.segment_length,
    least_segments=2,
    most_segments=(TRAINED_SEGMENTS,),
    steps=1000,
    batch_size=64,
    learning_rate=1e-3,
    weight_decay=0.0,
    schedule="constant_with_warmup",
)


def run(folder: Path, *, quick: bool = False, threads: int = 1) -> dict[str, Any]:
    """Train, measure, plot, save and resume; prints as it goes.

    Args:
        folder: where runs, `demo.json`, `accuracy.png` and `alice.mnemic` go.
        quick: a few steps only, to see that everything runs; the accuracies mean nothing then.

    Returns: what `demo.json` holds.
    """
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    asked = ask_shipped(console, lengths=("1k",)) if quick else ask_shipped(console)
    base = replace(EXPERIMENT, steps=20, log_every=10) if quick else EXPERIMENT
    lm2 = replace(base, memory="lm2", memory_options=MEMORIES["lm2"])
    size = sum(part["total"] for part in parameter_report(build(lm2)[0]).values())
    sample = TASK.batch(1, torch.Generator().manual_seed(3), segments=TRAINED_SEGMENTS).input_ids[0]
    console.print(
        "\n[bold]The task.[/] One fact stands in the first segment, a question at the end of the last. Each segment of "
        f"{TASK.segment_length} words is read\nalone, so only a memory can bring the answer along "
        f"(chance: {TASK.chance:.1%}). A sample:\n\n  {TASK.decode(sample)}\n\n"
        "[bold]Steps[/], on 2 idle cores: train lm2 (about 40 s), rmt (30 s), the host alone (15 s), measuring each "
        "(3 s); plot, save and\nresume a stream (15 s).\n"
    )
    results: dict[str, Any] = {
        "shipped": asked,
        "chance": TASK.chance,
        "trained_segments": TRAINED_SEGMENTS,
        "memories": {},
    }
    for name, options in MEMORIES.items():
        experiment = replace(base, memory=name, memory_options=options, parameters=size)
        where = folder / ("quick" if quick else "runs") / name
        console.print(f"[bold]Training {name}[/] for {experiment.steps} steps on 2 to {TRAINED_SEGMENTS} segments ...")
        log = runs.run(experiment, where)
        model = load(where)
        lengths = [TRAINED_SEGMENTS * f for f in FACTORS]
        cells = {n: TokenCell("recall", str(n), 1, replace(TASK, segments=n)) for n in lengths}
        scores = {n: by_distance(model, cell, 1024) for n, cell in cells.items()}
        results["memories"][name] = {
            "parameters": sum(part["total"] for part in log["parameters"].values()),
            "seconds": log["seconds"],
            "state_bytes": _state_bytes(model),
            "scores": {n: {d: [s.correct, s.count] for d, s in by.items()} for n, by in scores.items()},
        }
        results["versions"] = log["versions"]
    results["settings"] = base.to_toml()
    (folder / "demo.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    console.print(_table(results))
    plot(results, folder / "accuracy.png")
    console.print(f"accuracy by distance: {folder / 'accuracy.png'}\n")
    results["answer"] = _stream(console, folder, folder / ("quick" if quick else "runs") / "lm2")
    return results


def far(results: dict[str, Any], memory: str, segments: int) -> Score:
    """Accuracy where the fact is two or more segments away."""
    by = {int(d): s for d, s in results["memories"][memory]["scores"][segments].items()}
    return Score(sum(s[0] for d, s in by.items() if d >= 2), sum(s[1] for d, s in by.items() if d >= 2))


def _table(results: dict[str, Any]) -> Table:
    widest = max(far(results, n, f * TRAINED_SEGMENTS).interval for n in results["memories"] for f in FACTORS)
    table = Table(
        title="Accuracy where the fact is two or more segments away",
        caption=f"1x is the trained length of {TRAINED_SEGMENTS} segments; 95% intervals at most ± {widest:.1%}",
    )
    for column in (
        "memory",
        "parameters",
        "state bytes",
        *(f"{f}x" for f in FACTORS),
    ):
        table.add_column(column, justify="left" if column == "memory" else "right")
    for name, found in results["memories"].items():
        cells = [far(results, name, f * TRAINED_SEGMENTS) for f in FACTORS]
        shown = [f"{s.accuracy:.1%}" for s in cells]
        table.add_row(name, f"{found['parameters']:,}", f"{found['state_bytes']:,}", *shown)
    table.add_row("chance", "", "", *[f"{results['chance']:.1%}"] * len(FACTORS))
    return table


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy by distance of the fact, on the longest input; PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Plots need matplotlib: pip install 'mnemic[plots]'.") from error
    figure = Figure(figsize=(7, 4), dpi=150)
    axes = figure.add_subplot()
    octaves = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
    for name, found in results["memories"].items():
        pooled = [_pool(found["scores"], low, high) for low, high in octaves]
        axes.errorbar(
            range(len(octaves)),
            [s.accuracy for s in pooled],
            yerr=[s.interval for s in pooled],
            marker="o",
            markersize=4,
            capsize=3,
            label=name,
        )
    axes.axhline(results["chance"], color="grey", linestyle=":", label="chance")
    axes.axvspan(-0.3, 2.3, color="grey", alpha=0.12, label="distances seen in training")
    axes.set_xticks(range(len(octaves)), labels=[f"{a}-{b}" if a < b else f"{a}" for a, b in octaves])
    axes.set(xlabel="segments between fact and question", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_title("Cross-segment recall at equal parameters and tokens, inputs of 4 to 32 segments")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.14))
    figure.tight_layout()
    figure.savefig(path)


def _pool(scores: dict[Any, dict[Any, list[int]]], low: int, high: int) -> Score:
    """All answers about facts that are `low` to `high` segments away, over all lengths."""
    counts = [c for by in scores.values() for d, c in by.items() if low <= int(d) <= high]
    return Score(sum(c[0] for c in counts), sum(c[1] for c in counts))


def _state_bytes(model: Any) -> int:
    return model.memory.initial_state(1).nbytes


def _stream(console: Console, folder: Path, model_folder: Path) -> dict[str, str]:
    """Feed a stream, save it, and answer from it in a new process."""
    fact, value = "Mary", "kitchen"
    story = f"the rain fell {fact} {value} and nobody said a word and rain fell the word said nobody and a rain fell"
    question = f"? {fact}"
    path = folder / "alice.mnemic"
    model = load(model_folder)
    stream = model.stream(tokenizer=TASK.tokenizer())
    stream.feed(story)
    stream.save(path)
    console.print(f"[bold]A stream.[/] Fed: {story!r}")
    console.print(f"Saved to {path} ({path.stat().st_size:,} bytes). A new process asks {question!r} ...")
    command = [sys.executable, "-m", "mnemic", "stream", str(model_folder), "--load", str(path), "--ask", question]
    # It would read its standard input as text to feed; there is none.
    done = subprocess.run(
        [*command, "--max-new-tokens", "1"], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    answer = done.stdout.strip()
    console.print(f"It answers: [bold]{answer}[/] (the fact was {value!r}, {stream.tokens_seen} words before)\n")
    return {"expected": value, "answer": answer}
