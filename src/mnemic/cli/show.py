"""`mnemic show`: one memory: paper, options, presets, and its size on a host."""

import dataclasses
import inspect
import sys
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Memory: a name, or name:preset.")],
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Architecture of a small host, or a folder or hub name.")
    ] = "llama",
    segment: Annotated[
        int | None, typer.Option("--segment", metavar="N", min=1, help="Tokens of a segment; 512 where it fits.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the memory; host.KEY for the host."),
    ] = None,
) -> None:
    """Explain one memory: its paper, equations, options and presets, and how large it is on a host.

    No weights are loaded: the host is built without storage from its config alone.

    \b
    Examples:
      mnemic show lm2
      mnemic show lm2:paper --set num_slots=128 --segment 256
      mnemic show rmt --host gpt2 --set host.hidden_size=256
      mnemic show rmt --host meta-llama/Llama-3.2-1B

    \b
    Reads:   the config of the host, if it is a folder or a name on the hub (config.json only).
    Writes:  nothing.
    """
    from ..core.errors import ConfigError
    from ..core.registry import memory_class, memory_config, memory_family
    from ._shared import console, host_config, quiet, settings

    quiet()
    given = settings(change or ())
    for key in given:
        if key == "task_options":
            raise ConfigError("--set task.…: sizes of a task are settings of mnemic train.")
    host_options = given.pop("host_options", {})
    options = {**given.pop("memory_options", {}), **given}
    chosen = memory_config(name, **options)
    kind = memory_class(chosen.name)
    out = console()
    text = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
    print(f"{chosen.name} ({memory_family(chosen.name)})\n")
    if not text.startswith(kind.paper):
        print(f"{kind.paper}\n")
    print(f"{text}\n")
    _show_options(out, kind.config_class, chosen)
    _show_presets(out, kind.config_class)
    size = _size(chosen, host_config(host, host_options), segment)
    _show_size(out, host, size)


def _show_options(out: Any, config_class: Any, chosen: Any) -> None:
    from ._shared import table

    fields = dataclasses.fields(config_class)
    if not fields:
        return print("No options.\n")
    hints = get_type_hints(config_class)
    changed = any(getattr(chosen, f.name) != f.default for f in fields)
    rows = table("Options", "option", "default", *(["here"] if changed else []), "range", "meaning")
    for f in fields:
        value = getattr(chosen, f.name)
        here = [_text(value) if value != f.default else ""] if changed else []
        rows.add_row(f.name, _text(f.default), *here, allowed(f, hints[f.name]), f.metadata.get("help", ""))
    out.print(rows)


def _show_presets(out: Any, config_class: Any) -> None:
    from ._shared import table

    if not config_class.presets:
        return print("Presets: default only.\n")
    rows = table("Presets", "preset", "changes")
    for preset, changes in config_class.presets.items():
        rows.add_row(preset, ", ".join(f"{key} = {_text(value)}" for key, value in changes.items()))
    out.print(rows)


def allowed(f: dataclasses.Field, hint: Any) -> str:
    """The values that an option takes, in words."""
    parts = get_args(hint) if get_origin(hint) is not None and get_origin(hint) is not Literal else (hint,)
    said: list[str] = []
    low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
    for part in parts:
        if get_origin(part) is Literal:
            said += [_text(value) for value in get_args(part)]
        elif part in (int, float):
            noun = "whole number" if part is int else "number"
            if low is not None and high is not None:
                said.append(f"{noun} {low} to {high}")
            elif low is not None:
                said.append(f"{noun} >= {low}")
            else:
                said.append(noun if high is None else f"{noun} <= {high}")
        elif part is bool:
            said.append("true, false")
        elif part is type(None):
            said.append("none")
        else:
            said.append({"str": "text", "tuple": "list"}.get(getattr(part, "__name__", ""), str(part)))
    return ", ".join(said)


def _size(chosen: Any, config: Any, segment: int | None) -> dict[str, Any]:
    """Numbers of parameters, memory tokens and bytes of state, from shapes alone; or why the memory does not fit."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..core.errors import ConfigError, HostError
    from ..core.registry import memory_class
    from ..hosts import parameter_report
    from ..hosts.anatomy import examine, host_spec
    from ..hosts.attach import install
    from ..hosts.kinds import check_kind, kind_of

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise HostError(f"{type(config).__name__} describes no causal language model: {error}") from error
    anatomy, spec = examine(model), host_spec(model)
    try:
        check_kind(type(model).__name__, kind_of(type(model), model.config), chosen)
        try:
            with torch.device("meta"):
                memory = memory_class(chosen.name)(chosen, spec)
        except (NotImplementedError, RuntimeError):
            # Some first values are computed from numbers, which tensors without storage do not have.
            memory = memory_class(chosen.name)(chosen, dataclasses.replace(spec, device=torch.device("cpu")))
        install(model, memory, anatomy, segment)
    except ConfigError as error:
        if segment is not None:
            raise
        return {"problem": f"{error}\nGive --segment, --set or --host to see its size."}
    except HostError as error:
        return {"problem": str(error)}
    report = parameter_report(model)
    layout = model.mnemic.layout  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "problem": None,
        "class": model.mnemic.host_class.__name__,  # pyright: ignore[reportAttributeAccessIssue]
        "width": spec.hidden_size,
        "layers": spec.num_layers,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "host": report["host"]["total"],
        "memory": report["memory"]["total"],
        "state_bytes": memory.initial_state(1).nbytes,
        "grows": not memory.constant_size,
        "segment": layout.segment,
        "every": layout.every,
        "window": layout.window,
        "read": layout.read,
        "write": layout.write,
        "sites": ", ".join(sorted(memory.sites)) or "none",
        "layers_used": len(memory.layers),
    }


def _show_size(out: Any, host: str, size: dict[str, Any]) -> None:
    from ._shared import table

    if size["problem"]:
        return print(f"On {host}: {size['problem']}")
    total = size["host"] + size["memory"]
    rows = table(f"On {host}: {size['class']}, {size['layers']} layers of width {size['width']}", "what", "value")
    rows.add_row("parameters of the host", f"{size['host']:,}")
    rows.add_row("parameters of the memory", f"{size['memory']:,} ({100 * size['memory'] / total:.2f}% of both)")
    growth = " at first; it grows with what is read" if size["grows"] else ""
    rows.add_row("state of a row", f"{size['state_bytes']:,} bytes ({size['dtype']}){growth}")
    if size["window"]:
        rows.add_row("window", f"{size['window']} tokens: their keys and values are carried in every layer")
    else:
        rows.add_row("segment", f"{size['segment']} tokens; a write every {size['every']}")
        rows.add_row("memory tokens", f"{size['read']} in front of a segment, {size['write']} behind it")
    at = f" ({size['layers_used']} of {size['layers']} layers)" if size["layers_used"] else ""
    rows.add_row("reads at", size["sites"] + at)
    out.print(rows)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(list(value)) if isinstance(value, tuple) else str(value)
