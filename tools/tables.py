"""Tables of results for README and docs, made from the raw numbers under results/: demo, bench, babilong or aligned."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1] / "results"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def read(path: str) -> Any:
    return json.loads((ROOT / path).read_text("utf-8"))


def demo() -> str:
    """Accuracy where the fact is two or more segments away, by length of the input."""
    found = read("demo/demo.json")
    trained = found["trained_segments"]
    rows = []
    for name, one in found["memories"].items():
        cells = []
        for segments in (trained, 2 * trained, 4 * trained, 8 * trained):
            counts = [c for d, c in one["scores"][str(segments)].items() if int(d) >= 2]
            cells.append(f"{sum(c[0] for c in counts) / sum(c[1] for c in counts):.1%}")
        rows.append([name, f"{one['parameters']:,}", f"{one['state_bytes']:,}", *cells])
    rows.append(["chance", "", "", *[f"{found['chance']:.1%}"] * 4])
    lengths = [f"{f}x ({f * trained} segments)" for f in (1, 2, 4, 8)]
    return table(["memory", "parameters", "state bytes", *lengths], rows)


def bench() -> str:
    """Time and floating-point operations as ratios to the plain host."""
    rows = [
        [
            f"{row['memory']}, {row['work']}",
            f"{row['time_ratio']:.2f}",
            f"{row['flop_ratio']:.2f}",
            f"{row['time_ratio'] / row['flop_ratio']:.2f}",
        ]
        for row in read("bench.json")["rows"]
    ]
    return table(["memory, work", "time", "operations", "time / operations"], rows)


def babilong(name: str = "results-babilong.json") -> str:
    """Accuracy on BABILong qa1 by length."""
    rows, lengths = [], []
    for path in sorted((ROOT / "babilong").glob(f"*/{name}")):
        scores = json.loads(path.read_text("utf-8"))["scores"]
        log = json.loads((path.parent / "log.json").read_text("utf-8"))
        lengths = [s["length"] for s in scores]
        size = sum(part["total"] for part in log["parameters"].values())
        cells = [f"{s['official']['accuracy']:.1%} ± {s['official']['interval']:.1%}" for s in scores]
        rows.append([path.parent.name, f"{size:,}", f"{log['seconds'] / 60:.0f}", *cells])
    return table(["memory", "parameters", "minutes of training", *[n.upper() for n in lengths]], rows)


def aligned() -> str:
    """The same at lengths that put the question where it stood in training."""
    return babilong("results-babilong-aligned.json")


if __name__ == "__main__":
    print({"demo": demo, "bench": bench, "babilong": babilong, "aligned": aligned}[sys.argv[1]]())
