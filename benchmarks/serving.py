"""The batching engine: speed with many sessions against one at a time, waiting times, and cost after a long history.

    python -m benchmarks.serving [--sessions 64] [--histories 1024 102400] [--output results/serving.json]

A small Llama with a memory, float32, greedy answers. Works are given to `mnemic.serving.engine.Engine` in this process,
all at once; there is no HTTP. Parts:

    throughput  in every round, one after another: some sessions one at a time, then all together, then all together
                while one more work feeds a document. tokens_per_second counts tokens of answers from the first
                submission to the last end, tokens_per_processor_second by the processor's time of this process (all
                threads), which neighbours on the machine disturb less; speedups are together against one at a time of
                the same round.
                first_token: seconds from submission to the first token; gap: between tokens of an answer.
    steps       where the time of one decode step of all sessions goes: the model's forward, and the rest of the engine
    history     after so many tokens, processor time per token of an answer (one session, whole segments, so that every
                commit counts) and bytes of the session: state_bytes in memory, saved_bytes in a store. Beside it the
                same host without memory and with transformers' own cache of keys and values. That cache is filled with
                random numbers instead of by reading, which changes no cost of decoding.

Numbers of rounds are medians; ranges are the least and the most.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import DynamicCache

import mnemic
from benchmarks.host import plain_llama
from mnemic.serving.engine import Engine
from mnemic.serving.requests import Limits, SamplingParams, Token, Work

VOCABULARY = 512
OPTIONS: dict[str, dict[str, Any]] = {"lm2": {"num_slots": 16}, "rmt": {"num_tokens": 8}, "armt": {"num_tokens": 8}}


def build(arguments: argparse.Namespace) -> Any:
    host = plain_llama(arguments.width, arguments.layers, vocabulary=VOCABULARY).eval()
    options = OPTIONS.get(arguments.memory, {})
    return mnemic.attach(host, arguments.memory, segment=arguments.segment, preset="default", **options)


def ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


async def follow(engine: Engine, work: Work) -> tuple[list[float], Any]:
    """Seconds from submission to each token; and the last event."""
    began, times, event = time.perf_counter(), [], None
    async with engine.submit(work) as answer:
        async for event in answer:
            if isinstance(event, Token):
                times.append(time.perf_counter() - began)
    return times, event


async def together(engine: Engine, arguments: argparse.Namespace, sessions: int, alone: bool) -> dict[str, float]:
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens)
    works = [Work(prompt=ids(arguments.prompt + seed % 17, seed), sampling=sampling) for seed in range(sessions)]
    began, worked = time.perf_counter(), time.process_time()
    if alone:
        found = [await follow(engine, work) for work in works]
    else:
        found = await asyncio.gather(*(follow(engine, work) for work in works))
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    firsts = [times[0] for times, _ in found]
    gaps = [b - a for times, _ in found for a, b in pairwise(times)]
    return {
        "tokens_per_second": sessions * arguments.tokens / seconds,
        "tokens_per_processor_second": sessions * arguments.tokens / worked,
        "first_token_p50": quantile(firsts, 0.5),
        "first_token_p95": quantile(firsts, 0.95),
        "gap_p50": quantile(gaps, 0.5),
        "gap_p95": quantile(gaps, 0.95),
        "gap_max": max(gaps),
    }


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


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


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    return {name: spread([one[name] for one in rounds]) for name in rounds[0]}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 5), "least": round(min(values), 5), "most": round(max(values), 5),
    }  # fmt: skip


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


async def history(model: Any, arguments: argparse.Namespace, bar: Progress) -> dict[str, Any]:
    reading = bar.add_task("reading histories", total=sum(arguments.histories))
    streams = {}
    for count in arguments.histories:
        streams[count] = model.stream()
        for start in range(0, count, 8192):
            piece = ids(min(8192, count - start), start)
            streams[count].feed(piece)
            bar.advance(reading, len(piece))
    host = plain_llama(arguments.width, arguments.layers, vocabulary=VOCABULARY).eval()
    new, rounds = arguments.segment * 2, 5 * arguments.rounds
    measuring = bar.add_task("cost after a history", total=2 * rounds * len(streams))
    times: dict[str, dict[int, list[float]]] = {kind: {n: [] for n in streams} for kind in ("memory", "key_values")}
    sizes: dict[str, dict[int, dict[str, int]]] = {"memory": {}, "key_values": {}}
    engine = Engine(model).start()
    sampling = SamplingParams(temperature=0, max_tokens=new)
    for _ in range(rounds):
        for count, stream in streams.items():
            began = time.process_time()
            _, last = await follow(engine, Work(prompt=[], sampling=sampling, stream=stream))
            times["memory"][count].append((time.process_time() - began) / new)
            after = last.stream
            sizes["memory"][count] = {"state_bytes": after.state_bytes, "saved_bytes": len(after.to_bytes())}
            bar.advance(measuring)
        for count in streams:
            seconds, size = decode_plain(host, count, new // 4)
            times["key_values"][count].append(seconds)
            sizes["key_values"][count] = {"state_bytes": size}
            bar.advance(measuring)
    await engine.stop()
    found: dict[str, Any] = {}
    for kind, each in times.items():
        medians = [statistics.median(values) for values in each.values()]
        bytes_held = [sizes[kind][n]["state_bytes"] for n in each]
        found[kind] = {
            "after": {n: {"ms_per_token": spread([1e3 * t for t in each[n]]), **sizes[kind][n]} for n in each},
            "time_last_to_first": round(medians[-1] / medians[0], 4),
            "bytes_last_to_first": round(bytes_held[-1] / bytes_held[0], 4),
        }
    return found


@torch.no_grad()
def decode_plain(host: Any, count: int, new: int) -> tuple[float, int]:
    """Processor seconds per token behind `count` tokens in a cache of keys and values, and its bytes."""
    config, cache = host.config, DynamicCache(config=host.config)
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, count, config.hidden_size // config.num_attention_heads)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    size = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    token = torch.zeros(1, 1, dtype=torch.long)
    host(token, past_key_values=cache)
    began = time.process_time()
    for _ in range(new):
        token = host(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return (time.process_time() - began) / new, size


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
    parser.add_argument("--histories", type=int, nargs="+", default=[1024, 102_400])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/serving.json"))
    arguments = parser.parse_args()
    model, load = build(arguments), os.getloadavg()
    with Progress(console=Console(stderr=True)) as bar:
        found: dict[str, Any] = {"throughput": asyncio.run(throughput(model, arguments, bar))}
        found["steps"] = asyncio.run(steps(model, arguments))
        found["history"] = asyncio.run(history(model, arguments, bar))
    machine = {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(), "load_before": load, "load_after": os.getloadavg(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    settings = {k: v for k, v in vars(arguments).items() if k != "output"}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings, "machine": machine, **found}, indent=1)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    show(found)


def show(found: dict[str, Any]) -> None:
    grid = Table(title="engine, medians over rounds")
    for column in ("", "tokens/s", "first token p50", "p95", "gap p50", "p95"):
        grid.add_column(column, justify="left" if not column else "right")
    names = ("first_token_p50", "first_token_p95", "gap_p50", "gap_p95")
    for kind in ("one_at_a_time", "together", "with_document"):
        one = found["throughput"][kind]
        cells = [f"{1e3 * one[name]['median']:.1f} ms" for name in names]
        grid.add_row(kind, f"{one['tokens_per_second']['median']:.0f}", *cells)
    console = Console()
    console.print(grid)
    console.print(f"speedup {found['throughput']['speedup']}; steps {found['steps']}")
    for kind, one in found["history"].items():
        console.print(kind, one)


if __name__ == "__main__":
    main()
