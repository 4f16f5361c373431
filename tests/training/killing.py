"""A run that is killed again and again: `python -m tests.training.killing FOLDER KILLS [--stateful] [--seed N]`.

Trains LM2 on a tiny host twice, once without interruption and once killed with SIGKILL at random points, while steps
and checkpoints are made, and resumed from what is in the folder. Prints JSON: kills, how many of them fell into the
writing of a checkpoint, the steps that runs were resumed from, and whether weights and log are equal bit by bit.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import mnemic
from mnemic.training import Collator, MemoryTrainer, SegmentLaw, TextExamples
from mnemic.training.checkpoints import checkpoints
from tests.tiny import random_ids, tiny_host

SEGMENT, BATCH, SAVE_STEPS = 8, 4, 2


class Rows(TextExamples):
    """Text, as rows that go on from batch to batch: two calls for each document."""

    def __iter__(self) -> Any:
        for i, example in enumerate(super().__iter__(), self._first):
            yield {**example, "reset": i // BATCH % 2 == 0}


def trainer(folder: Path, steps: int, stateful: bool, **changes: Any) -> MemoryTrainer:
    """A run with random numbers of segments, dropout, clipping, and a log whose lines do not fall on checkpoints."""
    torch.manual_seed(0)
    model = mnemic.attach(tiny_host("gpt2"), "lm2", segment=SEGMENT, num_slots=4)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=3e-3, logging_steps=3,
        report_to=[], save_steps=SAVE_STEPS, save_total_limit=2, disable_tqdm=True, remove_unused_columns=False,
        use_cpu=True, dataloader_pin_memory=False, gradient_accumulation_steps=2,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(arguments, name, value)
    documents = [random_ids(40 + i, seed=i).tolist() for i in range(10)]
    data = (Rows if stateful else TextExamples)(documents, SEGMENT, SegmentLaw(1, (2, 4), BATCH, 10), seed=3)
    return MemoryTrainer(
        model, arguments, train_dataset=data, data_collator=Collator(), log_memory=True, stateful=stateful
    )


class Told(TrainerCallback):
    """Says how far the run is."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.write(self.pipe, state.global_step.to_bytes(4, "little"))


def child(folder: Path, steps: int, stateful: bool) -> tuple[int, int]:
    """Start or resume the run in a process of its own: (its id, where it says its steps)."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    status = 1
    try:
        run = trainer(folder, steps, stateful)
        run.add_callback(Told(writing))
        run.train(resume_from_checkpoint=True if checkpoints(folder) else None)
        run.save_model(str(folder / "final"))
        log = [{k: v for k, v in e.items() if "train_" not in k} for e in run.state.log_history]
        (folder / "log.json").write_text(json.dumps(log))
        status = 0
    finally:
        os._exit(status)


def finish(process: int) -> None:
    if os.waitpid(process, 0)[1]:
        raise SystemExit("a run failed; see above")


def compare(folder: Path, kills: int, steps: int, stateful: bool, seed: int) -> dict[str, Any]:
    rng, resumed, writing = random.Random(seed), [], 0
    whole, killed = folder / "whole", folder / "killed"
    started = time.perf_counter()
    process, pipe = child(whole, steps, stateful)
    finish(process)
    os.close(pipe)
    alone = time.perf_counter() - started
    # Early enough that a fast machine is not done before it is killed.
    for target in sorted(rng.randrange(1, steps - 5) for _ in range(kills)):
        process, pipe = child(killed, steps, stateful)
        while int.from_bytes(os.read(pipe, 4) or b"\xff\xff", "little") < target:
            pass
        time.sleep(rng.random() * 0.1)
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        os.close(pipe)
        found = checkpoints(killed)
        resumed.append(int(found[-1].name.split("-")[1]) if found else 0)
        writing += (killed / ".saving").is_dir()
    process, pipe = child(killed, steps, stateful)
    finish(process)
    os.close(pipe)
    logs = [json.loads((f / "log.json").read_text()) for f in (whole, killed)]
    one, other = (load_file(f / "final" / "model.safetensors") for f in (whole, killed))
    return {
        "kills": kills,
        "while writing": writing,
        "resumed from": resumed,
        "steps": steps,
        "weights equal": one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one),
        "log equal": logs[0] == logs[1] and len(logs[0]) > steps // 3,
        "left behind": [p.name for p in killed.iterdir() if p.name.startswith(".")],
        "kept": [p.name for p in checkpoints(killed)],
        "seconds": [round(alone, 1), round(time.perf_counter() - started - alone, 1)],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kills", type=int)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stateful", action="store_true")
    given = parser.parse_args()
    # One thread: forked children share none.
    torch.set_num_threads(1)
    report = compare(given.folder, given.kills, given.steps, given.stateful, given.seed)
    print(json.dumps(report))
    sys.exit(not (report["weights equal"] and report["log equal"]))
