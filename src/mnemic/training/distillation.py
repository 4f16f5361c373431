"""Distillation: a small causal language model learns the kNN distributions of a domain (Memory Decoder, 2508.09874)."""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..core.errors import ConfigError, HostError
from ..ops.mixture import knn_loss
from .neighbour_targets import NeighbourTargets, TargetExample


class TargetCollator:
    """Examples -> input_ids and attention_mask (B, T), tokens and probs (B, T - 1, w), padded on the right."""

    def __call__(self, examples: Sequence[TargetExample]) -> dict[str, Tensor]:
        width = max(e["tokens"].shape[1] for e in examples)

        def rows(name: str) -> Tensor:
            wide = [torch.nn.functional.pad(e[name], (0, width - e[name].shape[1])) for e in examples]
            return pad_sequence(wide, batch_first=True)

        ids = [e["input_ids"] for e in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "tokens": rows("tokens"),
            "probs": rows("probs"),
        }


class DistillationTrainer(Trainer):
    """`transformers.Trainer` with the loss beta KL(p_kNN || p_model) + (1 - beta) CE, mean over positions.

    Raises:
        ConfigError: beta outside of [0, 1].
    """

    def __init__(self, model: Any, *args: Any, beta: float, **kwargs: Any):
        if not 0 <= beta <= 1:
            raise ConfigError(f"beta is {beta}; expected a weight in [0, 1].")
        super().__init__(model, *args, data_collator=TargetCollator(), **kwargs)
        self.beta = beta
        # Otherwise Trainer expects a loss that is divided by all tokens of accumulated batches already.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return_outputs = kwargs.get("return_outputs", args[0] if args else False)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
        real = mask[:, 1:].bool()
        logits, labels = outputs.logits[:, :-1][real], ids[:, 1:][real]
        loss = knn_loss(logits, inputs["tokens"][real], inputs["probs"][real], labels, self.beta)
        return (loss, outputs) if return_outputs else loss


def distil(
    memory_model: Any,
    dataset: Dataset,
    *,
    steps: int,
    learning_rate: float,
    beta: float = 0.5,
    batch_size: int = 16,
    accumulation: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> TrainOutput:
    """Train `memory_model` in place: shuffled, AdamW, linear schedule, gradients clipped at 1.

    Args:
        dataset: of `TargetExample`s, such as `NeighbourTargets`. beta: weight of the divergence; 0 is plain training.
        accumulation: batches of a step.

    Raises:
        HostError: the model's vocabulary is smaller than that of the targets. ConfigError: beta outside of [0, 1].
    """
    if isinstance(dataset, NeighbourTargets):
        size, needed = memory_model.get_input_embeddings().weight.shape[0], dataset.header["vocabulary"]
        if size < needed:
            raise HostError(
                f"{type(memory_model).__name__} has {size} tokens, the targets were built with {needed}; use a model "
                "of the same tokenizer, or resize and train its embeddings first."
            )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, learning_rate=learning_rate, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation, seed=seed, save_strategy="no", report_to=[],
            remove_unused_columns=False, disable_tqdm=not progress, logging_steps=max(1, steps // 20),
            logging_strategy="steps" if progress else "no",
        )  # fmt: skip
        return DistillationTrainer(memory_model, arguments, train_dataset=dataset, beta=beta).train()
