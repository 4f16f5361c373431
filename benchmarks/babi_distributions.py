"""bAbI: how answers, story lengths and distances of supporting facts of generated stories differ from the release.

    python -m benchmarks.babi_distributions DATA [--questions 2000] [--output results/babi_distributions.json]

DATA is a folder with babi-v1.2/. Released questions are those of the training and test files of "en" (2,000 a task).
For each task and each of

    answers   the answer, as a string
    facts     facts before a question
    back      how many facts back a supporting fact is (1: right before the question), each of them counted

the distance of two distributions is half the sum of the absolute differences of their shares: 0 is equal, 1 disjoint.
"chance" is the distance between two generated samples of the same size with other seeds: what would be left if the
released files came from our generator.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mnemic.benchmarks import babi

WHAT = {"answers": "answer", "facts": "facts before a question", "back": "facts back to a supporting fact"}
SHOWN = 12  # bars of a panel, at most


def distributions(samples: Sequence[babi.BabiSample]) -> dict[str, dict[str, float]]:
    """Shares by what is counted."""
    counted = {
        "answers": Counter(sample.answer for sample in samples),
        "facts": Counter(str(len(sample.facts)) for sample in samples),
        "back": Counter(str(len(sample.facts) - fact) for sample in samples for fact in sample.supporting),
    }
    return {
        what: {key: round(count / counts.total(), 5) for key, count in counts.most_common()}
        for what, counts in counted.items()
    }


def distance(one: dict[str, float], other: dict[str, float]) -> float:
    return round(math.fsum(abs(one.get(key, 0) - other.get(key, 0)) for key in one.keys() | other.keys()) / 2, 4)


def compare(data: Path, task: str, questions: int) -> dict[str, Any]:
    released = [sample for split in ("train", "test") for sample in babi.read(data, task, split)]
    found = distributions(released)
    own, again = (distributions(babi.generate(task, seed, "train", questions)) for seed in (0, 1))
    return {
        "released": found,
        "generated": own,
        "distance": {what: distance(found[what], own[what]) for what in WHAT},
        "chance": {what: distance(own[what], again[what]) for what in WHAT},
    }


def plot(tasks: dict[str, Any], what: str, path: Path) -> None:
    figure = Figure(figsize=(15, 11), dpi=100)
    for number, (task, one) in enumerate(tasks.items(), 1):
        axes = figure.add_subplot(4, 5, number)
        released, generated = one["released"][what], one["generated"][what]
        numeric = what != "answers"
        keys = sorted(released.keys() | generated.keys(), key=int) if numeric else list(released)[:SHOWN]
        if numeric and len(keys) > SHOWN:
            # Long tails are drawn in equal steps.
            step = math.ceil(int(keys[-1]) / SHOWN)
            released, generated = (_binned(shares, step) for shares in (released, generated))
            keys = [str(start) for start in range(1, int(keys[-1]) + 1, step)]
        for shift, shares, label in ((-0.2, released, "released"), (0.2, generated, "generated")):
            axes.bar([i + shift for i in range(len(keys))], [shares.get(k, 0) for k in keys], 0.4, label=label)
        axes.set_title(f"{task}, distance {one['distance'][what]:.3f} (chance {one['chance'][what]:.3f})", fontsize=8)
        axes.set_xticks(range(len(keys)), keys, fontsize=6, rotation=60 if what == "answers" else 0)
        axes.tick_params(axis="y", labelsize=6)
        if number == 1:
            axes.legend(fontsize=7)
    figure.suptitle(f"bAbI: {WHAT[what]}, share of questions; long tails begin at the number shown")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _binned(shares: dict[str, float], step: int) -> dict[str, float]:
    bins: dict[str, float] = {}
    for key, share in shares.items():
        start = str((int(key) - 1) // step * step + 1)
        bins[start] = bins.get(start, 0.0) + share
    return bins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("results/babi_distributions.json"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    tasks = {
        task: compare(arguments.data, task, arguments.questions)
        for task in track(babi.GENERATED_TASKS, description="comparing")
    }
    found = {"questions": arguments.questions, "seeds": [0, 1], "tasks": tasks}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for what in WHAT:
        plot(tasks, what, arguments.images / f"babi-{what}.png")
    grid = Table(title="distance to the release (chance)")
    for column in ("task", *WHAT):
        grid.add_column(column, justify="left" if column == "task" else "right")
    for task, one in tasks.items():
        grid.add_row(task, *(f"{one['distance'][what]:.3f} ({one['chance'][what]:.3f})" for what in WHAT))
    Console().print(grid)


if __name__ == "__main__":
    main()
