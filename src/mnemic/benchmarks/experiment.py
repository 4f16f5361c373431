"""Experiments: one configuration -> a trained model, its log, and its scores, in one folder.

A run folder holds `experiment.toml` (every setting, resolved), the model saved whole, its tokenizer, `log.json` (what
the Trainer logged) and, after evaluation, `results*.json`. Equal settings give equal runs on one machine.
"""

import dataclasses
import json
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)

from ..core.errors import ConfigError, DataError, InputError, UnknownNameError
from ..core.memory import check_option, option
from ..core.registry import memory_class, memory_config
from ..core.truncation import Truncation
from ..hosts import attach, parameter_report, save
from ..hosts.anatomy import host_spec
from ..training import Collator, LossProgress, MemoryTrainer, SegmentLaw, TextExamples, word_tokenizer
from . import babi
from .babilong import data_folder
from .background import named
from .examples import BabilongExamples, RecallExamples
from .recall import RecallTask

TASKS = ("recall", "babilong", "text")
SETTINGS, LOG = "experiment.toml", "log.json"
SMALL_HOST = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
"""A fresh host where `host_options` does not say otherwise: it trains on a laptop."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that fixes a run.

    Raises:
        ConfigError: settings that cannot be; UnknownNameError: unknown keys, memory or task.
    """

    memory: str = option("lm2", "memory to train: a name, or name:preset")
    memory_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of the memory"})
    host: str = option("llama", "architecture of a fresh host, or the folder or hub name of a pretrained one")
    host_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of a fresh host's config; small by default"}
    )
    parameters: int | None = option(None, "widen a fresh host's feed-forward to so many parameters, memory included")
    task: str = option("babilong", "what to train on: recall, babilong or text")
    tasks: tuple[str, ...] = option(("qa1",), "BABILong tasks, drawn in turn")
    recall_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "sizes of the recall task"})
    fact_segment: int | None = option(None, "recall: the segment of the fact (0: the first); None for any")
    vary_length: bool = option(True, "babilong: samples end anywhere in their last segment, not always at one place")
    data: str | None = option(None, "folder with the released bAbI files and books; for text: a .txt file or folder")
    vocabulary: int = option(4096, "words of the tokenizer made for a fresh host", minimum=16)
    segment: int = option(64, "tokens of a segment", minimum=1)
    least_segments: int = option(1, "fewest segments of a sample", minimum=1)
    most_segments: tuple[int, ...] = option(
        (4,), "most segments of a sample, one number for each stage of a curriculum"
    )
    steps: int = option(1000, "optimiser steps", minimum=1)
    batch_size: int = option(32, "samples of a step", minimum=1)
    learning_rate: float = option(1e-3, "peak learning rate", minimum=0)
    memory_learning_rate: float | None = option(None, "learning rate of the memory; None for the same", minimum=0)
    warmup_steps: int = option(100, "steps of linear warm-up", minimum=0)
    schedule: str = option("linear", "learning-rate schedule, as transformers names it")
    weight_decay: float = option(0.01, "weight decay", minimum=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", minimum=0)
    truncation: str | None = option(None, "truncated BPTT: 'tail:K' or 'chunk:K'; None for full")
    seed: int = option(0, "seed of weights and data", minimum=0)
    log_every: int = option(50, "steps between two lines of the log", minimum=1)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            check_option("experiment", f, hints[f.name], getattr(self, f.name))
        if not all(isinstance(n, int) for n in self.most_segments):
            raise ConfigError(f"most_segments = {list(self.most_segments)!r}, expected whole numbers.")
        if self.task not in TASKS:
            raise UnknownNameError.of("task", self.task, TASKS)
        memory_config(self.memory, **self.memory_options)
        for name in self.tasks:
            if name not in babi.GENERATED_TASKS and self.task == "babilong" and data_folder(self.data) is None:
                raise ConfigError(f"{name} has no generator; give data=, a folder with the released bAbI files.")
        known = [f.name for f in dataclasses.fields(RecallTask)]
        for key in self.recall_options:
            if key not in known:
                raise ConfigError(str(UnknownNameError.of("size of the recall task", key, known)))
        if self.task == "recall":
            recall_task(self)
        self.law()
        self.parsed_truncation()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Experiment":
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(str(UnknownNameError.of("setting of an experiment", key, known)))
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)

    @classmethod
    def read(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "Experiment":
        """From a TOML file, with overrides on top; `memory_options` and the like are merged key by key."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"Cannot read the experiment {path}: {error.strerror}.") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is no valid TOML: {error}.") from error
        for key, value in (overrides or {}).items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return cls.from_dict(values)

    def to_toml(self) -> str:
        lines, tables = [], []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, dict):
                tables += [f"\n[{f.name}]"] + [f"{k} = {_toml(v)}" for k, v in value.items()] if value else []
            elif value is not None:
                lines.append(f"{f.name} = {_toml(value)}")
        return "\n".join(lines + tables) + "\n"

    def law(self) -> SegmentLaw:
        stage = max(self.steps // len(self.most_segments), 1)
        return SegmentLaw(self.least_segments, self.most_segments, self.batch_size, stage)

    def parsed_truncation(self) -> Truncation | None:
        if self.truncation is None:
            return None
        policy, _, depth = self.truncation.partition(":")
        if policy not in ("tail", "chunk") or not depth.isdigit():
            raise ConfigError(f"truncation = {self.truncation!r}, expected 'tail:K' or 'chunk:K' with a number K.")
        return Truncation("tail" if policy == "tail" else "chunk", int(depth))


def run(
    experiment: Experiment,
    folder: str | Path,
    *,
    progress: bool = True,
    announce: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Train as `experiment` says and leave everything in `folder`.

    Args:
        announce: called with the untrained model before the first step.

    Returns: what `log.json` holds: parameters, seconds, tokens, versions, and the Trainer's log.

    Raises:
        InputError: the folder holds another run.
    """
    folder = Path(folder)
    settings = folder / SETTINGS
    if settings.exists() and settings.read_text(encoding="utf-8") != experiment.to_toml():
        raise InputError(f"{folder} holds a run with other settings; choose another folder or delete it.")
    set_seed(experiment.seed)
    model, tokenizer = build(experiment)
    examples = _examples(experiment, model, tokenizer)
    if announce is not None:
        announce(model)
    # Only now: settings that cannot be run must not claim the folder.
    folder.mkdir(parents=True, exist_ok=True)
    settings.write_text(experiment.to_toml(), encoding="utf-8")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=experiment.steps,
        per_device_train_batch_size=experiment.batch_size,
        learning_rate=experiment.learning_rate,
        warmup_steps=experiment.warmup_steps,
        lr_scheduler_type=experiment.schedule,
        weight_decay=experiment.weight_decay,
        max_grad_norm=experiment.max_grad_norm,
        logging_steps=experiment.log_every,
        save_strategy="no",
        report_to=[],
        seed=experiment.seed,
        disable_tqdm=not progress,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = MemoryTrainer(
        model,
        arguments,
        train_dataset=examples,
        data_collator=Collator(),
        truncation=experiment.parsed_truncation(),
        memory_learning_rate=experiment.memory_learning_rate,
        log_memory=True,
    )
    trainer.remove_callback(ProgressCallback if progress else PrinterCallback)
    if progress:
        trainer.add_callback(LossProgress)
    started = time.perf_counter()
    trainer.train()
    log = {
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": parameter_report(model),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "device": str(trainer.args.device),
        "history": trainer.state.log_history,
    }
    save(model, folder, whole=True)
    tokenizer.save_pretrained(folder)
    (folder / LOG).write_text(json.dumps(log, indent=1), encoding="utf-8")
    return log


def build(experiment: Experiment) -> tuple[Any, Any]:
    """The model with its memory, untrained, and its tokenizer."""
    fresh = experiment.host in architectures()
    if experiment.task == "recall":
        tokenizer = recall_task(experiment).tokenizer()
    elif fresh:
        tokenizer = _word_tokenizer(experiment)
    else:
        tokenizer = AutoTokenizer.from_pretrained(experiment.host)
    host: Any = _fresh_config(experiment, tokenizer) if fresh else experiment.host
    model = attach(host, experiment.memory, segment=experiment.segment, **experiment.memory_options)
    return model, tokenizer


def architectures() -> set[str]:
    """Architectures that a fresh host can have."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def recall_task(experiment: Experiment) -> RecallTask:
    """The recall task that `experiment` trains on."""
    return RecallTask(**{**experiment.recall_options, "segment_length": experiment.segment})


def _fresh_config(experiment: Experiment, tokenizer: Any) -> Any:
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = {**SMALL_HOST, "vocab_size": len(tokenizer), **special, **experiment.host_options}
    if experiment.parameters is None:
        return AutoConfig.for_model(experiment.host, **settings)

    def count(width: int) -> int:
        config = AutoConfig.for_model(experiment.host, **{**settings, "intermediate_size": width})
        with torch.device("meta"):
            host = AutoModelForCausalLM.from_config(config)
            own = memory_config(experiment.memory, **experiment.memory_options)
            memory = memory_class(own.name)(own, host_spec(host))
        return sum(p.numel() for part in (host, memory) for p in part.parameters())

    # The number of parameters is linear in the width of the feed-forward.
    base, slope = count(8), (count(16) - count(8)) // 8
    width = 8 + round((experiment.parameters - base) / slope)
    if width < 8:
        raise ConfigError(f"parameters = {experiment.parameters}: this host and memory have at least {base}.")
    return AutoConfig.for_model(experiment.host, **{**settings, "intermediate_size": width})


def _word_tokenizer(experiment: Experiment) -> Any:
    if experiment.task == "text":
        return word_tokenizer(_texts(experiment), experiment.vocabulary)
    folder = data_folder(experiment.data)
    background = [d.text for d in named("books" if folder else "prose", "train", folder)]
    stories = []
    for task in experiment.tasks:
        if folder is None:
            samples = list(islice(babi.stream(task, 0, "train"), 2000))
        else:
            samples = babi.read(folder, task, "train")[:2000]
        stories += [" ".join([*s.facts, s.question, s.answer]) for s in samples]
    return word_tokenizer(background, experiment.vocabulary, always=stories)


def _examples(experiment: Experiment, model: Any, tokenizer: Any) -> Any:
    law = experiment.law()
    if experiment.task == "recall":
        return RecallExamples(recall_task(experiment), law, experiment.seed, fact_segment=experiment.fact_segment)
    if experiment.task == "babilong":
        return BabilongExamples(
            experiment.tasks,
            tokenizer,
            experiment.segment,
            law,
            data=experiment.data,
            seed=experiment.seed,
            vary_length=experiment.vary_length,
        )
    documents = [tokenizer(text)["input_ids"] for text in _texts(experiment)]
    return TextExamples(documents, experiment.segment, law, experiment.seed)


def _texts(experiment: Experiment) -> list[str]:
    if experiment.data is None:
        return [d.text for d in named("prose", "train", None)]
    path = Path(experiment.data)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise DataError(f"{path} is no .txt file and no folder with any; task text reads plain text.")
    return [f.read_text(encoding="utf-8") for f in files]


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    # JSON strings, numbers and booleans are TOML.
    return json.dumps(value)
