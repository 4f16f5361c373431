"""How long a trained LM2 keeps facts while it reads text that has none, and which gate loses them.

    python -m benchmarks.lm2_retention RUN [--rows 64] [--output results/lm2/retention.json] [--figure F.png]

The first segment says where four people went, between sentences of background; then background alone is read. After
1, 2, 4, ... segments of it each of the four is asked for, of a copy of the state. Four readings of the same texts:

- "as trained";
- "no writing": the input gate is shut while background is read, so that the bank can only fade;
- "no forgetting": the forget gate is open, so that the bank can only be added to;
- "frozen": both, a control: nothing changes the bank, and what is lost is lost in the first segment.

Beside the accuracy: the cosine of the bank with that after the first segment, its norm over that one's, and the gates'
means while background is read. RUN is a folder of `mnemic train` (memory lm2, one bank or several) whose words are
those of BABILong, or lm2-babilong, the model that comes with the package.
"""

import argparse
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemic.benchmarks.babi import ACTORS, PLACES
from mnemic.benchmarks.babi.words import MOVE_VERBS
from mnemic.benchmarks.background import named
from mnemic.benchmarks.haystack import Haystack, Reader
from mnemic.benchmarks.shipped import open_trained
from mnemic.core.files import replace_atomically
from mnemic.hosts import base_model

DISTANCES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
READINGS = {"as trained": (), "no writing": ("in",), "no forgetting": ("forget",), "frozen": ("in", "forget")}
_SHUT = 1e4


@contextmanager
def held(memory: Any, gates: tuple[str, ...]) -> Iterator[None]:
    """The input gate shut, the forget gate open, or both."""
    biases = {"in": (memory.bias_in, -_SHUT), "forget": (memory.bias_forget, _SHUT)}
    kept = {name: biases[name][0].detach().clone() for name in gates}
    for name in gates:
        biases[name][0].data.fill_(biases[name][1])
    try:
        yield
    finally:
        for name, values in kept.items():
            biases[name][0].data.copy_(values)


def texts(tokenizer: Any, segment: int, rows: int, seed: int) -> tuple[Tensor, list[list[str]], Haystack]:
    """The first segments (rows, segment), where each of the four is, and the background."""
    haystack = Haystack(named("prose", "test", None), tokenizer)
    rng, ids, places = random.Random(seed), [], []
    for _ in range(rows):
        order = rng.sample(ACTORS, len(ACTORS))
        at = {who: rng.choice(PLACES) for who in order}
        facts = [list(haystack.codec.fact(f" {who} {rng.choice(MOVE_VERBS)} to the {at[who]}.")) for who in order]
        sentences = [list(s) for s in Reader(haystack, rng).read(segment - sum(map(len, facts)))]
        # The last sentence is cut, so that a fact behind it would follow half a sentence.
        for fact in facts:
            sentences.insert(rng.randrange(len(sentences)), fact)
        ids.append([i for sentence in sentences for i in sentence])
        places.append([at[who] for who in ACTORS])
    return torch.tensor(ids), places, haystack


@torch.no_grad()
def retention(run: str | Path, *, rows: int, seed: int = 1) -> dict[str, Any]:
    trained = open_trained(run)
    model, tokenizer = base_model(trained.model).eval(), trained.tokenizer
    memory, segment = model.memory, model.mnemic.layout.segment
    first, places, haystack = texts(tokenizer, segment, rows, seed)
    wanted = torch.tensor([[tokenizer.convert_tokens_to_ids(p) for p in row] for row in places])
    questions = [torch.tensor([tokenizer(f"Where is {who}?")["input_ids"]]).expand(rows, -1) for who in ACTORS]
    readers = [Reader(haystack, random.Random(f"{seed}|{row}")) for row in range(rows)]
    noise = torch.stack([_block(reader, max(DISTANCES) * segment) for reader in readers])

    found: dict[str, Any] = {}
    for name, gates in READINGS.items():
        stream = model.stream(batch_size=rows).feed(first)
        start = {bank: slots.clone() for bank, slots in memory.banks(stream.state).items()}
        seen: list[dict[str, float]] = []
        stream.cache.watch = lambda before, kept, after, said: seen.append({n: float(v) for n, v in said.items()})  # noqa: B023
        points, at = [], 0
        for distance in DISTANCES:
            if distance > at:
                with held(memory, gates):
                    stream.feed(noise[:, at * segment : distance * segment])
                at = distance
            said = torch.stack([_answer(stream, question) for question in questions], 1)
            banks = memory.banks(stream.state)
            same = [torch.cosine_similarity(banks[b].flatten(1), start[b].flatten(1)).mean().item() for b in start]
            grown = [(banks[b].flatten(1).norm(dim=1) / start[b].flatten(1).norm(dim=1)).mean().item() for b in start]
            points.append(
                {
                    "segments": distance,
                    "accuracy": (said == wanted).float().mean().item(),
                    "cosine": sum(same) / len(same),
                    "grown": sum(grown) / len(grown),
                }
            )
        stream.cache.watch = None
        means = {key: sum(s[key] for s in seen) / len(seen) for key in seen[0]} if seen else {}
        found[name] = {"points": points, "diagnostics": means}
    return {
        "segment": segment, "rows": rows, "asked": rows * len(ACTORS), "chance": 1 / len(PLACES), "seed": seed,
        "trained_segments": list(trained.experiment.most_segments) if trained.experiment else None,
        "readings": found, "torch": torch.__version__,
    }  # fmt: skip


def _block(reader: Reader, tokens: int) -> Tensor:
    return torch.tensor([i for sentence in reader.read(tokens) for i in sentence])


def _answer(stream: Any, question: Tensor) -> Tensor:
    """The most likely next token of each row after the question; the stream stays as it is."""
    copy = stream.fork()
    return copy.feed(question, return_logits=True)[:, -1].argmax(-1)


def plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    accuracy, cosine, grown = figure.subplots(1, 3)
    for name, reading in found["readings"].items():
        points = reading["points"]
        distances = [p["segments"] for p in points]
        accuracy.plot(distances, [100 * p["accuracy"] for p in points], marker="o", markersize=3, label=name)
        cosine.plot(distances, [p["cosine"] for p in points], marker="o", markersize=3, label=name)
        grown.plot(distances, [p["grown"] for p in points], marker="o", markersize=3, label=name)
    accuracy.axhline(100 * found["chance"], color="grey", linewidth=0.8, linestyle=":")
    if found["trained_segments"]:
        accuracy.axvline(found["trained_segments"][-1], color="grey", linewidth=0.8)
    accuracy.set(ylabel="right answers, percent", ylim=(0, 102))
    cosine.set(ylabel="cosine with the bank after the facts")
    grown.set(ylabel="its norm, times that", yscale="log")
    for axes in (accuracy, cosine, grown):
        axes.set_xscale("symlog", linthresh=1, base=2)
        axes.set_xlim(-0.2, 1.2 * max(DISTANCES))
        axes.set(xlabel=f"segments of {found['segment']} words read since the facts")
        axes.grid(alpha=0.3)
    cosine.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/lm2/retention.json"))
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    found = retention(arguments.run, rows=arguments.rows, seed=arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    replace_atomically(arguments.output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    for name, reading in found["readings"].items():
        print(name, " ".join(f"{p['segments']}: {100 * p['accuracy']:.0f}" for p in reading["points"]))
    if arguments.figure is not None:
        plot(found, arguments.figure)


if __name__ == "__main__":
    main()
