"""Which layers of Transformer-XL need the long memory (arXiv 2007.03356): bits per character by schedule.

    python -m benchmarks.transformer_xl_study [--steps 560] [--seeds 0 1] [--output results/transformer_xl_study.json]

Characters of invented words, broken by stretches that repeat what stood 200 characters before: a long memory sees that
far, short ones do not even through all layers together. A fresh host with Transformer-XL's positions is trained on
continuous streams, one segment a step, the state carried from step to step, once for each schedule and seed; schedules
of one seed see the same text for the same number of steps. Scored is other text, the state carried through it. "copied"
are the characters of repeating stretches, "fresh" the others; "state bytes" are those of one stream.
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig

import mnemic
from mnemic.core.errors import InputError
from mnemic.core.files import replace_atomically
from mnemic.memories.recurrent.transformer_xl import layout

CONSONANTS, VOWELS = "bcdfghjklmnprst", "aeiou"
ALPHABET = " " + CONSONANTS + VOWELS
DISTANCE, SEGMENT, LONG, SHORT = 200, 32, 224, 16
HELD_OUT = 1_000_000  # seeds of held-out text start here
SIZES = {"layers": 8, "width": 64, "heads": 4, "rows": 8, "steps": 560, "held_out": 2048}


def text(length: int, seed: int) -> tuple[str, list[bool]]:
    """`length` characters, and of each whether it is a copy of the one `DISTANCE` before.

    Words of one to three syllables in stretches of 20 to 60 characters; between them copies of 40 to 80.
    """
    rng, characters, copied = random.Random(seed), [], []
    while len(characters) < length:
        fresh = rng.randint(20, 60) if len(characters) >= DISTANCE else DISTANCE
        words = ""
        while len(words) < fresh:
            words += "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 3))) + " "
        characters += words[:fresh]
        copied += [False] * fresh
        for _ in range(rng.randint(40, 80)):
            characters.append(characters[-DISTANCE])
            copied.append(True)
    return "".join(characters[:length]), copied[:length]


def batch(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids (rows, length) int64 and which of them are copied, bool."""
    drawn = [text(length, seed + row) for row in range(rows)]
    places = {character: i for i, character in enumerate(ALPHABET)}
    ids = torch.tensor([[places[c] for c in characters] for characters, _ in drawn])
    return ids, torch.tensor([copied for _, copied in drawn])


def schedules(layers: int) -> dict[str, dict[str, Any]]:
    """Options of the memory by name. A layer of limited range sees the last `SHORT` tokens, and stores no more."""
    two: dict[str, tuple[int, ...]] = {
        kind: layout(kind, min(2, layers), layers, LONG, SHORT)  # pyright: ignore[reportArgumentType]
        for kind in ("interleaved", "last", "first")
    }
    low = layers // 2
    return {
        "all long": {"memory_lengths": (LONG,) * layers},
        "2 interleaved": {"memory_lengths": two["interleaved"]},
        "last 2": {"memory_lengths": two["last"]},
        "first 2": {"memory_lengths": two["first"]},
        "all short": {"memory_lengths": (SHORT,) * layers},
        "low half in range": {
            "memory_lengths": (SHORT,) * low + (LONG,) * (layers - low),
            "ranges": (SHORT,) * low + (None,) * (layers - low),
        },
    }


