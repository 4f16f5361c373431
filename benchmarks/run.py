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
import statistics
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
from transformers import AutoModelForCausalLM, LlamaConfig

import mnemic
from benchmarks import peers

VOCABULARY = 2048
OPTIONS: dict[str, dict[str, Any]] = {
    "lm2": {"num_slots": 64, "preset": "default"},
    "rmt": {"num_tokens": 16},
}
"""Settings where the defaults are those of a large model."""
LEFT_OUT = ("lm2-reference",)
"""Reads whole segments as long as the host is wide."""


def build(name: str, arguments: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 32,
        num_key_value_heads=arguments.width // 32,
        max_position_embeddings=8192,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    host = AutoModelForCausalLM.from_config(config).to(arguments.device)
    if name == "host" or name.startswith("peer: "):
        return host
    return mnemic.attach(host, name, segment=arguments.segment, **OPTIONS.get(name, {"preset": "default"}))


def workloads(name: str, arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    model = build(name, arguments)
    rows, tokens = arguments.batch, arguments.segment * arguments.segments
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=generator).to(arguments.device)
    if name.startswith("peer: "):
        step = peers.train_step(name.removeprefix("peer: "), model, ids, VOCABULARY, arguments.segment)
        return {"train": step}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    steps = arguments.segment * 3 // 4

    def train() -> None:
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def prefill() -> None:
        model.eval()
        model(ids, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
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
    parser.add_argument("--memories", nargs="+", default=[n for n in mnemic.memory_names() if n not in LEFT_OUT])
    for name, default in (
        ("width", 256), ("layers", 4), ("batch", 4), ("segment", 128), ("segments", 4), ("rounds", 7),
        ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results/bench.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

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
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
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
