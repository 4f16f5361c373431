"""Building: the model, the tokenizer and the samples that an experiment trains with."""

import dataclasses
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError, DataError, MissingExtraError
from ..core.registry import memory_class, memory_config
from ..hosts import add_lora, attach, freeze_host
from ..hosts.anatomy import host_spec
from ..training import CorpusSamples, Mixture, StatefulRows, TextExamples, word_tokenizer
from ..training.tokenizer import numbered_tokenizer, tokenizer_fingerprint
from . import babi
from .associative import TokenExamples
from .babilong import data_folder
from .background import named
from .chomsky import FormalExamples, FormalTask, formal_task
from .examples import BabilongExamples, RecallExamples
from .recall import RecallTask
from .stories import StoryExamples
from .token_tasks import TASKS, token_task

if TYPE_CHECKING:
    from .experiment import Experiment

SMALL_HOST = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
"""A fresh host where `host_options` does not say otherwise: it trains on a laptop."""


def build(experiment: "Experiment", tokenizer: Any = None) -> tuple[Any, Any]:
    """The model with its memory, untrained, and its tokenizer; `tokenizer`: this one, and none is made."""
    fresh = experiment.host in architectures()
    if tokenizer is not None:
        pass
    elif experiment.task == "recall":
        tokenizer = task_of(experiment).tokenizer()
    elif experiment.task == "chomsky":
        tokenizer = numbered_tokenizer(formal_task_of(experiment)[0].vocabulary)
    elif experiment.task in TASKS:
        tokenizer = numbered_tokenizer(task_of(experiment).vocabulary)
    elif experiment.prepared:
        tokenizer = _shard_tokenizer(experiment, fresh)
    elif fresh:
        tokenizer = _word_tokenizer(experiment)
    else:
        tokenizer = AutoTokenizer.from_pretrained(experiment.host)
    host: Any = _fresh_config(experiment, tokenizer) if fresh else experiment.host
    model = attach(host, experiment.memory, segment=experiment.segment, **experiment.memory_options)
    if experiment.freeze == "host":
        freeze_host(model)
    return model if experiment.lora is None else _with_lora(model, experiment.lora), tokenizer


def _with_lora(model: Any, rank: int) -> Any:
    """On every linear layer of the host, scaled by 2."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("lora needs the package peft: pip install 'mnemic[peft]'.") from error
    head, linear = model.get_output_embeddings(), (nn.Linear, Conv1D)
    # Whole names: "all-linear" would take those of the memory as well.
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, linear) and module is not head and not name.startswith("memory.")
    ]
    settings: Any = {"r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM", "target_modules": names}
    return add_lora(model, peft.LoraConfig(**settings))


def architectures() -> set[str]:
    """Architectures that a fresh host can have."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def task_of(experiment: "Experiment") -> Any:
    """The recall task or token-level task that `experiment` trains on."""
    if experiment.task == "recall":
        known = {f.name for f in dataclasses.fields(RecallTask)} - {"segment_length"}
        ConfigError.check_names("size of recall", experiment.task_options, known)
        return RecallTask(**experiment.task_options, segment_length=experiment.counted)
    return token_task(experiment.task, experiment.task_options, experiment.counted)


def formal_task_of(experiment: "Experiment") -> tuple[FormalTask, int, int]:
    """The formal language that `experiment` trains on, its longest samples, and the blanks for each symbol."""
    if len(experiment.tasks) != 1:
        raise ConfigError(f"tasks = {list(experiment.tasks)}: chomsky trains on one language; name one.")
    ConfigError.check_names("size of chomsky", experiment.task_options, ("longest", "steps"))
    longest, steps = (experiment.task_options.get(key, value) for key, value in (("longest", 40), ("steps", 0)))
    return formal_task(experiment.tasks[0]), longest, steps


