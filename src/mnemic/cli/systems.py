"""`mnemic systems`: the table of all memories, probed."""

import dataclasses
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

PROBE_HOST = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 32768,
}  # fmt: skip
"""A Llama as wide as its segments are long, so that memories with one slot per token fit too."""
PROBE_ENCODER_DECODER = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
"""A BART of the same width, for memories that stand on encoder-decoders only."""
SEGMENT = 64
SMALLER = {"ahn": {"num_sinks": 16}}
"""Options whose defaults do not fit into such a segment."""
UNKNOWN = "?"
ABILITIES = ("croppable", "reorderable", "batch_safe", "constant_size", "whole_segments")


def systems(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also list what is not built yet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with everything that was probed.")] = False,
) -> None:
    """List all memories: what each is, where it reads, what it keeps, and what it promises.

    Every memory is attached to a small fresh host and tried; the table says what was measured, not what is claimed.
    "identity": the host's logits are unchanged when the memory is new, segment by segment, by default or with a
    preset. "state": numbers kept for a row (L blocks, d width, H and Hkv heads, e head width, T segment, options), and
    whether the bytes carried from call to call stay the same however much is read. "parameters": what the memory adds
    to the small host. --all adds the published systems that are known here and not built yet.

    \b
    Examples:
      mnemic systems
      mnemic systems --all
      mnemic systems --markdown
      mnemic systems --json > systems.json

    Reads and writes no files.
    """
    from ..core.errors import ConfigError
    from ._shared import console, quiet, table

    if markdown and as_json:
        raise ConfigError("Give --markdown or --json, not both.")
    quiet()
    found = all_systems()
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    columns = ("name", "family", "what it is", "reads at", "identity", "state", "parameters", "presets")
    rows = [_row(entry) for entry in found] + (_unbuilt() if everything else [])
    if markdown:
        for cells in (columns, ["---"] * len(columns), *([_escaped(c) for c in row] for row in rows)):
            print(f"| {' | '.join(cells)} |")
        return
    shown = table("", *columns)
    for row in rows:
        shown.add_row(*row)
    console().print(shown)
    if not everything:
        console().print(f"{len(_unbuilt())} more published systems are not built yet: mnemic systems --all")


def all_systems() -> list[dict[str, Any]]:
    """What is known of every memory, in the order of families and names."""
    from ..core.registry import memory_names

    return sorted((describe(name) for name in memory_names()), key=lambda entry: (entry["family"], entry["name"]))


def describe(name: str) -> dict[str, Any]:
    """One memory. Values that could not be probed are None, and `problem` says why."""
    from ..core.registry import memory_class, memory_family

    kind = memory_class(name)
    presets = {"default": {}, **kind.config_class.presets}
    probed = {preset: _probe(name, preset) for preset in presets}
    default = probed["default"]
    doc = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
    return {
        "name": name,
        "family": memory_family(name),
        "what": doc.split("\n")[0].rstrip(".") or kind.paper,
        "paper": kind.paper,
        "hosts": sorted(kind.hosts),
        "sites": default["sites"],
        "state_size": kind.state_size,
        "parameters": default["parameters"],
        "limits": dict(kind.limits) if isinstance(kind.limits, Mapping) else {},
        "abilities": {n: bool(getattr(kind, n)) for n in ABILITIES if isinstance(getattr(kind, n), bool)},
        "identity_at_attach": {preset: p["identity"] for preset, p in probed.items()},
        "constant_state": default["constant"],
        "state_bytes": default["state_bytes"],
        "options": {f.name: _plain(f.default) for f in dataclasses.fields(kind.config_class)},
        "presets": {n: {k: _plain(v) for k, v in p.items()} for n, p in presets.items()},
        "probed_on": {**_probe_host(kind), "segment": SEGMENT},
        "problem": {preset: p["problem"] for preset, p in probed.items() if p["problem"]},
    }


def _probe_host(kind: Any) -> dict[str, Any]:
    """Settings of the small host that a memory is tried on."""
    if "decoder" in kind.hosts:
        return {"architecture": "llama", **PROBE_HOST}
    return {"architecture": "bart", **PROBE_ENCODER_DECODER}


