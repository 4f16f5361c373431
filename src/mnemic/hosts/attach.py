"""Attach a memory to a host, and detach it again.

Attaching either succeeds as a whole or leaves the host as it was. Before it returns, the model is tried on a dozen
tokens: a host that ignores masks, positions or keyword arguments is refused with the reason instead of giving wrong
numbers later.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.errors import ConfigError, HostError
from ..core.memory import HostKind, Memory, MemoryConfig
from ..core.registry import memory_class, memory_config
from ..core.stack import StackConfig
from . import probe
from .anatomy import Anatomy, attention_of, examine, host_spec
from .attention import NAMES, HostAccess, find_norms, switch
from .host import MemoryHost
from .kinds import check_kind, kind_of, load_host, loader_of
from .layout import Layout, host_spans
from .sites import LastHiddenHook, install_sites, remove_sites, replaced_modules
from .steps import Attachment, stand_on

DEFAULT_SEGMENT = 512


def attach(
    host: Any,
    memory: str | MemoryConfig | Sequence[str | MemoryConfig] = "lm2",
    *,
    segment: int | None = None,
    preset: str | None = None,
    check: bool = True,
    **options: Any,
) -> Any:
    """Give `host` a memory. The model is changed in place and returned; `detach` gives the host back.

    Args:
        host: a causal language model of transformers, the same under PEFT, a name or path to load one from, or a
            config to build a fresh one; for memories that stand on them, an encoder or encoder-decoder with its head.
        memory: a name ("lm2"), a name with preset ("lm2:paper"), a config, or a list of these, which stand on the host
            together, the first nearest to it (also "lm2+pkm").
        segment: tokens between two writes; by default 512, or what the host's positions allow.
        preset: for names; by default "attach" for hosts that exist (the host's logits are unchanged at first, where
            the memory can) and "default" for fresh configs.
        check: try the model on a few tokens before returning.
        options: single settings of the memory's config.

    Returns: the model, with `stream()`, `memory` and the host's own interface.

    Raises:
        UnknownNameError, ConfigError: the memory or its settings. HostError: the host, naming what it lacks.
    """
    fresh = isinstance(host, PreTrainedConfig)
    config = _config_for(memory, preset, fresh, options)
    model = _model_of(host)
    base = base_model(model)
    if is_attached(base):
        raise HostError(
            f"This {base.mnemic.host_class.__name__} already has the memory {base.memory.name!r}; detach it first."
        )
    anatomy = examine(base)
    kind = kind_of(type(base), base.config)
    check_kind(type(base).__name__, kind, config)
    way = _way(kind)
    if check:
        way.check_host(base, anatomy)
    try:
        module = memory_class(config.name)(config, host_spec(base))
        way.install(base, module, anatomy, segment)
        if check:
            way.check_memory(base)
    except BaseException:
        if is_attached(base):
            detach(base)
        raise
    module.train(base.training)
    return model


def detach(model: Any) -> Any:
    """Take the memory off; the host is what it was before, bit for bit (its own weights may have been trained).

    Raises:
        HostError: there is no memory.
    """
    base = base_model(model)
    if not is_attached(base):
        raise HostError(f"{type(base).__name__} has no memory to detach.")
    attached = base.mnemic
    for hook in attached.hooks:
        hook.remove()
    remove_sites(attached.sites)
    for parameter, trained in attached.replaced:
        parameter.requires_grad_(trained)
    if attached.backend in NAMES:
        switch(base, attached.access.attentions, {NAMES[attached.backend]: attached.backend})
    base.__class__ = base.mnemic.host_class
    del base.memory, base.mnemic
    return model


def is_attached(model: Any) -> bool:
    return isinstance(vars(base_model(model)).get("mnemic"), Attachment)


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def add_lora(model: Any, config: Any) -> Any:
    """LoRA on a host that has a memory: `peft.get_peft_model`, with the memory still trained.

    PEFT freezes everything that is not its own, the memory included; this puts the memory's flags back.
    """
    import peft

    flags = {name: p.requires_grad for name, p in model.memory.named_parameters()}
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in model.memory.named_parameters():
        parameter.requires_grad_(flags[name])
    return wrapped


def freeze_host(model: Any, frozen: bool = True) -> Any:
    """Train the memory only (or everything again). LoRA weights keep their flags; replaced weights stay frozen."""
    replaced = _replaced(model)
    for name, parameter in base_model(model).named_parameters():
        if not name.startswith("memory.") and "lora_" not in name and id(parameter) not in replaced:
            parameter.requires_grad_(not frozen)
    return model


def parameter_report(model: Any) -> dict[str, dict[str, int]]:
    """Numbers of parameters: {"host" | "memory" | "lora" | "replaced": {"total", "trainable"}}.

    "replaced" are the host's weights that a memory stands in the place of; they take no part.
    """
    report = {part: {"total": 0, "trainable": 0} for part in ("host", "memory", "lora", "replaced")}
    replaced = _replaced(model)
    for name, parameter in base_model(model).named_parameters():
        part = "memory" if name.startswith("memory.") else "lora" if "lora_" in name else "host"
        part = "replaced" if id(parameter) in replaced else part
        report[part]["total"] += parameter.numel()
        report[part]["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return report


def _replaced(model: Any) -> set[int]:
    base = base_model(model)
    return {id(p) for p, _ in base.mnemic.replaced} if is_attached(base) else set()


def install(base: PreTrainedModel, memory: Memory, anatomy: Anatomy, segment: int | None) -> None:
    """Put the memory in: class, hooks, layout. Undo with `detach`."""
    name = type(base).__name__
    if hasattr(base, "memory") or hasattr(base, "mnemic"):
        raise HostError(f"{name} has an attribute 'memory' or 'mnemic' of its own; those names are ours.")
    layout = _layout(name, memory, anatomy, segment)
    backend = str(base.config._attn_implementation)
    inside = memory.uses("attention") or memory.uses("keys_values")
    attentions = [attention_of(name, block) for block in anatomy.layers] if "attention" in memory.sites else []
    access = HostAccess(anatomy.stack, attentions)
    access.spans, access.embeddings = host_spans(base.config), base.get_input_embeddings()
    if inside and base.device.type != "meta":
        access.norms = find_norms(anatomy.layers, attentions, lambda: _run_once(base))
    sites = install_sites(name, memory, anatomy)
    hooks = []
    if memory.num_write_tokens or memory.keeps_hidden or memory.uses("logits"):
        hooks.append(anatomy.stack.register_forward_hook(LastHiddenHook(), with_kwargs=True))
    if inside:
        switch(base, attentions, {backend: NAMES[backend]})
    attachment = Attachment(
        host_class=type(base),
        layout=layout,
        stack=anatomy.stack,
        spans=access.spans,
        companion_spans=_companion_spans(memory, layout),
        backend=backend,
        access=access,
        max_positions=anatomy.max_positions,
        position_table=anatomy.position_table,
        sites=sites,
        replaced=[(p, p.requires_grad) for m in replaced_modules(memory, sites) for p in m.parameters()],
        hooks=hooks,
    )
    stand_on(base, MemoryHost, memory, attachment)


def _way(kind: HostKind) -> Any:
    """The module with `check_host`, `install` and `check_memory` for hosts of a kind."""
    if kind == "encoder":
        from . import encoder_attach

        return encoder_attach
    if kind == "encoder-decoder":
        from . import encoder_decoder_attach

        return encoder_decoder_attach
    return SimpleNamespace(check_host=probe.check_host, install=install, check_memory=probe.check_memory)


def _layout(name: str, memory: Memory, anatomy: Anatomy, segment: int | None) -> Layout:
    before = memory.first_position() if memory.host.rotary else 0
    around = before + (memory.num_read_tokens + memory.num_write_tokens) * memory.shifting_tokens
    limit = anatomy.max_positions
    if segment is None:
        segment = DEFAULT_SEGMENT if limit is None else min(DEFAULT_SEGMENT, limit - around)
        while limit is not None and segment > 1 and segment + around + _inner(memory, segment) > limit:
            segment -= 1
    if not isinstance(segment, int) or isinstance(segment, bool) or segment < 1:
        raise ConfigError(f"segment = {segment!r}, expected a number of tokens of at least 1.")
    around += _inner(memory, segment)
    if limit is not None and segment + around > limit:
        raise ConfigError(
            f"A segment of {segment} tokens with {around} memory tokens needs {segment + around} positions, but "
            f"{name} has {limit}; use segment={max(limit - around, 0)} or less."
        )
    return Layout(
        segment=segment,
        every=memory.commit_every(segment),
        sinks=memory.num_sinks,
        window=memory.window(segment) if memory.continuous else 0,
        read=memory.num_read_tokens,
        write=memory.num_write_tokens,
        bidirectional=memory.bidirectional_tokens,
        continuous=memory.continuous,
        offset=before,
        own=memory.owns_cache,
        inner=memory.num_inner_tokens,
        inner_every=memory.inner_every,
        shifting=memory.shifting_tokens,
        maskless=memory.makes_masks,
    )


def _inner(memory: Memory, segment: int) -> int:
    """Host positions that the inner tokens of a segment take."""
    return memory.num_inner_tokens * ((segment - 1) // memory.inner_every) * memory.shifting_tokens


def _companion_spans(memory: Memory, layout: Layout) -> dict:
    if memory.companion is None:
        return {}
    limit = getattr(memory.companion.config, "max_position_embeddings", None)
    if limit is not None and layout.segment > limit:
        raise ConfigError(
            f"The second model of {memory.name!r} has {limit} positions, a segment {layout.segment} tokens; use "
            f"segment={limit} or less."
        )
    return host_spans(memory.companion.config)


def _run_once(base: PreTrainedModel) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long, device=base.device)
    with probe.evaluating(base), torch.no_grad():
        base(ids, use_cache=False)


def _config_for(memory: Any, preset: str | None, fresh: bool, options: dict[str, Any]) -> MemoryConfig:
    if isinstance(memory, str) and "+" in memory:
        memory = memory.split("+")
    if isinstance(memory, Sequence) and not isinstance(memory, str):
        if preset is not None or options:
            raise ConfigError(
                "Settings of stacked memories go with each of them: give their configs, or 'name:preset'."
            )
        if len(memory) == 1:
            return _config_for(memory[0], None, fresh, {})
        return StackConfig(memories=tuple(_config_for(m, None, fresh, {}) for m in memory))
    if isinstance(memory, str) and preset is None and ":" not in memory and not fresh:
        known = memory_class(memory).config_class.presets
        preset = "attach" if "attach" in known else None
    return memory_config(memory, preset, **options)


def _model_of(host: Any) -> Any:
    if isinstance(host, PreTrainedConfig):
        try:
            cls = loader_of(host)
            return cls(host) if issubclass(cls, PreTrainedModel) else cls.from_config(host)
        except ValueError as error:
            raise HostError(f"{type(host).__name__} describes no causal language model: {error}") from error
    if isinstance(host, str | Path):
        try:
            return load_host(host)
        except (OSError, ValueError) as error:
            raise HostError(
                f"Cannot load a host from {str(host)!r}: {error} Give a folder saved by transformers, a name on the "
                "Hugging Face hub (when online), or a config to build a fresh host."
            ) from error
    if isinstance(host, torch.nn.Module):
        return host
    raise HostError(f"A host is a transformers model, config, name or path; got {type(host).__name__}.")
