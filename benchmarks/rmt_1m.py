"""A toy encoder with RMT-1M, trained on texts of at most 4 segments, answers over a million tokens.

    python -m benchmarks.rmt_1m [--place detect] [--rows 16] [--output results/rmt_1m/detect.json]

The task is `benchmarks.memorize`: one of 8 values somewhere in the text, asked for at its end; segments of 16 tokens,
so that a million tokens are 62,500 segments. The encoder (2 layers, width 64, 4 memory tokens) is trained by a
curriculum of at most 1, 2, 3 and 4 segments; "curriculum" in the result is its accuracy then. In a second phase calls
of at most 4 segments go on from the state of the call before, without gradient to it and with noise on it; "carried" is
the accuracy after that, and that model reads the long texts, `rows` side by side, in one call for each length.

peak_mb is the largest resident size of the process so far, input_mb that of the token ids it was given: lengths rise,
so what the model itself needs for a longer text shows as growth beyond the ids'.
"""

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.memorize import SEGMENT, Training, accuracy, encoder, set_dropout, texts, with_memory
from mnemic.core.files import replace_atomically

LENGTHS = (128, 1024, 10_240, 102_400, 1_000_000)


def train(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    model = with_memory(encoder(arguments.seed))
    training, scale = Training(model, arguments.place), arguments.scale
    report: dict[str, Any] = {}
    for most, steps in ((1, 150), (2, 150), (3, 150), (4, 250)):
        training.stage(1, most, round(steps * scale))
        print(
            f"{training.steps} steps, at most {most} segments: {accuracy(model, 4, arguments.place):.3f} at 4",
            flush=True,
        )
    report["curriculum"] = {n: accuracy(model, n, arguments.place) for n in (1, 4, 16, 64)}
    print(f"curriculum {report['curriculum']}", flush=True)
    # The network must come back to what it stored as it is when it reads: without dropout.
    set_dropout(model, 0.0)
    training.rows = 64
    for steps, last in ((300, 1.0), (400, 0.5), (400, 0.1)):
        training.carried(4, round(steps * scale), last_rate=last)
        report["carried"] = {n: accuracy(model, n, arguments.place) for n in (1, 4, 16, 64, 256)}
        print(f"{training.steps} steps, carried {report['carried']}", flush=True)
    return model, {**report, "steps": training.steps}


@torch.no_grad()
def read(model: Any, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    rows = max(arguments.rows, min(512, 200_000 // tokens))
    ids, values, _ = texts(rows, tokens // SEGMENT, arguments.place, torch.Generator().manual_seed(tokens))
    clock, processor = time.perf_counter(), time.process_time()
    output = model.eval()(ids, progress=tokens > 50_000)
    return {
        "tokens": ids.shape[1],
        "segments": ids.shape[1] // SEGMENT,
        "rows": rows,
        "right": int((output.logits.argmax(-1) == values).sum()),
        "seconds": round(time.perf_counter() - clock, 2),
        "cpu_seconds": round(time.process_time() - processor, 2),
        "state_bytes_a_row": output.memory_state.nbytes // rows,
        "input_mb": round(ids.nbytes / 2**20, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", choices=("memorize", "detect"), default="detect")
    parser.add_argument("--rows", type=int, default=16, help="least number of texts of a length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the training steps")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens, multiples of 16, rising")
    parser.add_argument("--output", type=Path, default=Path("results/rmt_1m/detect.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    model, report = train(arguments)
    report = {
        "place": arguments.place,
        "seed": arguments.seed,
        "training_cpu_seconds": round(time.process_time() - start),
        **report,
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "lengths": [],
    }  # fmt: skip
    for tokens in arguments.lengths:
        report["lengths"].append(read(model, tokens, arguments))
        print(report["lengths"][-1], flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=2) + "\n"
        replace_atomically(arguments.output, lambda path, text=text: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
