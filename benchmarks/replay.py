"""Memory that training takes, with replay and without, as the number of segments grows.

    python -m benchmarks.replay [--memories lm2 rmt] [--output results/replay.json] [--image docs/images/replay.png]

A small Llama with a memory; loss on all tokens, forward and backward, float32. Every measurement is a process of its
own, which first trains on a short row: gradients then have their place and are not counted. Numbers of one step:

    peak      most bytes of tensors made within the step that live at the same time, every operation of the forward
              and backward pass counted (on CUDA: `max_memory_allocated` less what was there before)
    resident  how far the process grew meanwhile, as the system sees it: its high-water mark less what it had before,
              with the C library told to give freed blocks back (MALLOC_MMAP_THRESHOLD_). It has the nodes of the
              autograd graph too, which replay does not save
    seconds   time of the processor, with one thread, in a process that allocates as usual; the clock's on CUDA

"peak" holds activations and, with replay, the states between segments.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import mnemic
from benchmarks.host import plain_llama

VOCABULARY = 512
OPTIONS: dict[str, dict[str, Any]] = {"lm2": {"num_slots": 16}, "rmt": {"num_tokens": 8}, "armt": {"num_tokens": 8}}
SIZES = {"width": 256, "layers": 4, "batch": 2, "segment": 128}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, until they are freed. peak: the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What comes in was there before, or is known.
        old = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in old and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def build(memory: str, arguments: argparse.Namespace) -> Any:
    host = plain_llama(arguments.width, arguments.layers, vocabulary=VOCABULARY).to(arguments.device)
    options = OPTIONS.get(memory, {})
    return mnemic.attach(host, memory, segment=arguments.segment, preset="default", **options).train()


def measure(what: str, memory: str, segments: int, replay: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """One step of each kind, in this process. what: "peak", "resident" and "seconds"; on CUDA "both"."""
    torch.set_num_threads(1)
    model = build(memory, arguments)
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.batch, segments * arguments.segment)
    ids = torch.randint(VOCABULARY, shape, generator=generator).to(arguments.device)

    def step(ids: torch.Tensor) -> None:
        model(ids, labels=ids, use_cache=False, replay=replay).loss.backward()

    step(ids[:1, : arguments.segment + 8])
    if what == "both":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        step(ids)
        torch.cuda.synchronize()
        return {
            "seconds": time.perf_counter() - started,
            "peak": torch.cuda.max_memory_allocated() - before,
        }
    if what == "seconds":
        started = time.process_time()
        step(ids)
        return {"seconds": time.process_time() - started}
    if what == "resident":
        before = _forget_high_water()
        step(ids)
        return {"resident": _status("VmHWM") - before}
    with LiveBytes() as counter:
        step(ids)
    return {"peak": counter.peak}


def _forget_high_water() -> int:
    """Let the high-water mark of this process start from what it has now; returns that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def growth(rows: list[dict[str, Any]], memory: str, replay: bool, what: str = "peak") -> list[float]:
    """`what` by the number of segments, in units of the smallest number's."""
    mine = sorted((r["segments"], r[what]) for r in rows if r["memory"] == memory and r["replay"] == replay)
    return [value / mine[0][1] for _, value in mine]


def plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120)
    axes = figure.add_subplot()
    for color, memory in zip(("tab:blue", "tab:orange", "tab:green"), found["settings"]["memories"], strict=False):
        for replay, style in ((False, "--"), (True, "-")):
            rows = [r for r in found["rows"] if r["memory"] == memory and r["replay"] == replay]
            label = f"{memory}, {'replay' if replay else 'full back-propagation'}"
            axes.plot(
                [r["segments"] for r in rows], [r["peak"] / 2**20 for r in rows], style, marker="o", color=color,
                label=label,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(found["settings"]["segments"], [str(n) for n in found["settings"]["segments"]])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel=f"segments of {found['settings']['segment']} tokens", ylabel="peak of a training step, MiB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memories", nargs="+", default=["lm2", "rmt"])
    parser.add_argument("--segments", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results/replay.json"))
    parser.add_argument("--image", type=Path, default=Path("docs/images/replay.png"))
    parser.add_argument(
        "--one", nargs=4, metavar=("WHAT", "MEMORY", "SEGMENTS", "REPLAY"), help="measure this, print it"
    )
    arguments = parser.parse_args()
    if arguments.one:
        what, memory, segments, replay = arguments.one
        print(json.dumps(measure(what, memory, int(segments), replay == "1", arguments)))
        return
    rows = []
    sizes = [word for name in SIZES for word in (f"--{name}", str(getattr(arguments, name)))]
    works = [(m, n, r) for m in arguments.memories for n in arguments.segments for r in (False, True)]
    for memory, segments, replay in track(works, description="measuring"):
        row: dict[str, Any] = {"memory": memory, "segments": segments, "replay": replay}
        for what in ("both",) if arguments.device == "cuda" else ("peak", "resident", "seconds"):
            command = [sys.executable, "-m", "benchmarks.replay", *sizes, "--device", arguments.device]
            command += ["--one", what, memory, str(segments), str(int(replay))]
            given = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if what == "resident" else {})}
            row |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=given).stdout)
        rows.append(row)
    settings = {n: v for n, v in vars(arguments).items() if n not in ("one", "output", "image")}
    found = {
        "settings": settings,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"processor": platform.machine(), "threads": 1, "device": arguments.device},
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, arguments.image)
    report(found)


def report(found: dict[str, Any]) -> None:
    grid = Table(title="one training step")
    for column in ("memory", "segments", "replay", "peak MiB", "resident MiB", "seconds"):
        grid.add_column(column, justify="right" if column != "memory" else "left")
    for row in found["rows"]:
        grid.add_row(
            row["memory"], str(row["segments"]), "yes" if row["replay"] else "no", f"{row['peak'] / 2**20:.1f}",
            f"{row.get('resident', 0) / 2**20:.1f}", f"{row['seconds']:.2f}",
        )  # fmt: skip
    Console().print(grid)
    for memory in found["settings"]["memories"]:
        parts = [f"{'replay' if r else 'full'} x{growth(found['rows'], memory, r)[-1]:.3f}" for r in (False, True)]
        Console().print(f"{memory}: peak from the fewest to the most segments: {', '.join(parts)}")


if __name__ == "__main__":
    main()
