"""Two processes over gloo, DDP and FSDP2, against one process at the same global batch."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import mnemic
from mnemic.training import Collator, MemoryTrainer
from mnemic.training.distribution import check_sharding
from tests.tiny import random_ids, tiny_host
from tests.training.distributed import SEGMENT, model_of, rows, start, train

KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "answers": {"answers": True},
    "one-segment": {"segments": 1, "checkpointing": True},
    "streamed": {"streamed": True},
}
REPLICAS = [("lm2", "all"), ("rmt", "all"), ("rmt", "answers"), ("lm2", "one-segment"), ("rmt", "streamed")]
SAVERS: dict[str, dict[str, Any]] = {
    "checkpointing": {"checkpointing": True},
    "offload": {"offload": True},
    "chunked": {"trainer": {"chunked_loss": 5}},
    "replay": {"trainer": {"replay": True}},
}
# Each fixture starts processes that import everything anew.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    """Runs of one process, by memory and options: their folders."""
    done: dict[str, Path] = {}

    def folder(memory: str, **options: Any) -> Path:
        name = f"{memory}-{json.dumps(options, default=str)}"
        if name not in done:
            model = model_of(memory) if "start" not in options else mnemic.load(options["start"])
            target = tmp_path_factory.mktemp("alone")
            given = {k: v for k, v in options.items() if k not in ("start", "checkpointing")}
            log = train(model, target, 1, **given)
            (target / "log.json").write_text(json.dumps(log), encoding="utf-8")
            done[name] = target
        return done[name]

    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, alone) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    runs = [(f"{memory}-{kind}", memory, KINDS[kind]) for memory, kind in REPLICAS]
    runs += [("rmt-chunked", "rmt", {"trainer": {"chunked_loss": 5}})]
    runs += [("rmt-more", "rmt", {"start": str(alone("rmt") / "model")})]
    runs += [("lm2-kept", "lm2", {"save_strategy": "steps", "save_steps": 3, "trainer": {"log_memory": True}})]
    start(2, folder, runs)
    return folder


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    start(2, folder, [("lm2-all", "lm2", {"fsdp": True}), ("rmt-answers", "rmt", {"fsdp": True, "answers": True})])
    return folder


@pytest.fixture(scope="module")
def fsdp_savers(tmp_path_factory, alone) -> Path:
    folder = tmp_path_factory.mktemp("fsdp-savers")
    runs = [(f"rmt-{name}", "rmt", {"fsdp": True, **options}) for name, options in SAVERS.items()]
    runs += [("lm2-bf16", "lm2", {"fsdp": True, "bf16": True})]
    runs += [("lm2-answers", "lm2", {"fsdp": True, "answers": True}), ("rmt-all", "rmt", {"fsdp": True})]
    runs += [("rmt-more", "rmt", {"fsdp": True, "start": str(alone("rmt") / "model")})]
    start(2, folder, runs)
    return folder


def losses(path: Path) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in json.loads(path.read_text(encoding="utf-8"))])


def check(found: Path, name: str, expected: Path) -> None:
    """The same losses, and the same weights in a checkpoint that one process loads."""
    torch.testing.assert_close(losses(found / f"{name}.json"), losses(expected / "log.json"), atol=1e-5, rtol=0)
    mine = dict(mnemic.load(found / name / "model").named_parameters())
    theirs = dict(mnemic.load(expected / "model").named_parameters())
    assert mine.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(mine[key], weight, atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("memory, kind", REPLICAS)
def test_replicas_equal_one_process(ddp, alone, memory, kind):
    check(ddp, f"{memory}-{kind}", alone(memory, **KINDS[kind]))


@pytest.mark.parametrize("memory, kind", [("lm2", "all"), ("rmt", "answers")])
def test_shards_equal_one_process(fsdp, alone, memory, kind):
    check(fsdp, f"{memory}-{kind}", alone(memory, **KINDS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("memory, kind", [("lm2", "answers"), ("rmt", "all")])
def test_other_shards_equal_one_process(fsdp_savers, alone, memory, kind):
    check(fsdp_savers, f"{memory}-{kind}", alone(memory, **KINDS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAVERS)
def test_shards_with_savers_equal_one_process(fsdp_savers, alone, kind):
    check(fsdp_savers, f"rmt-{kind}", alone("rmt"))


def test_replicas_with_a_loss_in_chunks_equal_one_process(ddp, alone):
    check(ddp, "rmt-chunked", alone("rmt"))


@pytest.mark.slow
def test_shards_in_mixed_precision_stay_close(fsdp_savers, alone):
    found, exact = losses(fsdp_savers / "lm2-bf16.json"), losses(alone("lm2") / "log.json")
    # accelerate rounds what a sharded model returns, the loss with it, to bfloat16: steps of 2^-5 at 4.5.
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp_savers", marks=pytest.mark.slow)])
def test_two_processes_read_on_from_the_checkpoint_of_one(engine, request, alone):
    check(request.getfixturevalue(engine), "rmt-more", alone("rmt", start=str(alone("rmt") / "model")))


def test_one_process_resumes_what_two_began(ddp, alone, tmp_path):
    log = train(model_of("lm2"), tmp_path, 1, resume=str(ddp / "lm2-kept" / "checkpoint-3"))
    whole = losses(alone("lm2") / "log.json")
    torch.testing.assert_close(torch.tensor([entry["loss"] for entry in log]), whole, atol=1e-5, rtol=0)


def test_diagnostics_reach_the_log_of_replicas(ddp):
    log = json.loads((ddp / "lm2-kept.json").read_text(encoding="utf-8"))
    assert all(0 < entry["memory/block1/gate_forget"] < 1 for entry in log)


def _asked(folder: Path, **asked: Any) -> Any:
    """A trainer, and what a launch may ask of it."""
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], dataloader_pin_memory=False)
    trainer = MemoryTrainer(model_of("rmt"), arguments, train_dataset=rows(), data_collator=Collator())
    for name, value in asked.items():
        setattr(trainer.args, name, value)
    return trainer


def test_sharding_where_accelerate_would_replicate_is_refused(tmp_path):
    with pytest.raises(mnemic.UnsupportedError, match="DDP"):
        check_sharding(_asked(tmp_path, fsdp=True))


def test_projections_of_sharded_layers_are_refused():
    model = mnemic.attach(tiny_host(), "transformer-xl", segment=SEGMENT, memory_lengths=4, cache="hidden")
    # What tells a shard from a weight.
    model.model.layers[0].self_attn.q_proj.weight.full_tensor = None
    with pytest.raises(mnemic.UnsupportedError, match="projections of layer 0"):
        model(random_ids(1, 2 * SEGMENT))


def test_a_second_pass_over_sharded_layers_is_refused(monkeypatch):
    model = mnemic.attach(tiny_host(), "memoryllm", segment=SEGMENT, new_states=3, blocks=3, min_chunk=8)
    monkeypatch.setattr("mnemic.hosts.steps.is_sharded", lambda model: True)
    with pytest.raises(mnemic.UnsupportedError, match="second time"):
        model(random_ids(1, 2 * SEGMENT))


def test_kernels_that_replace_the_forward_are_refused(tmp_path):
    with pytest.raises(mnemic.UnsupportedError, match="chunked_loss"):
        check_sharding(_asked(tmp_path, use_liger_kernel=True))


def test_context_parallelism_is_refused(tmp_path):
    trainer = _asked(tmp_path)
    trainer.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(cp_enabled=True, sp_enabled=False))
    with pytest.raises(mnemic.UnsupportedError, match="over_ring"):
        check_sharding(trainer)
