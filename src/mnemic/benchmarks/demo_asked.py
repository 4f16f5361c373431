"""The first part of the demonstration: a model that comes with the package is asked about streams of any length."""

import time
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
SECONDS = 45.0
"""No stream is begun when so many have passed."""
_ANSWER = 4


def ask_shipped(
    console: Console, name: str = NAME, lengths: tuple[str, ...] = LENGTHS, *, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """One question a task and length, each after a new stream of so many tokens; prints as it goes.

    Returns: {"task", "length", "tokens", "question", "answer", "expected", "right", "state_bytes", "seconds"} of each;
        nothing where the package has no such model.

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
    table = Table(title="One stream a line")
    for head in ("task", "words read", "question", "answer", "right answer", "state bytes", "seconds"):
        table.add_column(head, justify="right" if head in ("words read", "state bytes", "seconds") else "left")
    started, found = time.perf_counter(), []
    for length in lengths:
        for task in one.tasks:
            if time.perf_counter() - started < seconds:
                found.append(_ask(model, one.tokenizer, task, length))
                shown = [f"{v:,}" if isinstance(v, int) else str(v) for k, v in found[-1].items() if k in _SHOWN]
                table.add_row(*shown)
    console.print(table)
    right = sum(answer["right"] for answer in found)
    console.print(f"{right} of {len(found)} right. Its card says how often it is: {one.folder / 'README.md'}\n")
    return found


_SHOWN = ("task", "tokens", "question", "answer", "expected", "state_bytes", "seconds")


@torch.no_grad()
def _ask(model: Any, tokenizer: Any, task: str, length: str) -> dict[str, Any]:
    started = time.perf_counter()
    sample = next(iter(open_babilong(task, length, tokenizer, "test", seed=1)))
    ids = torch.tensor([tokenizer(prompt(sample), verbose=False)["input_ids"]])
    # The last token is read by `generate`, which goes on from it.
    stream = model.stream(tokenizer=tokenizer).feed(ids[:, :-1])
    state = stream_bytes(stream)
    answer = stream.generate(ids[:, -1:], max_new_tokens=_ANSWER, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    record = Record(sample.context, sample.question.strip(), (sample.target,), {"task": task})
    return {
        "task": task, "length": length, "tokens": ids.shape[1], "question": sample.question.strip(), "answer": answer,
        "expected": sample.target, "right": fixed(answer, record) == 1.0, "state_bytes": state,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