def build(arguments: argparse.Namespace, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(ALPHABET), hidden_size=arguments.width, intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads, num_key_value_heads=arguments.heads,
        initializer_range=0.05, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return mnemic.attach(config, "transformer-xl", segment=SEGMENT, positions="relative", **options)


def bits(model: Any, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Bits that characters 1 to T of ids (B, T + 1) cost, (B, T), and the state after the last whole segment."""
    output = model(ids[:, :-1], memory_state=state, use_cache=False)
    nats = torch.nn.functional.cross_entropy(output.logits.mT, ids[:, 1:], reduction="none")
    return nats / math.log(2), output.memory_state


def train(model: Any, arguments: argparse.Namespace, seed: int, advance: Callable[[], object]) -> list[float]:
    """Bits per character of the training text at each step, before the step learns from it."""
    steps = arguments.steps
    ids, _ = batch(arguments.rows, steps * SEGMENT + 1, seed * arguments.rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=0.0)
    warm, cool = max(1, steps // 20), max(1, steps // 3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / warm, (steps - i) / cool))
    curve, state = [], None
    model.train()
    for start in range(0, steps * SEGMENT, SEGMENT):
        cost, state = bits(model, ids[:, start : start + SEGMENT + 1], state)
        optimizer.zero_grad()
        cost.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(float(cost.detach().mean()))
        advance()
    return curve


@torch.no_grad()
def score(model: Any, ids: Tensor, copied: Tensor) -> dict[str, float]:
    """Bits per character of held-out ids (B, T): all, the copied ones, the fresh ones."""
    cost, _ = bits(model.eval(), ids)
    copied = copied[:, 1:]
    return {"all": float(cost.mean()), "copied": float(cost[copied].mean()), "fresh": float(cost[~copied].mean())}


def measure(name: str, seed: int, arguments: argparse.Namespace, advance: Callable[[], object]) -> dict[str, Any]:
    options = schedules(arguments.layers)[name]
    started, model = time.perf_counter(), build(arguments, seed, **options)
    curve = train(model, arguments, seed, advance)
    found = score(model, *batch(arguments.rows, arguments.held_out, HELD_OUT))
    every = max(1, arguments.steps // 28)
    means = [sum(curve[i : i + every]) / len(curve[i : i + every]) for i in range(0, len(curve), every)]
    return {
        "schedule": name,
        "seed": seed,
        **options,
        "state_bytes": model.memory.initial_state(1).nbytes,
        "bits": found,
        "curve": {"steps": every, "bits": means},
        "seconds": round(time.perf_counter() - started, 1),
    }


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a schedule: its bytes, mean bits over the seeds, and the bits of each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["schedule"], []).append(row)
    return [
        {
            "schedule": name,
            "state_bytes": mine[0]["state_bytes"],
            **{part: sum(row["bits"][part] for row in mine) / len(mine) for part in ("all", "copied", "fresh")},
            "seeds": [row["bits"]["all"] for row in mine],
        }
        for name, mine in found.items()
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: bits of the training text as training goes, each seed; right: held-out bits by the size of the state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120)
    left, right = figure.subplots(1, 2)
    for number, mean in enumerate(means(rows)):
        color = f"C{number}"
        for row in (r for r in rows if r["schedule"] == mean["schedule"]):
            curve = row["curve"]
            steps = [curve["steps"] * (i + 1) for i in range(len(curve["bits"]))]
            left.plot(steps, curve["bits"], color=color, alpha=0.8)
        right.plot(mean["state_bytes"] / 1024, mean["copied"], "o", color=color, label=mean["schedule"])
    left.set(xlabel="training step", ylabel="bits per character, training text")
    right.set(xlabel="state of one stream, KiB", ylabel="bits per copied character, held out", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    figure.tight_layout()
    replace_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def kept(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier part of the study.

    Raises:
        InputError: they were measured with other settings.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text("utf-8"))
    if found["settings"] != settings:
        raise InputError(
            f"{path} has rows of other settings, {found['settings']}, expected {settings}. Choose another --output."
        )
    return found["rows"]


def main() -> None:
    names = list(schedules(SIZES["layers"]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--schedules", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--add", action="store_true", help="to the rows that the output has; none is measured again")
    parser.add_argument("--output", type=Path, default=Path("results/transformer_xl_study.json"))
    parser.add_argument("--image", type=Path, default=Path("docs/images/transformer_xl_study.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: getattr(arguments, name) for name in (*SIZES, "rate")}
    settings |= {"distance": DISTANCE, "segment": SEGMENT, "long": LONG, "short": SHORT}
    rows = kept(arguments.output, settings) if arguments.add else []
    found = {
        "settings": settings,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"processor": platform.machine(), "threads": 1, "device": "cpu"},
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["schedule"], row["seed"]) for row in rows}
    runs = [(name, seed) for seed in arguments.seeds for name in arguments.schedules if (name, seed) not in done]
    with Progress() as progress:
        task = progress.add_task("training", total=len(runs) * arguments.steps)
        for name, seed in runs:
            progress.update(task, description=f"{name}, seed {seed}")
            rows.append(measure(name, seed, arguments, lambda: progress.advance(task)))
            written = json.dumps(found, indent=1) + "\n"
            replace_atomically(arguments.output, lambda path, content=written: path.write_text(content, "utf-8"))
    plot(rows, arguments.image)
    grid = Table(title="bits per held-out character, mean of the seeds")
    for column in ("schedule", "state bytes", "all", "copied", "fresh", "all, by seed"):
        grid.add_column(column, justify="left" if column == "schedule" else "right")
    for row in means(rows):
        cells = [f"{row[part]:.3f}" for part in ("all", "copied", "fresh")]
        grid.add_row(row["schedule"], f"{row['state_bytes']:,}", *cells, " ".join(f"{x:.3f}" for x in row["seeds"]))
    Console().print(grid)


if __name__ == "__main__":
    main()