def story_options(experiment: "Experiment") -> dict[str, Any]:
    """Options of task "stories", as `StoryExamples` takes them."""
    ConfigError.check_names("option of stories", experiment.task_options, ("growth", "facts"))
    growth = experiment.task_options.get("growth", (0, 0))
    if len(growth) != 2 or not all(isinstance(step, int) for step in growth) or not 0 <= growth[0] <= growth[1]:
        raise ConfigError(f"growth = {list(growth)}, expected two steps, the first not after the second.")
    facts = experiment.task_options.get("facts")
    if facts is not None and (not isinstance(facts, int) or facts < 1):
        raise ConfigError(f"facts = {facts!r}, expected a number of facts, at least 1.")
    return {"growth": tuple(growth), "facts": facts}


def _fresh_config(experiment: "Experiment", tokenizer: Any) -> Any:
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


def _shard_tokenizer(experiment: "Experiment", fresh: bool) -> Any:
    assert experiment.data is not None
    tokenizer = Mixture.open(experiment.data).tokenizer()
    if not fresh:
        own = AutoTokenizer.from_pretrained(experiment.host)
        if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
            raise DataError(
                f"{experiment.data} was not prepared with the tokenizer of {experiment.host}; prepare it again with "
                f"--tokenizer {experiment.host}."
            )
    return tokenizer


def _word_tokenizer(experiment: "Experiment") -> Any:
    folder = data_folder(experiment.data) if experiment.task != "text" or experiment.vocabulary_tasks else None
    if experiment.task == "text":
        background, tasks = _texts(experiment), experiment.vocabulary_tasks or ()
    else:
        background = [d.text for d in named("books" if folder else "prose", "train", folder)]
        tasks = (*experiment.tasks, *(experiment.vocabulary_tasks or ()))
    stories = []
    for task in dict.fromkeys(tasks):
        if folder is None:
            samples = list(islice(babi.stream(task, 0, "train"), 2000))
        else:
            samples = babi.read(folder, task, "train")[:2000]
        stories += [" ".join([*s.facts, s.question, s.answer]) for s in samples]
    return word_tokenizer(background, experiment.vocabulary, always=stories)


def examples(experiment: "Experiment", model: Any, tokenizer: Any) -> Any:
    law = experiment.law()
    if experiment.task == "recall":
        return RecallExamples(task_of(experiment), law, experiment.seed, fact_segment=experiment.fact_segment)
    if experiment.task == "chomsky":
        task, longest, steps = formal_task_of(experiment)
        return FormalExamples(task, experiment.batch_size, experiment.seed, lengths=(1, longest), steps=steps)
    if experiment.task in TASKS:
        task = task_of(experiment)
        return TokenExamples(task, experiment.seed, law if hasattr(task, "with_segments") else None)
    if experiment.task == "babilong":
        return BabilongExamples(
            experiment.tasks,
            tokenizer,
            experiment.counted,
            law,
            data=experiment.data,
            seed=experiment.seed,
            vary_length=experiment.vary_length,
        )
    if experiment.task == "stories":
        options = story_options(experiment)
        return StoryExamples(
            experiment.tasks, tokenizer, experiment.counted, law, data=experiment.data, seed=experiment.seed, **options
        )
    if experiment.prepared:
        assert experiment.data is not None
        mixture = Mixture.open(experiment.data, seed=experiment.seed)
        if experiment.stateful:
            rows = experiment.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
            return StatefulRows(mixture, experiment.counted, experiment.most_segments[-1], rows)
        return CorpusSamples(mixture, experiment.counted, law)
    documents = [tokenizer(text)["input_ids"] for text in _texts(experiment)]
    return TextExamples(documents, experiment.counted, law, experiment.seed)


def _texts(experiment: "Experiment") -> list[str]:
    if experiment.data is None or (Path(experiment.data) / "gutenberg-books").is_dir():
        return [d.text for d in named("auto", "train", data_folder(experiment.data))]
    path = Path(experiment.data)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise DataError(f"{path} is no .txt file and no folder with any; task text reads plain text.")
    return [f.read_text(encoding="utf-8") for f in files]
