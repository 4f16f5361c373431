"""Runs: an experiment trained in a folder, from its beginning or from its last checkpoint."""

import importlib.util
import json
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from ..core.errors import ConfigError, InputError, MissingExtraError
from ..core.files import replace_atomically
from ..hosts import load, parameter_report, save
from ..training import Collator, LossProgress
from ..training.checkpoints import checkpoints
from ..training.guards import StopOnSignal
from ..training.summary import CURVES, MeasuredTrainer, plot_curves, summarise, write_summary
from ..training.tokenizer import find_tokenizer, tokenizer_fingerprint
from .building import build, examples
from .experiment import LOG, SETTINGS, Experiment

MAY_CHANGE = ("steps", "log_every", "save_every", "keep", "report_to", "replay", "chunked_loss")
"""Settings that a resumed run may have otherwise; steps only where no curriculum is cut by them."""


def run(
    experiment: Experiment,
    folder: str | Path,
    *,
    progress: bool = True,
    announce: Callable[[Any], None] | None = None,
    resume: bool = False,
    start: str | Path | None = None,
) -> dict[str, Any]:
    """Train as `experiment` says and leave everything in `folder`.

    SIGTERM and SIGINT end the run after the step, with a checkpoint; then the folder has no `log.json`, and "stopped"
    in the result names the signal and the step.

    Args:
        announce: called with the untrained model before the first step.
        resume: go on from the last checkpoint in the folder, which must be of this run.
        start: the folder of a run whose weights and tokenizer this one begins with, or of the host alone, whose weights
            the host then has; None: begin anew.

    Returns: what `log.json` holds: parameters, seconds, tokens, versions, summary, and the Trainer's log.

    Raises:
        InputError: the folder holds another run, or one to be resumed. ConfigError: the run to be resumed had other
        settings. TrainingError: the run cannot go on.
    """
    folder = Path(folder)
    _check_folder(experiment, folder, resume)
    set_seed(experiment.seed)
    model, tokenizer = build(experiment) if start is None else _begun(experiment, Path(start))
    data = examples(experiment, model, tokenizer)
    arguments = _arguments(experiment, folder, progress)
    if announce is not None:
        announce(model)
    # Only now: settings that cannot be run must not claim the folder.
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / SETTINGS, experiment.to_toml())
    trainer = MeasuredTrainer(
        model,
        arguments,
        train_dataset=data,
        data_collator=Collator(),
        truncation=experiment.parsed_truncation(),
        replay=experiment.replay,
        chunked_loss=experiment.chunked_loss,
        memory_learning_rate=experiment.memory_learning_rate,
        memory_weight_decay=experiment.memory_weight_decay,
        log_memory=True,
        stateful=experiment.stateful,
        identity={"tokenizer": tokenizer_fingerprint(tokenizer), "vary_length": experiment.vary_length},
    )
    trainer.remove_callback(ProgressCallback if progress else PrinterCallback)
    if progress:
        trainer.add_callback(LossProgress)
    guard = StopOnSignal()
    trainer.add_callback(guard)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=True if resume and checkpoints(folder) else None)
    stopped = guard.stopped if trainer.state.global_step < experiment.steps else None
    log = {
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": parameter_report(model),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "device": str(trainer.args.device),
        "summary": summarise(trainer),
        "history": trainer.state.log_history,
    }
    if stopped is not None:
        return {**log, "stopped": {"signal": stopped, "step": trainer.state.global_step}}
    if trainer.args.should_save:
        save(model, folder, whole=experiment.lora is None)
        tokenizer.save_pretrained(folder)
        write_summary(log["summary"], folder)
        try:
            plot_curves(log["history"], folder / CURVES)
        except MissingExtraError as error:
            log["not written"] = str(error)
        # Last: a folder with a log is a finished run.
        _write(folder / LOG, json.dumps(log, indent=1))
    return log


def _begun(experiment: Experiment, start: Path) -> tuple[Any, Any]:
    """The model of `experiment` with the weights of a run, or those of its host, and that run's tokenizer.

    Raises:
        ConfigError: models of other shapes. What `load` raises: FileFormatError, ...
    """
    model, tokenizer = build(experiment, find_tokenizer(start, None))
    weights = load(start).state_dict()
    if not any(name.startswith("memory.") for name in weights):
        # The host alone: the memory stays as it is drawn.
        weights |= {name: w for name, w in model.state_dict().items() if name.startswith("memory.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"The model in {start} is not that of these settings: {error}") from error
    return model, tokenizer


def _check_folder(experiment: Experiment, folder: Path, resume: bool) -> None:
    settings, kept = folder / SETTINGS, checkpoints(folder)
    if not settings.exists():
        return
    before, now = (tomllib.loads(t) for t in (settings.read_text(encoding="utf-8"), experiment.to_toml()))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if resume:
        refused = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed if key not in MAY_CHANGE]
        if refused:
            raise ConfigError(
                f"{folder} holds a run with other settings: {'; '.join(refused)}. Resume with those of the run; "
                f"{', '.join(MAY_CHANGE)} may change."
            )
    elif changed:
        raise InputError(f"{folder} holds a run with other settings; choose another folder or delete it.")
    elif kept and not (folder / LOG).exists():
        raise InputError(
            f"{folder} holds an unfinished run, saved at {kept[-1].name}. Go on with --resume (resume=True), or delete "
            "the folder."
        )


def _arguments(experiment: Experiment, folder: Path, progress: bool) -> TrainingArguments:
    if "tensorboard" in experiment.report_to and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError(
            "report_to names tensorboard, which is not installed: pip install 'mnemic[train]', or --set report_to=[]."
        )
    chosen: Any = {} if experiment.optim is None else {"optim": experiment.optim}
    try:
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=experiment.steps,
            per_device_train_batch_size=experiment.batch_size,
            gradient_accumulation_steps=experiment.gradient_accumulation,
            learning_rate=experiment.learning_rate,
            warmup_steps=experiment.warmup_steps,
            lr_scheduler_type=experiment.schedule,
            weight_decay=experiment.weight_decay,
            max_grad_norm=experiment.max_grad_norm,
            logging_steps=experiment.log_every,
            save_strategy="steps" if experiment.save_every else "no",
            save_steps=experiment.save_every or 500,
            save_total_limit=experiment.keep,
            report_to=list(experiment.report_to),
            seed=experiment.seed,
            disable_tqdm=not progress,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            **chosen,
        )
    except ValueError as error:
        raise ConfigError(f"transformers refuses the settings: {error}") from error


def _write(path: Path, text: str) -> None:
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
