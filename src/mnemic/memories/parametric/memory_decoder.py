"""Memory Decoder: A Pretrained, Plug-and-Play Memory for Large Language Models (2025, arXiv 2508.09874).

A small causal language model that has learned to imitate the nearest-neighbour retriever of a domain runs beside any
host of the same tokenizer, and their next-token distributions are mixed:

    p(y | x) = alpha p_memory(y | x) + (1 - alpha) p_host(y | x)

It is trained alone, on `NeighbourTargets` with `distil`; `mnemic.training.companion` puts it on a host and tunes alpha.

Decisions:
- It reads the same segments as the host, with keys and values of its own.
- alpha = 0 gives the host's logits untouched, and the memory still reads, so that alpha may change within a stream.
- Where one vocabulary is padded further than the other, the mixture is over the ids that both have, and the rest of
  the host's has no probability; at alpha = 0 nothing is cut.
- Its input and output embeddings are two matrices, also where those it was trained with were one: files of weights
  hold every tensor once.
- A mixture is normalised log-probabilities, in the host's dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ...core.errors import ConfigError
from ...core.memory import HostSpec, Memory, MemoryConfig, option
from ...core.step import Step
from ...ops.mixture import mix_logits

SMALL: Mapping[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
"""The model where none is given: about 4 million weights and two embeddings."""


@dataclass(frozen=True, kw_only=True)
class MemoryDecoderConfig(MemoryConfig):
    name = "memory-decoder"

    alpha: float = option(0.25, "weight of the memory in the mixture; tune it on validation text", minimum=0, maximum=1)
    model: dict | None = option(  # noqa: RUF009 - makes a field
        None, "configuration of the small language model, as transformers saves it, with its model_type; None: a Llama"
    )

    def validate(self) -> None:
        if self.model is not None and not isinstance(self.model.get("model_type"), str):
            raise ConfigError(
                "memory-decoder: model has no model_type, such as 'llama' or 'gpt2'; give the content of a config.json."
            )


class MemoryDecoder(Memory):
    name = "memory-decoder"
    config_class = MemoryDecoderConfig
    paper = "Memory Decoder: A Pretrained, Plug-and-Play Memory for Large Language Models (2025, arXiv 2508.09874)"
    state_size = "0"
    limits: ClassVar[Mapping[str, str]] = {
        "input embeddings": "the second model has embeddings of its own: it reads ids"
    }
    config: MemoryDecoderConfig

    def __init__(self, config: MemoryDecoderConfig, host: HostSpec):
        super().__init__(config, host)
        self.model = _built({**SMALL, **_room(host)} if config.model is None else config.model, host)

    @property
    def companion(self) -> PreTrainedModel:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model

    @property
    def identity_at_attach(self) -> bool:
        return self.config.alpha == 0

    def logits(self, logits: Tensor, step: Step) -> Tensor:
        if self.config.alpha == 0:
            return logits
        mixed = mix_logits(logits, step.companion_logits, self.config.alpha).to(logits.dtype)
        return F.pad(mixed, (0, logits.shape[-1] - mixed.shape[-1]), value=float("-inf"))


def _room(host: HostSpec) -> dict[str, Any]:
    return {} if host.max_positions is None else {"max_position_embeddings": host.max_positions}


def _built(values: Mapping[str, Any], host: HostSpec) -> PreTrainedModel:
    """A new model of the description; the host's vocabulary where it names none.

    Raises:
        ConfigError: no causal language model is described.
    """
    given = {"vocab_size": host.vocab_size, **values, "tie_word_embeddings": False}
    kind = given.pop("model_type")
    try:
        config = AutoConfig.for_model(kind, **given)
        model = AutoModelForCausalLM.from_config(config, dtype=host.dtype)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"memory-decoder: model describes no causal language model of transformers ({error}); give the content of "
            "a config.json, such as that of a small Llama or GPT-2."
        ) from error
    return model.to(host.device)
