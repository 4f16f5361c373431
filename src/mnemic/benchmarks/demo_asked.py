"""The first part of the demonstration: a model that comes with the package is asked about streams of any length."""

import time
from itertools import islice, product
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..core.errors import UnsupportedError
from ..hosts import base_model
from .babilong import open_babilong, prompt
from .babilong_tasks import fixed
from .shipped import open_shipped, shipped
from .task import Record
from .trained import stream_bytes

NAME = "lm2-babilong"
LENGTHS = ("1k", "4k", "16k", "64k", "128k")
QUESTIONS = 8
"""Streams read side by side, with a question each; at every length of the same stories, in more and more prose."""
SECONDS = 60.0
"""What would take longer at the pace so far is not begun."""
_ANSWER = 4


def ask_shipped(
    console: Console, name: str = NAME, lengths: tuple[str, ...] = LENGTHS, *, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """Questions of each task, each after a new stream of so many tokens; prints as it goes.

    Returns: {"task", "length", "tokens", "question", "answer", "expected", "asked", "right", "state_bytes", "seconds"}
        of each task and length: tokens and state of a stream, and the first question; nothing where the package has no
        such model.

    Raises:
        UnsupportedError: the model was not trained on BABILong.
    """
    if name not in shipped():
        return []
    one = open_shipped(name)
    if one.experiment is None or not one.experiment.on_stories:
        raise UnsupportedError(f"The shipped model {name} was not trained on BABILong, so it cannot be asked here.")
    model = base_model(one.model)
    size = sum(p.numel() for p in model.parameters())
    console.print(
        f"\n[bold]A model that remembers.[/] {name} ({size:,} parameters, memory {model.memory.name}) reads segments "
        f"of {model.mnemic.layout.segment} words, one after\nanother, and keeps nothing but its state. Facts stand "
        "somewhere in prose; the question comes at the end.\n"
    )
    table = Table(title=f"{QUESTIONS} streams side by side a line")
    for head in ("task", "words read", "first question", "answer", "right answer", "right", "state bytes", "seconds"):
        table.add_column(
            head, justify="left" if head in ("task", "first question", "answer", "right answer") else "right"
        )
    started, found, pace = time.perf_counter(), [], 0.0
    with console.status("Opening the samples ...") as status:
        for length, task in product(lengths, one.tasks):
            samples = list(islice(open_babilong(task, length, one.tokenizer, "test", seed=1), QUESTIONS))
            ids = [one.tokenizer(prompt(sample), verbose=False)["input_ids"] for sample in samples]
            tokens = sum(map(len, ids))
            if time.perf_counter() - started + pace * tokens > seconds:
                continue
            status.update(f"Reading {tokens:,} words in {QUESTIONS} streams ...")
            begun = time.perf_counter()
            found.append({"task": task, "length": length, **_ask(model, one.tokenizer, task, samples, ids)})
            pace = (time.perf_counter() - begun) / tokens
            row = {**found[-1], "right": f"{found[-1]['right']} of {found[-1]['asked']}"}
            table.add_row(*(f"{row[k]:,}" if isinstance(row[k], int) else str(row[k]) for k in _SHOWN))
    console.print(table)
    right, asked = (sum(line[key] for line in found) for key in ("right", "asked"))
    console.print(f"{right} of {asked} right. Its card says how often it is: {one.folder / 'README.md'}\n")
    return found


_SHOWN = ("task", "tokens", "question", "answer", "expected", "right", "state_bytes", "seconds")


@torch.no_grad()
def _ask(model: Any, tokenizer: Any, task: str, samples: list[Any], ids: list[list[int]]) -> dict[str, Any]:
    started = time.perf_counter()
    stream = model.stream(len(ids), tokenizer=tokenizer)
    # The last token is read by `generate`, which goes on from it.
    stream.feed([row[:-1] for row in ids])
    state = stream_bytes(stream)
    last = torch.tensor([row[-1:] for row in ids])
    said = stream.generate(last, max_new_tokens=_ANSWER, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    records = [Record(s.context, s.question.strip(), (s.target,), {"task": task}) for s in samples]
    right = sum(fixed(text, record) == 1.0 for text, record in zip(said, records, strict=True))
    return {
        "tokens": sum(map(len, ids)) // len(ids), "question": records[0].question, "answer": said[0],
        "expected": samples[0].target, "asked": len(ids), "right": right, "state_bytes": state // len(ids),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
