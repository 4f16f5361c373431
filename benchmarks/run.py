"""Speed of memories against the plain host, as ratios measured side by side in one run.

    python -m benchmarks.run [--width 256] [--layers 4] [--output results/bench.json]

Every contender does the same work in turn, round after round, so that a slow spell of the machine hits all of them;
the ratio of a round is taken within the round, and the median over rounds is reported. Beside it stands the ratio of
counted floating-point operations: the floor for work that is all matrix products.

    train     forward, backward and AdamW step over n segments of T tokens, loss on all tokens
    prefill   n segments of T tokens with a cache, last logits only
    decode    one token at a time, three quarters of a segment from its start

"host" is the model alone on all n * T tokens at once, with its own cache. Packages by others that are installed
(see peers.py) join with a training step, "peer: ...".
"""

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mnemic
from benchmarks import peers
from benchmarks.host import VOCABULARY, plain_llama

OPTIONS: dict[str, dict[str, Any]] = {
    "lm2": {"num_slots": 64},
    "transformer-xl": {"memory_lengths": 128},
    "memoryllm": {"new_states": 32, "blocks": 8},
    "ahn": {"num_sinks": 16},
    "deltanet": {"num_heads": 4},
    "gated-deltanet": {"num_heads": 4},
    "pkm": {"num_keys": 128, "key_dim": 128},
    "memory-layers-at-scale": {"num_keys": 128},
    "memory-decoder": {"model": {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }},
    **{f"titans {form}": {"form": form} for form in ("lmm", "mac", "mag", "mal")},
    "titans lmm, one block": {"form": "lmm", "place": "side", "memory_layers": (1,)},
    "deltanet, one block": {"num_heads": 4, "memory_layers": (1,)},
}  # fmt: skip
"""Settings where the defaults are those of a large model, by name (and what else tells them apart)."""
LEFT_OUT = ("lm2-reference", "titans")
"""Not measured by its name alone: reads whole segments as long as the host is wide; has four forms."""


def default_names() -> list[str]:
    extra = [n for n in OPTIONS if n not in mnemic.memory_names()]
    return [n for n in mnemic.memory_names() if n not in LEFT_OUT] + extra


def options_of(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of a contender; RETRO gets a small database of random text."""
    if name != "retro":
        return OPTIONS.get(name, {})
    from mnemic.memories.knowledge.retro import build_database

    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(VOCABULARY, (64, 1024), generator=generator).tolist()
    database = Path(arguments.folder) / "database"
    build_database(database, texts, 64, progress=False)
    return {"database": str(database)}


def build(name: str, arguments: argparse.Namespace) -> Any:
    host = plain_llama(arguments.width, arguments.layers).to(arguments.device)
    if name == "host" or name.startswith("peer: "):
        return host
    memory = re.split("[ ,]", name)[0]
    return mnemic.attach(host, memory, segment=arguments.segment, preset="default", **options_of(name, arguments))


def workloads(name: str, arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    model = build(name, arguments)
    rows, tokens = arguments.batch, arguments.segment * arguments.segments
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=generator).to(arguments.device)
    if name.startswith("peer: "):
        step = peers.train_step(name.removeprefix("peer: "), model, ids, VOCABULARY, arguments.segment)
        return {"train": step}
    trained = [p for p in model.parameters() if p.requires_grad]

    def without_gradients(work: Callable[[], None]) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            # The counter of operations hangs hooks on every input that needs a gradient, also where none is made.
            for parameter in trained:
                parameter.requires_grad_(False)
            work()
            for parameter in trained:
                parameter.requires_grad_(True)

        return run

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    steps = arguments.segment * 3 // 4

    def train() -> None:
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @without_gradients
    def prefill() -> None:
        model.eval()
        model(ids, use_cache=True, logits_to_keep=1)

    @without_gradients
    def decode() -> None:
        model.eval()
        cache = None
        for i in range(steps):
            cache = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values

    return {"train": train, "prefill": prefill, "decode": decode}


def count_flops(work: Callable[[], None]) -> int:
    # Fused attention kernels are not counted everywhere; as plain matrix products they are.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def seconds(work: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memories", nargs="+", default=default_names())
    for name, default in (
        ("width", 256), ("layers", 4), ("batch", 4), ("segment", 128), ("segments", 4), ("rounds", 7),
        ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results/bench.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="mnemic-bench-") as arguments.folder:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    names = ["host", *arguments.memories]
    names += [f"peer: {name}" for name in peers.available()]
    works = {name: workloads(name, arguments) for name in names}
    kinds = list(works["host"])
    flops = {name: {kind: count_flops(work) for kind, work in works[name].items()} for name in names}
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in works[name]} for name in names}
    for index in track(range(arguments.rounds + 1), description="rounds"):
        for kind in kinds:
            for name in (n for n in names if kind in works[n]):
                taken = seconds(works[name][kind], arguments.device)
                if index:  # the first round warms up
                    times[name][kind].append(taken)

    table = Table(title=f"against the plain host, width {arguments.width}, {arguments.layers} layers")
    for column in ("memory", "work", "time ratio", "FLOP ratio", "time / FLOP", "host seconds"):
        table.add_column(column, justify="left" if column in ("memory", "work") else "right")
    rows = []
    for name in names[1:]:
        for kind in times[name]:
            pairs = zip(times[name][kind], times["host"][kind], strict=True)
            ratio = statistics.median(mine / host for mine, host in pairs)
            counted = flops[name][kind] / flops["host"][kind]
            host = statistics.median(times["host"][kind])
            rows.append(
                {"memory": name, "work": kind, "time_ratio": ratio, "flop_ratio": counted, "host_seconds": host}
            )
            table.add_row(name, kind, f"{ratio:.2f}", f"{counted:.2f}", f"{ratio / counted:.2f}", f"{host:.4f}")
    Console().print(table)
    record = {
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("folder", "output")},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mnemic": mnemic.__version__,
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": arguments.device},
        "rows": rows,
        "seconds": times,
        "flops": flops,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"raw numbers: {arguments.output}")


if __name__ == "__main__":
    main()
