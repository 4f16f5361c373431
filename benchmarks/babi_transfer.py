"""bAbI: a tiny model trained on the released files, scored on the released test files and on generated stories.

    python -m benchmarks.babi_transfer DATA [--tasks qa1 qa4 ...] [--output results/babi_transfer.json]

If generated stories are like the released ones, both scores agree within their 95% intervals. DATA is a folder with
babi-v1.2/. A sentence is the sum of its words, each weighted by its place; a transformer encoder reads the question and
the facts, the last one first, and answers at the question, by cross-entropy over all answers of the training file.
en-10k training files, one model a task.
"""

import argparse
import json
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from mnemic.benchmarks import babi
from mnemic.benchmarks.distances import Score
from mnemic.core.files import replace_atomically

TASKS = (  # all but qa2, qa3 and qa5, whose stories are long
    *("qa4", "qa15", "qa1", "qa9", "qa20", "qa16", "qa10", "qa12", "qa6"),
    *("qa11", "qa13", "qa17", "qa18", "qa19", "qa7", "qa8", "qa14"),
)
WIDTH, LAYERS, HEADS, BATCH, RATE = 64, 2, 4, 64, 1e-3


def sentences(sample: babi.BabiSample) -> list[list[str]]:
    """The question, then the facts from the last to the first, so that positions count from the end of the story."""
    return [re.findall(r"\w+", sentence) for sentence in (sample.question, *reversed(sample.facts))]


class Reader(nn.Module):
    """(B, S, W) ids of S sentences of W words, 0 = padding -> (B, A) logits of the answers."""

    def __init__(self, vocabulary: int, answers: int, num_sentences: int, num_words: int):
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH, padding_idx=0)
        self.places = nn.Parameter(1 + 0.3 * torch.randn(num_words, WIDTH))
        self.positions = nn.Embedding(num_sentences, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, answers)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.words(ids) * self.places).sum(2) + self.positions.weight[: ids.shape[1]]
        return self.head(self.encoder(x, src_key_padding_mask=ids[..., 0] == 0)[:, 0])


def tensors(
    samples: Sequence[babi.BabiSample], vocabulary: dict[str, int], answers: dict[str, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Ids (N, S, W) and answers (N,), int64; an answer that training never saw is -1."""
    ids = torch.zeros(len(samples), *size, dtype=torch.int64)
    for row, sample in zip(ids, samples, strict=True):
        for at, words in enumerate(sentences(sample)):
            row[at, : len(words)] = torch.tensor([vocabulary[word] for word in words])
    return ids, torch.tensor([answers.get(sample.answer, -1) for sample in samples])


def train(ids: Tensor, targets: Tensor, vocabulary: int, answers: int, steps: int, seed: int) -> Reader:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Reader(vocabulary, answers, ids.shape[1], ids.shape[2])
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        batch = ids[rows]
        batch = batch[:, : int((batch[..., 0] != 0).sum(1).max())]
        loss = nn.functional.cross_entropy(model(batch), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def score(model: Reader, ids: Tensor, targets: Tensor) -> Score:
    said = torch.cat([model(part).argmax(-1) for part in ids.split(250)])
    return Score(int((said == targets).sum()), len(targets))


def measure(data: Path, task: str, steps: int, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    training = babi.read(data, task, "train", "en-10k")
    tests = {"released": babi.read(data, task), "generated": babi.generate(task, seed, "test", 1000)}
    every = [training, *tests.values()]
    # Answers come from training alone; words from all, as the release and the generator use the same.
    told = [words for part in every for sample in part for words in sentences(sample)]
    vocabulary = {word: i for i, word in enumerate(sorted({word for words in told for word in words}), 1)}
    answers = {answer: i for i, answer in enumerate(sorted({sample.answer for sample in training}))}
    size = 1 + max(len(sample.facts) for part in every for sample in part), max(map(len, told))
    ids, targets = tensors(training, vocabulary, answers, size)
    model = train(ids, targets, len(vocabulary) + 1, len(answers), steps, seed)
    scores = {name: score(model, *tensors(part, vocabulary, answers, size)) for name, part in tests.items()}
    rows = {name: {**asdict(one), "accuracy": one.accuracy, "interval": one.interval} for name, one in scores.items()}
    return {"task": task, **rows, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/babi_transfer.json"))
    arguments = parser.parse_args()
    settings = {"steps": arguments.steps, "seed": arguments.seed, "batch": BATCH, "width": WIDTH, "layers": LAYERS}
    rows: list[dict[str, Any]] = []
    found = {
        "settings": settings,
        "versions": {"torch": torch.__version__},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": "cpu"},
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for task in track(arguments.tasks, description="training"):
        rows.append(measure(arguments.data, task, arguments.steps, arguments.seed))
        text = json.dumps(found, indent=1) + "\n"
        replace_atomically(arguments.output, lambda temporary, text=text: temporary.write_text(text, "utf-8"))
    grid = Table(title="trained on the released files")
    for column in ("task", "released test", "generated", "seconds"):
        grid.add_column(column, justify="left" if column == "task" else "right")
    for row in rows:
        cells = [f"{row[name]['accuracy']:.1%} ± {row[name]['interval']:.1%}" for name in ("released", "generated")]
        grid.add_row(row["task"], *cells, str(row["seconds"]))
    Console().print(grid)


if __name__ == "__main__":
    main()
