"""What the processes of the distributed tests run: MemoryTrainer over the same few batches, on any engine.

`start` runs processes over gloo; each run leaves NAME.json, its log, and NAME/model, a whole checkpoint.
"""

import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import multiprocessing
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import TrainingArguments

import mnemic
from mnemic.training import Collator, MemoryTrainer
from tests.contract.cases import checkpointing as checkpointing_on
from tests.tiny import random_ids, tiny_host

STEPS, BATCH, SEGMENT = 5, 4, 8
MEMORIES: dict[str, dict[str, Any]] = {"lm2": {"preset": "default", "num_slots": 4}, "rmt": {"num_tokens": 2}}

Run = tuple[str, str, dict[str, Any]]


def rows(segments: int = 3, answers: bool = False) -> list[dict[str, list[int]]]:
    """Documents of `segments` segments; with `answers` the loss is on the last one, but for its first token."""
    found = []
    for i in range(STEPS * BATCH):
        ids, silent = random_ids(segments * SEGMENT, seed=i).tolist(), ((segments - 1) * SEGMENT + 1) * answers
        found.append({"input_ids": ids, "labels": [-100] * silent + ids[silent:]})
    return found


class Streamed(IterableDataset):
    """Rows without a length, as from a file that is read on and on."""

    def __init__(self, given: list):
        self.given = given

    def __iter__(self) -> Iterator[Any]:
        yield from self.given


class InOrder(MemoryTrainer):
    """A step has the same samples whatever the number of processes."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]


def model_of(memory: str) -> Any:
    torch.manual_seed(1)
    return mnemic.attach(tiny_host(), memory, segment=SEGMENT, **MEMORIES[memory])


def train(
    model: Any, folder: Path, world: int, *, fsdp: bool = False, offload: bool = False, segments: int = 3,
    answers: bool = False, streamed: bool = False, resume: str | None = None, trainer: dict | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """The log of one run; folder/model holds the weights it ends with.

    changes: of the training arguments. trainer: options of the trainer.
    """
    options: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH // world, "learning_rate": 3e-3, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False, "use_cpu": True,
        "dataloader_pin_memory": False, "logging_nan_inf_filter": False,
    }  # fmt: skip
    if fsdp:
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    arguments = TrainingArguments(str(folder), **{**options, **changes})
    assert arguments.world_size == world
    if fsdp:
        # accelerate offers FSDP on accelerators only; torch's own runs over gloo as well.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    given = rows(segments, answers)
    data: Any = Streamed(given) if streamed else given
    run = InOrder(
        model,
        arguments,
        train_dataset=Streamed(data) if streamed else data,
        data_collator=Collator(),
        **(trainer or {}),
    )
    assert run.is_fsdp_enabled == fsdp
    if offload:
        from torch.distributed.fsdp import CPUOffloadPolicy

        run.accelerator.state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
    run.train(resume_from_checkpoint=resume)
    run.save_model(str(folder / "model"))
    return [entry for entry in run.state.log_history if "loss" in entry]


def work(rank: int, world: int, port: int, folder: str, runs: list[Run]) -> None:
    """One process of `start`."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, memory, given in runs:
        options = dict(given)
        AcceleratorState._reset_state(reset_partial_state=False)
        if PartialState._shared_state:
            PartialState().distributed_type = DistributedType.MULTI_CPU
        source, checkpointing = options.pop("start", None), options.pop("checkpointing", False)
        model = model_of(memory) if source is None else mnemic.load(source)
        if checkpointing:
            checkpointing_on(model)
        log = train(model, Path(folder) / name, world, **options)
        if rank == 0:
            (Path(folder) / f"{name}.json").write_text(json.dumps(log), encoding="utf-8")
    torch.distributed.destroy_process_group()


def start(world: int, folder: Path, runs: list[Run]) -> None:
    """`runs` (name, memory, options of `train`) in `world` fresh processes; raises where one fails."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    multiprocessing.spawn(work, (world, port, str(folder), runs), nprocs=world, join=True)
