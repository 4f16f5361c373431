"""Whether planted facts can be found in the slots of a trained LM2, and whether they are really held there.

    python -m benchmarks.lm2_planted RUN [--rows 32] [--output results/lm2/planted.json] [--figure F.png]

One segment says where four people went, between sentences of background; then each of them is asked for. Found are

- listed: percent of the names, and of the places, that the slot report lists among the five tokens by which some slot
  was written most (8 of the segment's tokens are such words);
- same: percent of the questions in which the name reads most from that slot to which the fact's name wrote most;
- without: percent of right answers with the four slots set to zeros that the question's name reads most (summed over
  blocks), and with those that the name of another question does;
- wrote, read: by block, name and slot, means over samples, for the figure.

RUN is a folder of `mnemic train` (memory lm2, one bank) whose words are those of BABILong, or lm2-babilong, the model
that comes with the package.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemic.analysis import capture, slot_report
from mnemic.analysis.importance import without
from mnemic.benchmarks.babi import ACTORS
from mnemic.benchmarks.shipped import open_trained
from mnemic.core.files import replace_atomically
from mnemic.hosts import base_model

from .lm2_retention import texts

LISTED = 5
HELD = 4
"""Slots that are set to zeros."""


@torch.no_grad()
def planted(run: str | Path, *, rows: int, seed: int = 1) -> dict[str, Any]:
    trained = open_trained(run)
    model, tokenizer = base_model(trained.model).eval(), trained.tokenizer
    first, places, _ = texts(tokenizer, model.mnemic.layout.segment, rows, seed)
    names = [tokenizer.convert_tokens_to_ids(who) for who in ACTORS]
    questions = [tokenizer(f"Where is {who}?")["input_ids"] for who in ACTORS]
    wrote: dict[int, Tensor] = {}
    read: dict[int, Tensor] = {}
    listed, same, right = {"names": [], "places": []}, {}, {"nothing": [], "its slots": [], "another's slots": []}
    for ids, where in zip(first, places, strict=True):
        stream = model.stream()
        with capture(stream) as captured:
            stream.feed(ids[None])
        seen = captured.look(ids)
        told = [(ids == name).nonzero()[0, 0] for name in names]
        reports = [slot_report(seen, block, top=LISTED) for block in seen.writes]
        top = {share.number for report in reports for slot in report.writers for share in slot}
        wanted = [tokenizer.convert_tokens_to_ids(place) for place in where]
        listed["names"] += [name in top for name in names]
        listed["places"] += [place in top for place in wanted]
        asked = [_reads(stream, question, name) for question, name in zip(questions, names, strict=True)]
        for block, writes in seen.writes.items():
            by_name = torch.stack([writes[at] for at in told])
            reads = torch.stack([one[block] for one in asked])
            wrote[block] = wrote.get(block, 0) + by_name / rows
            read[block] = read.get(block, 0) + reads / rows
            same.setdefault(block, []).extend((by_name.argmax(1) == reads.argmax(1)).tolist())
        slots = torch.stack([sum(one.values()) for one in asked]).topk(HELD).indices
        for number, (question, wish) in enumerate(zip(questions, wanted, strict=True)):
            right["nothing"].append(bool(_answers(model, stream, question, slots[:1, :0])[0] == wish))
            for other, answer in enumerate(_answers(model, stream, question, slots)):
                right["its slots" if other == number else "another's slots"].append(bool(answer == wish))
    return {
        "rows": rows, "seed": seed, "segment": first.shape[1], "names": list(ACTORS),
        "listed": {kind: _percent(found) for kind, found in listed.items()},
        "same": {str(block): _percent(found) for block, found in same.items()},
        "without": {what: _percent(found) for what, found in right.items()},
        "wrote": {str(block): found.tolist() for block, found in wrote.items()},
        "read": {str(block): found.tolist() for block, found in read.items()},
        "torch": torch.__version__,
    }  # fmt: skip


def _reads(stream: Any, question: list[int], name: int) -> dict[int, Tensor]:
    """By block, how the question's name reads the slots (N,)."""
    copy = stream.fork()
    with capture(copy) as captured:
        copy.feed(torch.tensor([question]))
    return {block: reads[question.index(name)] for block, reads in captured.look(question).reads.items()}


def _answers(model: Any, stream: Any, question: list[int], slots: Tensor) -> Tensor:
    """The most likely next token after the question, (B,); in each row the slots (B, k) are set to zeros."""
    work = stream.select([0] * len(slots))
    bank = next(iter(model.memory.banks(work.state)))
    for column in slots.T:
        work.cache.state, work.cache.reads = without(model.memory, work.state, bank, column), None
    return work.feed(torch.tensor([question]).expand(len(slots), -1), return_logits=True)[:, -1].argmax(-1)


def _percent(found: list[bool]) -> float:
    return round(100 * sum(found) / len(found), 1)


def plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    blocks = list(found["wrote"])
    figure = Figure(figsize=(10, 1.6 * len(blocks) + 0.4), layout="constrained")
    for row, block in zip(figure.subplots(len(blocks), 2, squeeze=False), blocks, strict=True):
        titles = (
            f"block {block}: slots that the fact's name wrote",
            f"block {block}: slots that the question's name reads",
        )
        for axes, kind, title in zip(row, ("wrote", "read"), titles, strict=True):
            image = axes.imshow(found[kind][block], aspect="auto", cmap="viridis")
            axes.set_yticks(range(len(found["names"])), found["names"])
            axes.set_title(title, fontsize=9)
            figure.colorbar(image, ax=axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/lm2/planted.json"))
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    found = planted(arguments.run, rows=arguments.rows, seed=arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    replace_atomically(arguments.output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print({key: found[key] for key in ("listed", "same", "without")})
    if arguments.figure is not None:
        plot(found, arguments.figure)


if __name__ == "__main__":
    main()
