"""Serving: speed with many sessions against one at a time, waiting times, and cost after a long history.

    python -m benchmarks.serving [--parts throughput steps history http] [--output results/serving.json]

A small Llama with a memory, float32, greedy answers. Parts:

    throughput  works given to `mnemic.serving.engine.Engine` in this process, without HTTP. In every round, one after
                another: some sessions one at a time, then all together, then all together while one more work feeds a
                document. tokens_per_second counts tokens of answers from the first submission to the last end,
                tokens_per_processor_second by the processor's time of this process (all threads), which neighbours on
                the machine disturb less; speedups are together against one at a time of the same round.
                first_token: seconds from submission to the first token; gap: between tokens of an answer.
    http        the same rounds over HTTP, with sessions that are stored; see `benchmarks.serving_http`. The processor's
                time is the server's.
    steps       where the time of one decode step of all sessions goes: the model's forward, and the rest of the engine
    history     after so many tokens, the time of a token of an answer and the bytes of the session: state_bytes in
                memory, saved_bytes in a store. Beside it the same host without memory and with transformers' own cache
                of keys and values; see `benchmarks.serving_history`.

Numbers of rounds are medians; ranges are the least and the most. Ratios of histories are medians over pairs of turns,
with their 95% interval. A part that is not run keeps what --output holds of it.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.serving_common import build, follow, ids, prompt_of, spread, summary, waits
from benchmarks.serving_history import history
from benchmarks.serving_http import http
from mnemic.serving.engine import Engine
from mnemic.serving.requests import Limits, SamplingParams, Work

PARTS = ("throughput", "steps", "history", "http")


async def together(engine: Engine, arguments: argparse.Namespace, sessions: int, alone: bool) -> dict[str, float]:
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens)
    works = [Work(prompt=prompt_of(arguments, seed), sampling=sampling) for seed in range(sessions)]
    began, worked = time.perf_counter(), time.process_time()
    if alone:
        found = [await follow(engine, work) for work in works]
    else:
        found = await asyncio.gather(*(follow(engine, work) for work in works))
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    return {
        "tokens_per_second": sessions * arguments.tokens / seconds,
        "tokens_per_processor_second": sessions * arguments.tokens / worked,
        **waits([times for times, _ in found]),
    }


async def throughput(model: Any, arguments: argparse.Namespace, bar: Progress) -> dict[str, Any]:
    task = bar.add_task("throughput", total=3 * arguments.rounds)
    rounds: dict[str, list[dict[str, float]]] = {"one_at_a_time": [], "together": [], "with_document": []}
    read: list[float] = []
    engine = Engine(model, limits=Limits(max_rows=arguments.sessions + 1)).start()
    await together(engine, arguments, 2, False)
    for _ in range(arguments.rounds):
        rounds["one_at_a_time"].append(await together(engine, arguments, arguments.alone, True))
        bar.advance(task)
        rounds["together"].append(await together(engine, arguments, arguments.sessions, False))
        bar.advance(task)
        document = Work(prompt=ids(arguments.document, 99), sampling=SamplingParams(max_tokens=0))
        async with engine.submit(document):
            before, began = engine.stats().tokens_read, time.perf_counter()
            rounds["with_document"].append(await together(engine, arguments, arguments.sessions, False))
            others = arguments.sessions * (arguments.tokens + arguments.prompt + 8)
            read.append((engine.stats().tokens_read - before - others) / (time.perf_counter() - began))
        bar.advance(task)
    await engine.stop()
    found: dict[str, Any] = {kind: summary(each) for kind, each in rounds.items()}
    found["with_document"]["document_tokens_per_second"] = spread(read)
    for name, kind in (("speedup", "tokens_per_second"), ("processor_speedup", "tokens_per_processor_second")):
        pairs = zip(rounds["together"], rounds["one_at_a_time"], strict=True)
        found[name] = spread([a[kind] / b[kind] for a, b in pairs])
    return found


async def steps(model: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a decode step, medians, while all sessions make answers."""
    records, inside = [], []
    forward = type(model).forward

    def timed(self: Any, input_ids: torch.Tensor, **given: Any) -> Any:
        began = time.perf_counter()
        result = forward(self, input_ids, **given)
        inside.append((tuple(input_ids.shape), time.perf_counter() - began))
        return result

    type(model).forward = timed
    try:
        engine = Engine(model, limits=Limits(max_rows=arguments.sessions), observe=records.append).start()
        await together(engine, arguments, arguments.sessions, False)
        await engine.stop()
    finally:
        type(model).forward = forward
    whole = [r.seconds for r in records if r.kind == "decode" and r.rows == arguments.sessions]
    model_part = [s for shape, s in inside if shape == (arguments.sessions, 1)]
    step, part = 1e3 * statistics.median(whole), 1e3 * statistics.median(model_part)
    return {"step_ms": round(step, 3), "forward_ms": round(part, 3), "engine_ms": round(step - part, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="lm2")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--segment", type=int, default=64)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--alone", type=int, default=8, help="sessions measured one at a time")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument(
        "--prompt", type=int, default=16, help="tokens of the shortest prompt; others have up to 16 more"
    )
    parser.add_argument("--document", type=int, default=1_000_000)
    parser.add_argument("--histories", type=int, nargs="+", default=[1024, 1_024_000])
    parser.add_argument("--plain-histories", type=int, nargs="+", default=[1024, 10_240, 102_400])
    parser.add_argument("--pairs", type=int, default=200, help="of turns after a short and a long history")
    parser.add_argument("--server-threads", type=int, default=0, help="of the server over HTTP; 0 for torch's default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/serving.json"))
    arguments = parser.parse_args()
    arguments.plain_histories, arguments.histories = sorted(arguments.plain_histories), sorted(arguments.histories)
    model = build(arguments)
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.is_file() else {}
    with Progress(console=Console(stderr=True)) as bar:
        parts = {
            "throughput": lambda: throughput(model, arguments, bar),
            "steps": lambda: steps(model, arguments),
            "history": lambda: history(model, arguments, bar),
            "http": lambda: http(arguments, bar),
        }
        for name in arguments.parts:
            load = os.getloadavg()
            found[name] = {**asyncio.run(parts[name]()), "run": described(arguments, load)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: found[name] for name in PARTS if name in found}, indent=1)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    show({name: found[name] for name in arguments.parts})


def described(arguments: argparse.Namespace, load: tuple[float, ...]) -> dict[str, Any]:
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "parts")}
    return {
        "settings": settings, "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(), "load_before": load, "load_after": os.getloadavg(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    console, names = Console(), ("first_token_p50", "first_token_p95", "gap_p50", "gap_p95")
    for part in ("throughput", "http"):
        if part not in found:
            continue
        grid = Table(title=f"{part}, medians over rounds")
        for column in ("", "tokens/s", "first token p50", "p95", "gap p50", "p95"):
            grid.add_column(column, justify="left" if not column else "right")
        for kind in ("one_at_a_time", "together", "with_document"):
            one = found[part][kind]
            cells = [f"{1e3 * one[name]['median']:.1f} ms" for name in names]
            grid.add_row(kind, f"{one['tokens_per_second']['median']:.0f}", *cells)
        console.print(grid, f"speedup {found[part]['speedup']}")
    for part in ("steps", "history"):
        if part in found:
            console.print(part, {k: v for k, v in found[part].items() if k != "run"})


if __name__ == "__main__":
    main()
