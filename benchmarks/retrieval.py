"""Speed of a large store of keys and values against the plain host, side by side in one run.

    python -m benchmarks.retrieval [--stored 262144] [--output results/retrieval.json]

A small Llama with Memorizing Transformers in one block, its store full. Contenders take turns, round after round, and
ratios are taken within a round; medians over rounds are reported.

    decode    one token at a time from the start of a segment, in milliseconds a token
    prefill   half a segment in one call with a cache, in milliseconds a token

Times are of the processor, not of the clock, so that other work on the machine weighs less; with one thread they are
the same on an idle one. Both kinds read an open segment: no commit falls into what is timed. "host" is the model alone
on the same tokens. The store is not read through the host, which would take minutes: its segments are drawn at random
and appended with the operation that a commit uses. Keys lie around 1,024 random directions, so that an index meets the
clusters it is made for; recall depends on the data. Queries for recall are noisy copies of stored keys; those of the
timed runs come from the host's random weights, and cost the same. The floor of exact search is reading every key once:
it is measured as the time of the products of one query with all keys.
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
from torch import Tensor

import mnemic
from benchmarks.host import VOCABULARY, plain_llama
from mnemic.core.state import State
from mnemic.ops import nearest, paged_bank

SEGMENT = 512
CLUSTERS, SPREAD = 1024, 0.5


def host(arguments: argparse.Namespace) -> Any:
    return plain_llama(arguments.width, arguments.layers, arguments.heads, positions=2048).eval()


def attached(arguments: argparse.Namespace, search: str, state: State | None = None) -> tuple[Any, State]:
    """A model with a full store: `state`, or a new one in pages of this search's size."""
    memory = {"capacity": arguments.stored, "top_k": arguments.top_k, "preset": "default", "search": search}
    model = mnemic.attach(host(arguments), "memorizing-transformers", segment=SEGMENT, **memory)
    return model, filled(model.memory) if state is None else state


@torch.no_grad()
def filled(memory: Any) -> State:
    """A store without an empty place."""
    make = torch.Generator().manual_seed(1)
    spec, layer, page = memory.host, memory.layers[0], memory.config.page
    shape = (1, spec.num_key_value_heads, page, spec.head_dim)
    centres = torch.randn(spec.num_key_value_heads, CLUSTERS, spec.head_dim, generator=make)
    bank = dict(memory.initial_state(1))
    for _ in range(memory.config.capacity // page):
        chosen = torch.randint(CLUSTERS, shape[1:3], generator=make)[..., None].expand(shape[1:])
        keys = centres.gather(1, chosen) + SPREAD * torch.randn(shape, generator=make)
        keys = torch.nn.functional.normalize(keys, dim=-1)
        values = torch.randn(shape, generator=make)
        bank = paged_bank.append(bank, {f"{layer}/keys": keys, f"{layer}/values": values})
    return State(bank)


@torch.no_grad()
def workloads(model: Any, state: State | None, arguments: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Each gives the milliseconds a token."""
    ids = torch.randint(VOCABULARY, (1, SEGMENT), generator=torch.Generator().manual_seed(2))

    def given() -> dict[str, Any]:
        """A stream that stands at the start of a segment."""
        if state is None:
            return {}
        cache = mnemic.hosts.MemoryCache(model.mnemic.layout)
        cache.start(state, 1)
        return {"past_key_values": cache}

    @torch.no_grad()
    def prefill() -> float:
        cache, start = given(), time.process_time()
        model(ids[:, : SEGMENT // 2], use_cache=True, logits_to_keep=1, **cache)
        return (time.process_time() - start) * 1000 / (SEGMENT // 2)

    @torch.no_grad()
    def decode() -> float:
        cache, start = given().get("past_key_values"), time.process_time()
        for i in range(arguments.tokens):
            cache = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
        return (time.process_time() - start) * 1000 / arguments.tokens

    return {"decode": decode, "prefill": prefill}


@torch.no_grad()
def recall(state: State, layer: int, heads: int, k: int) -> float:
    """Of the k nearest keys of 64 queries a head, the share that faiss finds."""
    make = torch.Generator().manual_seed(3)
    pages = paged_bank.view(dict(state), f"{layer}/keys")
    picked = [pages[int(i)][:, :, :4] for i in torch.randint(len(pages), (16,), generator=make)]
    query = torch.cat(picked, dim=2).repeat_interleave(heads // pages[0].shape[1], dim=1)
    query = query + SPREAD / query.shape[-1] ** 0.5 * torch.randn(query.shape, generator=make)
    slots = [paged_bank.search(query, dict(state), k, f"{layer}/keys", index=i)[1] for i in ("exact", "faiss")]
    return nearest.recall(slots[1], slots[0])


@torch.no_grad()
def floor(state: State, layer: int) -> float:
    """Milliseconds of the products of one query a head with all keys, and nothing else."""
    pages = paged_bank.view(dict(state), f"{layer}/keys")
    query = torch.randn(*pages[0].shape[:2], 1, pages[0].shape[-1])
    outs: list[Tensor] = [query @ page.transpose(-1, -2) for page in pages]
    start = time.process_time()
    for page, out in zip(pages, outs, strict=True):
        torch.matmul(query, page.transpose(-1, -2), out=out)
    return (time.process_time() - start) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("stored", 262_144), ("top-k", 32), ("width", 256), ("layers", 4), ("heads", 4), ("tokens", 16), ("rounds", 5),
        ("threads", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path("results/retrieval.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    works = {"host": workloads(host(arguments), None, arguments)}
    model, state = attached(arguments, "exact")
    layer, keys = model.memory.layers[0], [t for n, t in state.items() if "/keys/" in n]
    works["exact"] = workloads(model, state, arguments)
    record: dict[str, Any] = {"key_bytes": sum(t.numel() * t.element_size() for t in keys)}
    record["state_bytes"] = state.nbytes
    try:
        nearest.import_faiss().omp_set_num_threads(arguments.threads)
    except ImportError as error:
        print(f"without faiss: {error}")
    else:
        model, paged = attached(arguments, "faiss")
        works["faiss"] = workloads(model, paged, arguments)
        start = time.process_time()
        record["faiss_recall"] = recall(paged, layer, arguments.heads, arguments.top_k)
        record["faiss_build_seconds"] = time.process_time() - start

    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in works[name]} for name in works}
    floors = []
    for index in range(arguments.rounds + 1):
        for kind in works["host"]:
            for name, work in works.items():
                taken = work[kind]()
                if index:  # the first round warms up
                    times[name][kind].append(taken)
        if index:
            floors.append(floor(state, layer))
    record["floor_ms"] = statistics.median(floors)
    rows = []
    for name, kinds in times.items():
        for kind, taken in kinds.items():
            pairs = list(zip(taken, times["host"][kind], strict=True))
            row = {"search": name, "work": kind, "ms_per_token": statistics.median(taken)}
            row["ratio"] = statistics.median(mine / plain for mine, plain in pairs)
            row["added_ms_per_token"] = statistics.median(mine - plain for mine, plain in pairs)
            if kind == "decode" and name == "exact":
                added = zip(pairs, floors, strict=True)
                row["added_over_floor"] = statistics.median((mine - plain) / f for (mine, plain), f in added)
            rows.append(row)
            print(f"{name:>6} {kind:>8} {row['ms_per_token']:9.3f} ms a token, {row['ratio']:.2f} times the host")
    for name, value in record.items():
        print(name, value)
    record = {
        "settings": {k: v for k, v in vars(arguments).items() if k != "output"},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mnemic": mnemic.__version__,
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": "cpu"},
        "rows": rows,
        **record,
        "milliseconds": times,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
