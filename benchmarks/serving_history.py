"""What a token costs after a long history, and what is kept of it: a memory, and the same host with keys and values.

Turns after a short and after long histories alternate, each of one segment so that its commit counts, and each from the
same place: a neighbour's load meets both alike, and the ratio of two turns side by side says more than their times.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from rich.progress import Progress
from transformers import DynamicCache

from benchmarks.serving_common import follow, ids, median, plain_host
from mnemic.serving.engine import Engine
from mnemic.serving.requests import SamplingParams, Work

_PIECE = 8192
PLAIN_TOKENS = 8
"""Of a turn of the host alone."""


async def history(model: Any, arguments: argparse.Namespace, bar: Progress) -> dict[str, Any]:
    return {
        "memory": await _memory(model, arguments, bar),
        "key_values": _key_values(plain_host(arguments), arguments, bar),
    }


async def _memory(model: Any, arguments: argparse.Namespace, bar: Progress) -> dict[str, Any]:
    streams, sizes = {}, {}
    reading = bar.add_task("reading histories", total=sum(arguments.histories))
    for count in arguments.histories:
        streams[count] = model.stream()
        for start in range(0, count, _PIECE):
            piece = ids(min(_PIECE, count - start), start)
            streams[count].feed(piece)
            bar.advance(reading, len(piece))
    engine = Engine(model).start()
    sampling = SamplingParams(temperature=0, max_tokens=arguments.segment)

    async def turn(count: int) -> tuple[float, float]:
        wall, worked = time.perf_counter(), time.process_time()
        # The engine leaves the stream as it is.
        _, last = await follow(engine, Work(prompt=[], sampling=sampling, stream=streams[count]))
        passed = time.perf_counter() - wall, time.process_time() - worked
        after = last.stream
        sizes[count] = {"state_bytes": after.state_bytes, "saved_bytes": len(after.to_bytes())}
        return passed

    found = await _alternating(turn, arguments.histories, arguments.segment, arguments.pairs, bar, "memory")
    await engine.stop()
    return _with_sizes(found, sizes)


def _key_values(host: Any, arguments: argparse.Namespace, bar: Progress) -> dict[str, Any]:
    """Filled with random numbers instead of by reading, which changes no cost of decoding."""
    config, caches, sizes = host.config, {}, {}
    for count in arguments.plain_histories:
        cache = caches[count] = DynamicCache(config=config)
        shape = (1, config.num_key_value_heads, count, config.hidden_size // config.num_attention_heads)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
        layers: Any = cache.layers
        sizes[count] = {"state_bytes": sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))}

    async def turn(count: int) -> tuple[float, float]:
        cache, token = caches[count], torch.zeros(1, 1, dtype=torch.long)
        wall, worked = time.perf_counter(), time.process_time()
        with torch.no_grad():
            for _ in range(PLAIN_TOKENS):
                token = host(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        passed = time.perf_counter() - wall, time.process_time() - worked
        cache.crop(-PLAIN_TOKENS)
        return passed

    pairs = max(1, arguments.pairs // 4)
    running = _alternating(turn, arguments.plain_histories, PLAIN_TOKENS, pairs, bar, "keys and values")
    # It never waits for anything.
    try:
        running.send(None)
    except StopIteration as done:
        return _with_sizes(done.value, sizes)
    raise AssertionError


async def _alternating(
    turn: Any, histories: list[int], tokens: int, pairs: int, bar: Progress, what: str
) -> dict[str, Any]:
    """turn(history) -> seconds, processor seconds. Ratios are to the first history, measured just before or after."""
    times: dict[int, list[tuple[float, float]]] = {count: [] for count in histories}
    task = bar.add_task(f"alternating turns, {what}", total=pairs)
    for count in histories:
        await turn(count)
    for i in range(pairs):
        for count in histories if i % 2 else reversed(histories):
            times[count].append(await turn(count))
        bar.advance(task)
    found: dict[str, Any] = {}
    for count in histories:
        walls, works = zip(*times[count], strict=True)
        found[str(count)] = {
            "ms_per_token": round(1e3 * statistics.median(walls) / tokens, 4),
            "processor_ms_per_token": round(1e3 * statistics.median(works) / tokens, 4),
        }
        if count != histories[0]:
            for name, kind in (("time_ratio", 0), ("processor_time_ratio", 1)):
                ratios = [a[kind] / b[kind] for a, b in zip(times[count], times[histories[0]], strict=True)]
                found[str(count)][name] = median(ratios)
    return found


def _with_sizes(found: dict[str, Any], sizes: dict[int, dict[str, int]]) -> dict[str, Any]:
    first = next(iter(sizes.values()))["state_bytes"]
    for count, size in sizes.items():
        found[str(count)] |= {**size, "bytes_ratio": round(size["state_bytes"] / first, 4)}
    return found
