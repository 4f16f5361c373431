"""Experiments: one configuration -> a trained model, its log, and its scores, in one folder.

A run folder holds `experiment.toml` (every setting, resolved), the model, its tokenizer, `log.json` (what the Trainer
logged), `summary.json`, `curves.png`, checkpoints, and, after evaluation, `results*.json`. Equal settings give equal
runs on one machine.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from ..core.errors import ConfigError, UnknownNameError
from ..core.memory import check_option, option
from ..core.registry import memory_config
from ..core.truncation import Truncation
from ..training import SegmentLaw
from ..training.mixture import is_prepared
from . import babi
from .building import architectures, formal_task_of, story_options, task_of
from .token_tasks import TASKS as TOKEN_TASKS

TASKS = ("babilong", "stories", "text", "recall", "chomsky", *TOKEN_TASKS)
SETTINGS, LOG = "experiment.toml", "log.json"


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
    task: str = option("babilong", "what to train on: babilong, stories, text, recall, chomsky or a token task")
    tasks: tuple[str, ...] = option(("qa1",), "bAbI tasks, drawn in turn; chomsky: the one language")
    task_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "sizes of recall or of a token-level task; stories: growth, facts"}
    )
    fact_segment: int | None = option(None, "recall: the segment of the fact (0: the first); None for any")
    vary_length: bool = option(True, "babilong: samples end anywhere in their last segment, not always at one place")
    data: str | None = option(
        None,
        "folder with the released bAbI files and books; for text that, a .txt file or folder, or what mnemic prepare "
        "wrote (a folder, or a mixture of them as TOML)",
    )
    stateful: bool = option(False, "prepared text: rows of a batch read on where the last batch stopped")
    vocabulary: int = option(4096, "words of the tokenizer made for a fresh host", minimum=16)
    vocabulary_tasks: tuple[str, ...] | None = option(None, "bAbI tasks whose words that tokenizer has besides")
    segment: int = option(64, "tokens of a segment", minimum=1)
    unit: int | None = option(
        None, "tokens that the numbers of segments below count; None for the segment's", minimum=1
    )
    least_segments: int = option(1, "fewest segments of a sample", minimum=1)
    most_segments: tuple[int, ...] = option(
        (4,), "most segments of a sample, one number for each stage of a curriculum"
    )
    steps: int = option(1000, "optimiser steps", minimum=1)
    batch_size: int = option(32, "samples of a batch", minimum=1)
    gradient_accumulation: int = option(1, "batches of a step", minimum=1)
    learning_rate: float = option(1e-3, "peak learning rate", minimum=0)
    memory_learning_rate: float | None = option(None, "learning rate of the memory; None for the same", minimum=0)
    warmup_steps: int = option(100, "steps of linear warm-up", minimum=0)
    schedule: str = option("linear", "learning-rate schedule, as transformers names it")
    weight_decay: float = option(0.01, "weight decay", minimum=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", minimum=0)
    memory_weight_decay: float | None = option(None, "weight decay of the memory; None for the same", minimum=0)
    optim: str | None = option(None, "optimiser, as transformers names it; None for its default")
    freeze: str = option("none", "what is not trained: none or host")
    lora: int | None = option(None, "rank of LoRA on a pretrained host, which is then frozen", minimum=1)
    replay: bool = option(False, "keep the activations of one segment only, and run segments again going backward")
    chunked_loss: int | None = option(None, "tokens whose logits exist at a time; None for all of a sample", minimum=1)
    truncation: str | None = option(None, "truncated BPTT: 'tail:K' or 'chunk:K'; None for full")
    seed: int = option(0, "seed of weights and data", minimum=0)
    log_every: int = option(50, "steps between two lines of the log", minimum=1)
    save_every: int = option(500, "steps between two checkpoints; 0 for one at a signal only", minimum=0)
    keep: int = option(2, "checkpoints that are kept", minimum=1)
    report_to: tuple[str, ...] = option(("tensorboard",), "where the log goes too, as transformers names it")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            check_option("experiment", f, hints[f.name], getattr(self, f.name))
        if not all(isinstance(n, int) for n in self.most_segments):
            raise ConfigError(f"most_segments = {list(self.most_segments)!r}, expected whole numbers.")
        if self.task not in TASKS:
            raise UnknownNameError.of("task", self.task, TASKS)
        memory_config(self.memory, **self.memory_options)
        if self.freeze not in ("none", "host"):
            raise ConfigError(f"freeze = {self.freeze!r}, expected 'none' or 'host'.")
        if self.lora is not None and self.host in architectures():
            raise ConfigError("lora adapts a pretrained host; give host = a folder or hub name, or leave lora out.")
        if self.stateful and len(self.most_segments) > 1:
            raise ConfigError("stateful = true: rows take the same number of segments at every step; give one number.")
        if self.stateful and not self.prepared:
            raise ConfigError('stateful = true reads prepared text: task = "text", data = what mnemic prepare wrote.')
        for name in (*(self.tasks if self.on_stories else ()), *(self.vocabulary_tasks or ())):
            if name not in babi.GENERATED_TASKS:
                raise UnknownNameError.of("bAbI task", name, babi.GENERATED_TASKS)
        if self.task == "chomsky":
            formal_task_of(self)
        elif self.task == "stories":
            story_options(self)
        elif self.task not in ("babilong", "text"):
            task_of(self)
        elif self.task_options:
            raise ConfigError(f"task_options {self.task_options}: {self.task} has no sizes of its own.")
        self.law()
        self.parsed_truncation()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Experiment":
        known = {f.name for f in dataclasses.fields(cls)}
        ConfigError.check_names("setting of an experiment", values, known)
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

    @property
    def counted(self) -> int:
        """Tokens in which the lengths of samples are counted."""
        return self.segment if self.unit is None else self.unit

    @property
    def on_stories(self) -> bool:
        """Whether bAbI is what is learned: BABILong's samples, or stories with questions in between."""
        return self.task in ("babilong", "stories")

    @property
    def by_segments(self) -> bool:
        """Whether samples have the numbers of segments that are drawn here, not sizes of their own."""
        if self.task == "chomsky":
            return False
        return self.on_stories or self.task in ("text", "recall") or hasattr(task_of(self), "with_segments")

    @property
    def prepared(self) -> bool:
        """Whether the data are token shards."""
        return self.task == "text" and self.data is not None and is_prepared(self.data)

    def law(self) -> SegmentLaw:
        stage = max(self.steps * self.gradient_accumulation // len(self.most_segments), 1)
        return SegmentLaw(self.least_segments, self.most_segments, self.batch_size, stage)

    def parsed_truncation(self) -> Truncation | None:
        if self.truncation is None:
            return None
        policy, _, depth = self.truncation.partition(":")
        if policy not in ("tail", "chunk") or not depth.isdigit():
            raise ConfigError(f"truncation = {self.truncation!r}, expected 'tail:K' or 'chunk:K' with a number K.")
        return Truncation("tail" if policy == "tail" else "chunk", int(depth))


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    # JSON strings, numbers and booleans are TOML.
    return json.dumps(value)
