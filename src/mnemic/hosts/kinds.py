"""Kinds of hosts, and which memories stand on them."""

import inspect
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from ..core.errors import HostError, MnemicError
from ..core.memory import HostKind, MemoryConfig
from ..core.registry import memory_class, memory_names
from ..core.stack import StackConfig

EXAMPLES = {
    "decoder": "decoder-only language model such as LlamaForCausalLM",
    "encoder": "encoder such as BertForSequenceClassification",
    "encoder-decoder": "encoder-decoder such as BartForConditionalGeneration",
}


def kind_of(host: type[PreTrainedModel], config: PreTrainedConfig) -> HostKind:
    """What kind of host a class of transformers is."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    generates = host.can_generate() or "past_key_values" in inspect.signature(host.forward).parameters
    return "decoder" if generates else "encoder"


def check_kind(host: str, kind: HostKind, config: MemoryConfig) -> None:
    """Raises `HostError` unless all memories of `config` stand on hosts of this kind."""
    parts = config.memories if isinstance(config, StackConfig) else (config,)
    for name in [c.name for c in parts] + [config.name]:
        stands = memory_class(name).hosts
        if kind not in stands:
            needed = " or ".join(text for known, text in EXAMPLES.items() if known in stands)
            others = ", ".join(memories_on(kind))
            raise HostError(
                f"{host} is no {needed}, on which alone the memory {name!r} stands, but of the kind {kind!r}. Memories "
                f"that stand there: {others or 'none'}."
            )


def memories_on(kind: HostKind) -> list[str]:
    """Names of the memories that stand on hosts of this kind."""
    found = []
    for name in memory_names():
        try:
            stands = memory_class(name).hosts
        except (ImportError, MnemicError):
            # Another package's memory that cannot be imported stands nowhere.
            continue
        if kind in stands:
            found.append(name)
    return found


def loader_of(config: PreTrainedConfig) -> Any:
    """The class to load or build a host of this config with: the one it was saved with where that is an encoder or an
    encoder-decoder, else transformers' own choice for encoder-decoders or causal language models."""
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and kind_of(named, config) != "decoder":
        return named
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


_LOCATING = ("cache_dir", "code_revision", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_host(where: Any, **options: Any) -> PreTrainedModel:
    """The host in a folder or on the hub, as it was saved; options: of transformers' `from_pretrained`.

    Raises:
        OSError, ValueError: as transformers does.
    """
    found = {name: options[name] for name in (*_LOCATING, "trust_remote_code") if name in options}
    config = options.get("config") or AutoConfig.from_pretrained(where, **found)
    return loader_of(config).from_pretrained(where, **options)