def _probe(name: str, preset: str) -> dict[str, Any]:
    """Attach the memory to a fresh host and try it: sites, identity, whether the state stays as large."""
    import torch

    from ..core.errors import MnemicError
    from ..core.registry import memory_class

    result: dict[str, Any] = {"sites": None, "identity": None, "constant": None, "state_bytes": None}
    result |= {"parameters": None, "problem": None}
    tried = _try_segments if "decoder" in memory_class(name).hosts else _try_turns
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            model, found = tried(name, preset)
            result |= found
            result["sites"] = sorted(model.memory.sites)
            result["parameters"] = sum(p.numel() for p in model.memory.parameters() if p.requires_grad)
        except MnemicError as error:
            result["problem"] = str(error)
    return result


def _try_segments(name: str, preset: str) -> tuple[Any, dict[str, Any]]:
    """A memory on a causal language model, over four segments."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..hosts import attach

    host = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **PROBE_HOST)).eval()
    ids = torch.randint(PROBE_HOST["vocab_size"], (1, 4 * SEGMENT))
    first = ids[:, : 2 * SEGMENT].split(SEGMENT, dim=1)
    plain = torch.cat([host(part, use_cache=False).logits for part in first], dim=1)
    model = attach(host, name, preset=preset, segment=SEGMENT, check=False, **SMALLER.get(name, {}))
    # A window sees across the edges of segments, as it should: only the first one is the host's own.
    read = SEGMENT if model.memory.continuous else 2 * SEGMENT
    logits = model(ids[:, :read], use_cache=False).logits
    stream = model.stream().feed(ids[:, : 2 * SEGMENT])
    early = stream.state_bytes
    return model, {
        "identity": bool(torch.allclose(logits, plain[:, :read], atol=1e-5)),
        "constant": stream.feed(ids[:, 2 * SEGMENT :]).state_bytes == early,
        "state_bytes": stream.state.nbytes,
    }


def _try_turns(name: str, preset: str) -> tuple[Any, dict[str, Any]]:
    """A memory on an encoder-decoder, over four turns."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    from ..hosts import attach

    host = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **PROBE_ENCODER_DECODER)).eval()
    turns = torch.randint(PROBE_ENCODER_DECODER["vocab_size"], (4, SEGMENT)).split(1)
    plain = [host(turn, decoder_input_ids=turn).logits for turn in turns[:2]]
    model = attach(host, name, preset=preset, segment=SEGMENT, check=False)
    read, state = [], None
    for turn in turns[:2]:
        output = model(turn, decoder_input_ids=turn, memory_state=state)
        state = output.memory_state
        read.append(output.logits)
    talk = model.conversation().turn(turns[0])
    early = talk.state_bytes
    for turn in turns[1:]:
        talk.turn(turn)
    return model, {
        "identity": bool(torch.allclose(torch.cat(read), torch.cat(plain), atol=1e-5)),
        "constant": talk.state_bytes == early,
        "state_bytes": talk.state_bytes,
    }


def _row(entry: dict[str, Any]) -> list[str]:
    identity = entry["identity_at_attach"]
    by_preset = [f":{preset}" for preset, holds in identity.items() if holds]
    constant = {True: "constant", False: "grows", None: UNKNOWN}[entry["constant_state"]]
    return [
        entry["name"],
        entry["family"],
        entry["what"],
        UNKNOWN if entry["sites"] is None else ", ".join(entry["sites"]) or "–",
        "yes" if identity["default"] else ", ".join(by_preset) or (UNKNOWN if identity["default"] is None else "no"),
        f"{entry['state_size']}; {constant}",
        UNKNOWN if entry["parameters"] is None else f"{entry['parameters']:,}",
        ", ".join(preset for preset in entry["presets"] if preset != "default") or "–",
    ]


def _unbuilt() -> list[list[str]]:
    """Rows of the published systems that have no file yet."""
    from ..core.catalogue import catalogue
    from ..core.registry import memory_names

    built = set(memory_names())
    missing = sorted((e for e in catalogue().values() if e.name not in built), key=lambda e: (e.family, e.name))
    return [[e.name, e.family, f"{e.title} ({e.year})", "not built", "–", "–", "–", "–"] for e in missing]


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
