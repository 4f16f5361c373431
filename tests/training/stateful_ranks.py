"""What a process of the distributed test of stateful batches runs."""

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from transformers import TrainingArguments

import mnemic
from mnemic.training import Collator, MemoryTrainer, Mixture, StatefulRows
from tests.tiny import tiny_host

ROWS, STEPS = 4, 5


def train(folder: Path, world: int, name: str, **changes: Any) -> None:
    """Five steps of four rows over `world` processes; leaves weights and the state of this process's rows."""
    torch.manual_seed(1)
    model = mnemic.attach(tiny_host(), "rmt", segment=8, num_tokens=2)
    arguments = TrainingArguments(
        str(folder / name), max_steps=STEPS, per_device_train_batch_size=ROWS // world, learning_rate=3e-3,
        report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
        dataloader_pin_memory=False, **changes,
    )  # fmt: skip
    data = StatefulRows(Mixture.open(folder / "data"), 8, 2, ROWS)
    trainer = MemoryTrainer(model, arguments, train_dataset=data, data_collator=Collator(), stateful=True)
    trainer.train()
    found = {"weights": dict(model.named_parameters()), "stream": trainer.stream_state()}
    torch.save(found, folder / f"{name}-{arguments.process_index}.pt")


def work(rank: int, world: int, port: int, folder: str, name: str, changes: dict[str, Any]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    train(Path(folder), world, name, **changes)
    torch.distributed.destroy_process_group()


def start(world: int, folder: Path, name: str, **changes: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (world, port, str(folder), name, changes), nprocs=world)
