"""Resuming: what a run must have in common with the checkpoint that it goes on from, and what may change."""

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..hosts import base_model

MAY_CHANGE = (
    # How long, how often, how much is said and kept.
    "max_steps", "num_train_epochs", "logging_*", "log_*", "save_*", "eval_*", "per_device_eval_batch_size",
    "report_to", "run_name", "project", "trackio_*", "disable_tqdm", "include_num_input_tokens_seen", "debug",
    "include_for_metrics", "batch_eval_metrics", "prediction_loss_only", "load_best_model_at_end", "do_*",
    "metric_for_best_model", "greater_is_better", "push_to_hub", "hub_*", "skip_memory_metrics",
    "enable_jit_checkpoint", "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "output_dir",
    # Where and with how many processes it runs; the samples of a step stay the same.
    "use_cpu", "local_rank", "per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size",
    "average_tokens_across_devices", "dataloader_*", "accelerator_config", "parallelism_config", "ddp_*", "fsdp*",
    "deepspeed", "tf32",
    # The same numbers in less memory or time.
    "activation_checkpointing*", "gradient_checkpointing*", "torch_compile*", "torch_empty_cache_steps", "use_cache",
    "use_liger_kernel", "liger_kernel_config", "ignore_data_skip", "full_determinism",
)  # fmt: skip
"""Training arguments that a resumed run may have otherwise (patterns). Everything else must be as it was."""

_HOST_MAY_CHANGE = ("_name_or_path", "_commit_hash", "transformers_version", "use_cache", "_attn_*", "output_*")


def identity(trainer: Any) -> dict[str, Any]:
    """What must be the same to resume, as JSON: arguments, model, samples of a step, and what the trainer was told."""
    base = base_model(trainer.model)
    arguments = json.loads(trainer.args.to_json_string())
    host = json.loads(json.dumps(base.config.to_dict(), default=str))
    return {
        "arguments": {k: v for k, v in arguments.items() if not _any(k, MAY_CHANGE)},
        "memory": json.loads(json.dumps(base.memory.config.to_dict())),
        "segment": base.mnemic.layout.segment,
        "host": {k: v for k, v in host.items() if not _any(k, _HOST_MAY_CHANGE)},
        "parameters": _parameters(trainer.model),
        # What is in the data is checked where their position is loaded.
        "data": {
            "type": type(trainer.train_dataset).__name__,
            "length": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        },
        "samples of a step": samples_of_a_step(trainer),
        "truncation": None if trainer.truncation is None else repr(trainer.truncation),
        "stateful": trainer.stateful,
        "memory_learning_rate": trainer.memory_learning_rate,
        "memory_weight_decay": trainer.memory_weight_decay,
        **json.loads(json.dumps(trainer.identity)),
    }


def samples_of_a_step(trainer: Any) -> int:
    """Over all processes and accumulated batches."""
    args = trainer.args
    return trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size


def check_identity(checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `ConfigError` naming old and new value of everything that changed and may not."""
    changed = list(_differences(saved, now))
    if changed:
        raise ConfigError(
            f"{checkpoint} is of a run with other settings: {'; '.join(changed)}. Resume with the settings of that "
            "run, or start a new one in another folder. Steps, intervals of logging and saving, device, number of "
            "processes (with the same samples of a step) and what only saves memory or time may change."
        )


def _differences(saved: Any, now: Any, name: str = "") -> Any:
    if isinstance(saved, dict) and isinstance(now, dict):
        # A release that knows more settings than the one that saved is no change.
        for key in sorted({*saved} & {*now} if name in ("arguments", "host") else {*saved, *now}):
            inner = key if name in ("", "arguments") else f"{name}.{key}"
            yield from _differences(saved.get(key), now.get(key), inner)
    elif saved != now:
        yield f"{name} was {saved!r} and is {now!r}"


def _parameters(model: Any) -> dict[str, Any]:
    named = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "sha256": hashlib.sha256(repr(named).encode()).hexdigest(),
    }


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
