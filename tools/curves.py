"""Loss curves of the runs under results/babilong, as results/babilong/loss.png and in the docs."""

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1] / "results" / "babilong"


def main() -> None:
    figure = Figure(figsize=(8, 4), dpi=120)
    axes = figure.add_subplot()
    for path in sorted(ROOT.glob("*/log.json")):
        history = [e for e in json.loads(path.read_text("utf-8"))["history"] if "loss" in e]
        axes.plot([e["step"] for e in history], [e["loss"] for e in history], label=path.parent.name)
    axes.set(xlabel="step", ylabel="loss of answer and end token", ylim=(0, 1))
    axes.set_title("BABILong qa1: up to 1, 1, 2, 4, 8 segments, 2,000 steps each")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    for path in (ROOT / "loss.png", ROOT.parents[1] / "docs" / "images" / "babilong-loss.png"):
        figure.savefig(path)


if __name__ == "__main__":
    main()
