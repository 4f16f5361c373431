"""A stream of any length costs constant memory and time per token.

As a script it writes the figures of one run:

    OMP_NUM_THREADS=1 python tests/hosts/test_long_stream.py --tokens 1000000 --json results/long_stream.json
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEGMENT, WINDOW, EARLY = 512, 8192, 10_000
HOST = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
}  # fmt: skip
MEMORY = {"memory": "lm2", "num_slots": 16}
PAIRS = 31


def measure(tokens: int) -> dict:
    """Feed one stream `tokens` random tokens; memory early and late, and speed over windows of `WINDOW` tokens.

    `paired_ratio` alternates windows of the old stream with windows of one that has read `EARLY` tokens, so that
    whatever else the machine does meets both: tokens/s of the old one over tokens/s of the young one.
    """
    import psutil
    import torch
    import transformers

    import mnemic

    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {k: v for k, v in MEMORY.items() if k != "memory"}
    host = transformers.AutoConfig.for_model("llama", **HOST)
    model = mnemic.attach(host, MEMORY["memory"], segment=SEGMENT, **options).eval()
    generator = torch.Generator().manual_seed(1)
    process = psutil.Process()

    def window(stream, size):
        ids = torch.randint(0, HOST["vocab_size"], (size,), generator=generator)
        wall, cpu = time.perf_counter(), time.process_time()
        stream.feed(ids)
        return size / (time.perf_counter() - wall), size / (time.process_time() - cpu)

    def memory(stream):
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"peak_rss": peak, "rss": process.memory_info().rss, "state_bytes": stream.state_bytes}

    stream = model.stream()
    window(stream, EARLY)
    early, young = memory(stream), stream.fork()
    speeds, rss = [], []
    while stream.tokens_seen < tokens:
        size = min(WINDOW, tokens - stream.tokens_seen)
        speed = window(stream, size)
        if size == WINDOW:
            speeds.append(speed)
            rss.append(process.memory_info().rss)
    late, seen = memory(stream), stream.tokens_seen
    assert bool(stream.cache.last_logits.isfinite().all())
    pairs = [(window(young, WINDOW), window(stream, WINDOW)) for _ in range(PAIRS)]
    part = max(len(speeds) // 4, 1)
    median = lambda found, clock: round(statistics.median(s[clock] for s in found), 1)  # noqa: E731
    return {
        "config": {"host": {"model_type": "llama", **HOST}, "memory": MEMORY, "segment": SEGMENT, "window": WINDOW},
        "machine": {"platform": platform.platform(), "cpu": _processor(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "mnemic": mnemic.__version__,
        },
        "tokens": seen,
        "early_tokens": EARLY,
        "early": early,
        "late": late,
        "peak_growth": late["peak_rss"] / early["peak_rss"] - 1,
        "rss_highest": max(rss, default=late["rss"]),
        "windows": len(speeds),
        "tokens_per_second": {
            "first_quarter": median(speeds[:part], 0), "last_quarter": median(speeds[-part:], 0),
            "first_quarter_cpu": median(speeds[:part], 1), "last_quarter_cpu": median(speeds[-part:], 1),
        },
        "paired_ratio": statistics.median(old[1] / new[1] for new, old in pairs),
    }  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


@pytest.mark.parametrize(
    "tokens", [50_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_a_long_stream_costs_constant_memory_and_time(tokens, tmp_path):
    # A process of its own: the peak of this one belongs to every test before.
    file = tmp_path / "long_stream.json"
    subprocess.run(
        [sys.executable, __file__, "--tokens", str(tokens), "--json", str(file)],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = json.loads(file.read_text())
    print(json.dumps({k: v for k, v in found.items() if k not in ("config", "machine", "versions")}, indent=2))
    assert found["tokens"] == tokens
    assert found["late"]["state_bytes"] == found["early"]["state_bytes"]
    assert found["peak_growth"] < 0.02
    assert found["rss_highest"] < 1.02 * found["early"]["rss"]
    if tokens == 1_000_000:
        assert 0.9 < found["paired_ratio"] < 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    found = measure(arguments.tokens)
    name = Path(__file__).name
    command = f"OMP_NUM_THREADS=1 python tests/hosts/{name} --tokens {arguments.tokens} --json {arguments.json}"
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"command": command, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
