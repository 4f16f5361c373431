"""Memory and speed of building one BABILong sample, streamed and whole, from a thousand to ten million tokens.

    python -m benchmarks.babilong_build [DATA] [--output results/babilong_build.json] [--image FILE]

Background: the test books of DATA, without it the prose that comes with Python. The tokenizer is a byte-level BPE of
32,768 tokens, trained here on the training part of the same source, as a fast tokenizer of transformers. Every
measurement is a process of its own:

    ids     the sample is built and its token ids are read piece by piece
    text    the same with its text
    whole   the sample is built with its text in one string

    cold    the first such sample: sentences are tokenised when they are first read
    warm    the same sample again
    grown   how far the process grew meanwhile, as the system sees it: its high-water mark less what it had before
    seconds time of the processor, on one thread
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mnemic.benchmarks import Babilong, Haystack, open_babilong
from mnemic.benchmarks.background import named

TASK, SEED, VOCABULARY = "qa1", 1, 32_768
LENGTHS = (1_000, 100_000, 1_000_000, 10_000_000)


def _whole(stream: Babilong) -> int:
    return next(iter(stream)).tokens


def _ids(stream: Babilong) -> int:
    return sum(map(len, next(stream.streamed()).ids()))


def _text(stream: Babilong) -> int:
    sample = next(stream.streamed())
    sum(map(len, sample.text()))
    return sample.tokens


READINGS: dict[str, Callable[[Babilong], int]] = {"ids": _ids, "text": _text, "whole": _whole}


def train(data: Path | None, file: Path) -> None:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([document.text for document in named("auto", "train", data)], trainer)
    inner.save(str(file))


def measure(what: str, length: int, data: Path | None, file: Path) -> dict[str, Any]:
    """One sample of this length, cold and warm, in this process."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    read, documents = READINGS[what], named("auto", "test", data)

    def stream(tokens: int, haystack: Haystack) -> Babilong:
        return open_babilong(TASK, tokens, tokenizer, data=data, seed=SEED, background=haystack)

    # What the tokenizer and the stories take once is there before.
    read(stream(LENGTHS[0], Haystack(documents[:1], tokenizer)))
    haystack = Haystack(documents, tokenizer)
    found: dict[str, Any] = {"what": what, "length": length}
    for turn in ("cold", "warm"):
        before = _forget_high_water()
        started = time.process_time()
        found["tokens"] = read(stream(length, haystack))
        found[f"{turn}_seconds"] = time.process_time() - started
        found[f"{turn}_grown"] = _status("VmHWM") - before
    return found


def _forget_high_water() -> int:
    """Let the high-water mark of this process start from what it has now; returns that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120)
    axes = figure.add_subplot()
    for what, color in (("whole", "tab:orange"), ("text", "tab:green"), ("ids", "tab:blue")):
        mine = [row for row in rows if row["what"] == what]
        lengths = [row["length"] for row in mine]
        name = {"whole": "whole", "text": "streamed text", "ids": "streamed token ids"}[what]
        for turn, style in (("cold", "--"), ("warm", "-")):
            grown = [row[f"{turn}_grown"] / 2**20 for row in mine]
            axes.plot(lengths, grown, style, marker="o", color=color, label=f"{name}, {turn}")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="tokens of the sample", ylabel="the process grew by, MiB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def report(rows: list[dict[str, Any]]) -> None:
    grid = Table(title="one sample")
    for column in ("", "tokens", "grown cold, MiB", "grown warm, MiB", "tokens/s cold", "tokens/s warm"):
        grid.add_column(column, justify="right" if column else "left")
    for row in rows:
        grown = [f"{row[f'{turn}_grown'] / 2**20:.1f}" for turn in ("cold", "warm")]
        speed = [f"{row['tokens'] / row[f'{turn}_seconds']:,.0f}" for turn in ("cold", "warm")]
        grid.add_row(row["what"], f"{row['length']:,}", *grown, *speed)
    Console().print(grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, default=Path("results/babilong_build.json"))
    parser.add_argument("--image", type=Path, default=Path("docs/images/babilong-build.png"))
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "LENGTH", "TOKENIZER"), help="measure this, print it")
    arguments = parser.parse_args()
    if arguments.one:
        what, length, file = arguments.one
        print(json.dumps(measure(what, int(length), arguments.data, Path(file))))
        return
    rows = []
    # Without DATA nothing else may name a data folder.
    environment = {name: value for name, value in os.environ.items() if name != "MNEMIC_DATA"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        train(arguments.data, file)
        works = [(what, length) for what in READINGS for length in LENGTHS]
        for what, length in track(works, description="measuring"):
            command = [sys.executable, "-m", "benchmarks.babilong_build", *([arguments.data] if arguments.data else [])]
            command += ["--one", what, str(length), str(file)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            rows.append(json.loads(done.stdout))
    found = {
        "settings": {"task": TASK, "seed": SEED, "vocabulary": VOCABULARY, "books": arguments.data is not None},
        "versions": {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(rows, arguments.image)
    report(rows)


if __name__ == "__main__":
    main()
