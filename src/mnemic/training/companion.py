"""Companion: a trained small language model beside a host as its Memory Decoder (2508.09874), and its weight."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..core.errors import ConfigError, HostError, InputError, StateError
from ..hosts import attach
from ..hosts.attach import base_model
from ..memories.parametric.memory_decoder import MemoryDecoder, MemoryDecoderConfig

_LEFT_OUT = ("architectures", "transformers_version", "dtype", "_name_or_path", "tie_word_embeddings")


def attach_companion(
    host: Any,
    companion: Any,
    *,
    alpha: float = 0.25,
    segment: int | None = None,
    tokenizers: tuple[Any, Any] | None = None,
) -> Any:
    """Put a trained small model beside `host` as its Memory Decoder; returns the attached model.

    Args:
        companion: a causal language model of transformers, which is copied, or a folder saved by one.
        tokenizers: of the host and of the companion, to be compared.

    Raises:
        StateError: the tokenizers give a token different ids. HostError: a companion that is no language model.
    """
    if tokenizers is not None:
        check_tokenizers(*tokenizers)
    source = _source(companion)
    described = {k: v for k, v in source.config.to_diff_dict().items() if k not in _LEFT_OUT}
    described |= {"model_type": source.config.model_type, "vocab_size": source.config.vocab_size}
    model = attach(host, MemoryDecoderConfig(alpha=alpha, model=described), segment=segment)
    load_companion(model, source)
    return model


def load_companion(model: Any, companion: Any, *, tokenizers: tuple[Any, Any] | None = None) -> None:
    """Copy the weights of a trained small model into the Memory Decoder of `model`.

    Args:
        companion, tokenizers: as for `attach_companion`.

    Raises:
        HostError: the memory is another one. StateError: a companion of another architecture or width, or tokenizers
            that give a token different ids.
    """
    if tokenizers is not None:
        check_tokenizers(*tokenizers)
    memory, source = _decoder(model), _source(companion)
    try:
        memory.companion.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise StateError(
            f"The {type(source).__name__} does not fit the model that the memory's config describes ({error}); use "
            "attach_companion, which takes the description from it."
        ) from error


def check_tokenizers(host: Any, companion: Any) -> None:
    """Raises `StateError` unless every token that both tokenizers know has the same id in both."""
    mine, theirs = host.get_vocab(), companion.get_vocab()
    shared = mine.keys() & theirs.keys()
    moved = sorted(token for token in shared if mine[token] != theirs[token])
    if moved or len(shared) < min(len(mine), len(theirs)):
        detail = f"{moved[0]!r} is {mine[moved[0]]} and {theirs[moved[0]]}" if moved else f"{len(shared)} tokens shared"
        raise StateError(
            f"The tokenizers of the host ({len(mine)} tokens) and of the companion ({len(theirs)}) differ: {detail}. "
            "Use a companion of the host's tokenizer, or retrain its embeddings for it."
        )


@torch.no_grad()
def tune_alpha(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Set alpha to what predicts validation text best, and return it.

    The mean log-likelihood log((1 - alpha) p_host + alpha p_memory) is concave in alpha, so its maximum is found by
    halving an interval: no grid, and one pass of each model.

    Args:
        model: a host with a Memory Decoder. batches: as a collator makes them: input_ids (B, T), and if present
            attention_mask (B, T) and labels (B, T), -100 for tokens that do not count.

    Raises:
        HostError: another memory. InputError: no token to predict.
    """
    memory, training = _decoder(model), model.training
    before, found = memory.config, {0.0: [], 1.0: []}
    model.eval()
    try:
        for batch in batches:
            ids, mask = batch["input_ids"].to(model.device), batch.get("attention_mask")
            labels = batch.get("labels")
            labels = ids if labels is None else labels.to(ids.device)
            labels = labels if mask is None else labels.masked_fill(mask.to(labels.device) == 0, -100)
            wanted = labels[:, 1:] != -100
            for alpha, parts in found.items():
                memory.config = before.replace(alpha=alpha)
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][wanted]
                spoken = logits.double().log_softmax(-1).gather(-1, labels[:, 1:][wanted][:, None])
                parts.append(spoken.squeeze(-1))
    finally:
        memory.config = before
        model.train(training)
    if not sum(len(p) for p in found[0.0]):
        raise InputError("The batches have no token to predict; give rows of at least two tokens with labels.")
    alpha = best_weight(torch.cat(found[0.0]), torch.cat(found[1.0]))
    memory.config = before.replace(alpha=alpha)
    return alpha


def best_weight(log_host: Tensor, log_memory: Tensor) -> float:
    """alpha in [0, 1] with the largest mean of log((1 - alpha) exp(log_host) + alpha exp(log_memory)), (N,) each."""
    ratio = (log_memory - log_host).double().clamp(-600, 600).exp()

    def slope(alpha: float) -> float:
        return float(((ratio - 1) / (1 - alpha + alpha * ratio)).mean())

    if slope(0.0) <= 0 or slope(1.0) >= 0:
        return 0.0 if slope(0.0) <= 0 else 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def _decoder(model: Any) -> MemoryDecoder:
    memory = getattr(base_model(model), "memory", None)
    if not isinstance(memory, MemoryDecoder):
        raise HostError(
            f"{type(model).__name__} has no Memory Decoder (its memory is {getattr(memory, 'name', None)!r}); attach "
            "'memory-decoder', or use attach_companion."
        )
    return memory


def _source(companion: Any) -> PreTrainedModel:
    if isinstance(companion, str | os.PathLike):
        if not (Path(companion) / "config.json").is_file():
            raise ConfigError(f"{companion} is no folder of a saved model: it has no config.json.")
        companion = AutoModelForCausalLM.from_pretrained(companion)
    if not isinstance(companion, PreTrainedModel) or companion.get_output_embeddings() is None:
        raise HostError(f"{type(companion).__name__} is no causal language model of transformers.")
    return companion
